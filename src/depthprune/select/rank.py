"""What a selector may ask, what it answers, and the selectors that only rank. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from depthprune.budget import Budget, Ledger
from depthprune.errors import BudgetError
from depthprune.scores import Losses
from depthprune.units import Unit


class Oracle(Protocol):
    """What a selector may ask about a model.

    Losses are in the measure of the oracle's metric: nats per token where that is ``loss`` or a one-pass metric, the
    divergence from the dense model for ``kl``, and so on.
    """

    @property
    def ledger(self) -> Ledger:
        """What budgets count with."""

    @property
    def evaluations(self) -> int:
        """How many thinned models were measured so far."""

    @property
    def sequences(self) -> int:
        """How many calibration sequences there are."""

    def scores(self, gone: frozenset[Unit] = frozenset()) -> Mapping[Unit, float]:
        """The score of every unit that is left once ``gone`` are dropped, low goes first; infinite: must stay."""

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> Sequence[float]:
        """The score of dropping several consecutive units together."""

    def losses(self, gone: Sequence[frozenset[Unit]], *, rows: int | None = None) -> Losses:
        """The losses of the model without each of these sets of units, on the first ``rows`` sequences or all."""

    def milliseconds(self) -> Mapping[Unit, float]:
        """The time that each unit takes in one forward over one sequence."""

    def note(self, text: str) -> None:
        """Say in a line what was decided."""


@dataclass(frozen=True)
class Step:
    """One removal: the unit, the loss after it (or its score), the standard error of the rise, and its ties."""

    unit: Unit
    loss: float | None = None
    error: float | None = None
    ties: tuple[Unit, ...] = ()
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The step as plain values for the plan."""
        fields: dict[str, Any] = {"unit": str(self.unit)}
        for name, value in (("loss", self.loss), ("score", self.score), ("se", self.error)):
            fields[name] = value if value is not None and math.isfinite(value) else None  # JSON has no others
        fields["ties"] = [str(unit) for unit in self.ties] or None
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Selection:
    """The chosen units in order of removal; ``nested`` if every prefix is the choice for a smaller budget."""

    steps: tuple[Step, ...]
    evaluations: int
    nested: bool
    dense: float | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """The chosen units, in order of removal."""
        return tuple(step.unit for step in self.steps)


def lowest(oracle: Oracle, candidates: Sequence[Unit], budget: Budget) -> Selection:
    """Drop the units with the lowest scores, measured once on the dense model, until the budget is met.

    Source: ShortGPT, Shortened LLaMA, LLM-Drop (one-shot ranking).
    """
    start = oracle.evaluations
    scores = oracle.scores()
    order = {unit: position for position, unit in enumerate(candidates)}
    gone: list[Unit] = []
    for unit in sorted(candidates, key=lambda unit: (scores[unit], order[unit])):
        if budget.met(oracle.ledger, gone):
            break
        if oracle.ledger.viable(frozenset((*gone, unit))):
            gone.append(unit)
    budget.insist(oracle.ledger, gone)
    return Selection(tuple(Step(u, score=scores[u]) for u in gone), oracle.evaluations - start, nested=True)


def contiguous(oracle: Oracle, candidates: Sequence[Unit], budget: Budget) -> Selection:
    """Drop the run of consecutive candidates with the lowest score that meets the budget.

    Every run is as short as the budget allows. Blocks under a one-pass metric are compared across the whole run, as in
    Gromov et al.; other units by the sum of their scores; under ``loss`` by the loss without the run.
    Raises ``BudgetError`` where protected units leave no run that is long enough.
    """
    start = oracle.evaluations
    windows: list[tuple[Unit, ...]] = []
    for first in range(len(candidates)):
        for stop in range(first + 1, len(candidates) + 1):
            window = tuple(candidates[first:stop])
            if not _consecutive(window):
                break
            if budget.met(oracle.ledger, window):
                windows += [window] if oracle.ledger.viable(frozenset(window)) else []
                break
    if not windows:
        raise BudgetError(
            f"no run of consecutive units meets --drop {budget.text!r}; protect fewer units or use --select lowest"
        )
    scores = oracle.windows(windows)
    best = min(range(len(windows)), key=lambda index: scores[index])
    steps = tuple(Step(unit, score=scores[best]) for unit in windows[best])
    return Selection(steps, oracle.evaluations - start, nested=False)


def _consecutive(window: tuple[Unit, ...]) -> bool:
    """Whether no block lies between the units of a window that is not in it (a protected one, say)."""
    return all(later.block - earlier.block <= 1 for earlier, later in pairwise(window))
