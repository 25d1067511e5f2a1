"""What can go wrong, as one tree.

    DepthpruneError
    ├── LayoutError       the blocks or sublayers cannot be found, or cannot be proven droppable
    ├── PlanError         the plan does not fit this model, or is not a plan
    ├── BudgetError       more is asked than there is
    ├── OptionError       an unknown name or option
    ├── DataError         text that is empty, too short, in the wrong encoding, or all masked
    ├── ExportError       this form cannot express this plan
    └── CheckpointError   weights that are truncated, missing or mismatched

Mistakes of the user raise these, with a message of one line that says what to do. Broken invariants are
``assert``; nothing is caught broadly.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DepthpruneError(Exception):
    """The base of every error that depthprune raises on purpose."""


class LayoutError(DepthpruneError):
    """The blocks of a model cannot be found, or a unit cannot be proven droppable."""


class PlanError(DepthpruneError):
    """A plan is malformed, or belongs to another model."""


class BudgetError(DepthpruneError):
    """A budget asks for more than the model has, or makes no sense."""


class OptionError(DepthpruneError):
    """A name or an option is unknown; the message lists the right ones."""


class DataError(DepthpruneError):
    """Text is missing, empty, too short, badly encoded, or masked throughout."""


class ExportError(DepthpruneError):
    """A form cannot express a plan; the message names the form that can."""


class CheckpointError(DepthpruneError):
    """A checkpoint is truncated, incomplete, or does not match its configuration."""


def unknown(what: str, name: str, known: Iterable[str]) -> OptionError:
    """Build the error for an unknown name: the nearest first, then all the right ones."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"unknown {what} {name!r}.{hint} Available: {', '.join(names)}")
