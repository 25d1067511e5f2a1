"""Units: the things that can be dropped, named so that a person can write them.

``"12"`` is a whole block, ``"12.self_attn"`` one of its sublayers (by its real module name), ``"decoder.12.mlp"`` a
sublayer in one stack of an encoder-decoder. Indices are 0-based and always those of the *original* model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from depthprune.errors import PlanError

Kind = Literal["block", "attention", "cross_attention", "mlp", "mixer"]
KINDS: tuple[Kind, ...] = ("block", "attention", "cross_attention", "mlp", "mixer")
UNITS = ("block", "attention", "mlp", "mixer", "any")  # what can be asked for

_PATTERN = re.compile(r"(?:(?P<stack>[A-Za-z_]\w*)\.)?(?P<block>\d+)(?:\.(?P<sublayer>[A-Za-z_][\w.+]*))?")


@dataclass(frozen=True, order=True)
class Unit:
    """One droppable thing: a block, or a sublayer of a block.

    ``stack`` is empty for models with one stack; ``sublayer`` is empty for a whole block.
    """

    stack: str
    block: int
    sublayer: str = ""

    @classmethod
    def parse(cls, text: str) -> Unit:
        """Read a unit from its name, such as ``"12"`` or ``"decoder.3.self_attn"``.

        Raises ``PlanError`` where the text is no unit.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise PlanError(f"{text!r} is no unit; write a block as '12' or a sublayer as '12.self_attn'")
        return cls(match["stack"] or "", int(match["block"]), match["sublayer"] or "")

    @property
    def whole(self) -> Unit:
        """The block that this unit is, or belongs to."""
        return Unit(self.stack, self.block)

    def __str__(self) -> str:
        return ".".join(part for part in (self.stack, str(self.block), self.sublayer) if part)

    def __repr__(self) -> str:
        return f"Unit({str(self)!r})"


def parse(units: Iterable[str | Unit]) -> tuple[Unit, ...]:
    """Read several units, leaving those that are units already. Raises ``PlanError`` for a text that is no list."""
    if isinstance(units, str):
        raise PlanError(f"a list of units is needed, not the text {units!r}; write [{units!r}]")
    return tuple(unit if isinstance(unit, Unit) else Unit.parse(unit) for unit in units)
