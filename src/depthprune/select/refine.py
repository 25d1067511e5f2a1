"""Refining a choice: exchange dropped units for kept ones while that lowers the loss. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from depthprune.budget import Budget, Ledger
from depthprune.select.rank import Oracle, Step
from depthprune.units import Unit

TRIES = 4  # exchanges that are measured for each dropped unit in a round


def refine(
    oracle: Oracle, waiting: Sequence[Unit], budget: Budget, steps: tuple[Step, ...], *, rounds: int
) -> tuple[Step, ...]:
    """Try to restore each dropped unit and to drop others instead, for as long as that lowers the loss.

    ``waiting`` lists the units that may go, the most promising first. A restored unit is replaced by each of the first
    ``TRIES`` of them that stay so far, and by the next ones too where the budget needs more than one. Stops after
    ``rounds`` or when a round brings nothing.
    """
    gone = tuple(step.unit for step in steps)
    for _ in range(rounds if gone else 0):
        best = before = _loss(oracle, [gone])[0]
        for unit in gone:
            rest = tuple(other for other in gone if other != unit)
            kept = [other for other in waiting if other not in gone]
            orders = [[one, *(other for other in kept if other != one)] for one in kept[:TRIES]] or [[]]
            found = [fill(oracle.ledger, budget, rest, order) for order in orders]
            tries = list({frozenset(one): one for one in found if one}.values())
            for one, loss in zip(tries, _loss(oracle, tries), strict=True):
                if loss < best:
                    gone, best = one, loss
            if unit not in gone:
                steps = reordered(steps, gone, best)
                instead = ", ".join(map(str, gone[len(rest) :])) or "nothing"
                oracle.note(f"swap: {unit} stays, {instead} goes: loss {best:.4f}")
        if best == before:
            break
    return steps


def fill(ledger: Ledger, budget: Budget, gone: Sequence[Unit], order: Sequence[Unit]) -> tuple[Unit, ...] | None:
    """Drop more units in this order until the budget is met; None where it cannot be."""
    result = tuple(gone)
    for unit in order:
        if budget.met(ledger, result):
            break
        if ledger.viable(frozenset((*result, unit))):
            result = (*result, unit)
    return result if budget.met(ledger, result) else None


def reordered(steps: Sequence[Step], gone: Sequence[Unit], loss: float) -> tuple[Step, ...]:
    """The steps of a changed choice: as measured where it begins as before, then bare units, then the final loss."""
    same = 0
    while same < min(len(steps), len(gone) - 1) and steps[same].unit == gone[same]:
        same += 1
    return (*steps[:same], *(Step(unit) for unit in gone[same:-1]), Step(gone[-1], loss))


def _loss(oracle: Oracle, sets: Sequence[Sequence[Unit]]) -> list[float]:
    return oracle.losses([frozenset(units) for units in sets]).mean().tolist() if sets else []
