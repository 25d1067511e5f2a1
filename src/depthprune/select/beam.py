"""Beam search: several thinned models at once, each thinned further. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthprune.budget import Budget
from depthprune.scores import paired
from depthprune.select.cost import at_least, prices, rank
from depthprune.select.rank import Oracle, Selection
from depthprune.select.search import measure, rises
from depthprune.units import Unit


@dataclass(frozen=True)
class State:
    """A partial plan: its units in order of removal, its loss, and each unit's last known damage on the way to it."""

    units: tuple[Unit, ...]
    loss: float
    damage: Mapping[Unit, float]


def beam(
    oracle: Oracle, candidates: Sequence[Unit], budget: Budget, *, width: int = 3, expand: int = 8, per: str = "none"
) -> Selection:
    """Keep the ``width`` best partial plans and drop one more unit from each, until all meet the budget.

    Each plan is extended by the ``expand`` candidates of lowest last known damage (all: 0); the same set from two
    plans is measured once. Plans compete only with those that free about as much: they lie on shelves as wide as the
    smallest unit, and the shelves are worked off in order, so an attention never competes with a larger MLP. ``per``
    divides damage by what is saved, for units and within shelves. The answer is the plan of lowest loss of all that
    meet the budget; under a budget on the loss, the one within it that frees the most parameters.
    ``nested`` holds only for counts, where each prefix was the best plan of its size; elsewhere a smaller budget would
    have chosen another. Raises ``OptionError`` for a ``width`` below 1, ``BudgetError`` where no plan meets the budget.
    """
    at_least("beam:width", width, 1)
    at_least("beam:expand", expand, 0)
    ledger, start = oracle.ledger, oracle.evaluations
    price = prices("beam", per, candidates, ledger, oracle.milliseconds)
    size = {unit: budget.spent(ledger, frozenset((unit,))) for unit in candidates}
    units = [unit for unit in candidates if size[unit] > 0]  # others do not help
    place = {unit: index for index, unit in enumerate(units)}
    shelf = min(size[unit] for unit in units) if units else 1.0
    expected = _at_most(oracle, budget, units, shelf, width, expand)
    oracle.note(f"beam: {len(units)} variants first, at most {expected} in all")
    dense = float(oracle.losses([frozenset()]).mean()[0])
    limit = budget.limit(dense)

    def value(state: State) -> tuple[bool, float]:
        return rank(state.loss - dense, 1.0 if per == "none" else sum(price[unit] for unit in state.units))

    shelves: dict[int, dict[frozenset[Unit], State]] = {0: {frozenset(): State((), dense, {})}}
    known: dict[frozenset[Unit], float] = {}
    best: dict[int, frozenset[Unit]] = {}  # the lowest loss of each size, for ``nested``
    fits: list[State] = []
    states: list[State] = []
    while shelves:
        level = min(shelves)
        here = shelves.pop(level)
        best[level] = min(here, key=lambda gone: here[gone].loss)
        states = sorted(here.values(), key=value)[:width]
        fronts = [_front(oracle, state, units, price, place, expand) for state in states]
        sets = [frozenset((*s.units, unit)) for s, front in zip(states, fronts, strict=True) for unit in front]
        fresh = [gone for gone in dict.fromkeys(sets) if gone not in known]
        if fresh:
            means = oracle.losses(fresh).mean().tolist()
            known |= {gone: m if math.isfinite(m) else math.inf for gone, m in zip(fresh, means, strict=True)}
        waiting = set(fresh)
        for state, front in zip(states, fronts, strict=True):
            losses = {unit: known[frozenset((*state.units, unit))] for unit in front}
            damage = {**state.damage, **{unit: loss - state.loss for unit, loss in losses.items()}}
            for unit, loss in losses.items():
                child = State((*state.units, unit), loss, damage)
                gone = frozenset(child.units)
                if gone not in waiting or loss == math.inf or loss > limit:
                    continue
                waiting.remove(gone)  # from another plan comes the same
                met = budget.met(ledger, gone)
                if met or limit < math.inf:
                    fits.append(child)
                if not met:
                    shelves.setdefault(int(budget.spent(ledger, gone) // shelf), {})[gone] = child
        if level:
            oracle.note(f"{len(states[0].units)} gone: loss {here[best[level]].loss:.4f} (dense {dense:.4f})")
    if not fits:
        _refuse(oracle, budget, dense, known, units, states[0])
    final = min(fits, key=lambda state: (_left(oracle, state) if limit < math.inf else 0, state.loss))
    prefixes = [final.units[:count] for count in range(len(final.units))]
    nested = budget.measure == "count" and all(best[len(prefix)] == frozenset(prefix) for prefix in prefixes)
    steps = []
    for prefix, unit in zip(prefixes, final.units, strict=True):
        rivals = [u for u in units if u != unit and known.get(frozenset((*prefix, u)), math.inf) < math.inf]
        risen, tokens = rises(oracle, prefix, [unit, *rivals])
        gaps = {rival: paired(risen[rival], risen[unit], tokens) for rival in rivals}
        ties = [rival for rival, (gap, noise) in gaps.items() if abs(gap) <= noise]
        steps.append(measure(oracle, prefix, unit, ties))
    return Selection(tuple(steps), oracle.evaluations - start, nested, dense, expected)


def _front(
    oracle: Oracle,
    state: State,
    units: Sequence[Unit],
    price: Mapping[Unit, float],
    place: Mapping[Unit, int],
    most: int,
) -> list[Unit]:
    """The candidates that look best once a plan's units are gone: all of them at first, and where ``most`` is 0.

    In execution order, so that ties go to the first.
    """

    def line(unit: Unit) -> tuple[tuple[bool, float], int]:
        return rank(state.damage.get(unit, -math.inf), price[unit]), place[unit]

    gone = set(state.units)
    left = [u for u in units if u not in gone and state.damage.get(u, 0) < math.inf]
    viable = [unit for unit in sorted(left, key=line) if oracle.ledger.viable(frozenset((*gone, unit)))]
    return sorted(viable[: most or None] if gone else viable, key=place.__getitem__)


def _at_most(oracle: Oracle, budget: Budget, units: Sequence[Unit], shelf: float, width: int, expand: int) -> int:
    """The most evaluations: the dense model, every unit alone, ``expand`` of ``width`` plans on each later shelf."""
    on_loss = budget.measure == "loss"
    reach = oracle.ledger.freed(frozenset(units)) + shelf if on_loss else budget.amount - 1e-6
    shelves = max(0, math.ceil(reach / shelf) - 1)
    left = max(0, len(units) - 1)
    return int(min(1 + len(units) + shelves * width * min(expand or left, left), 2 ** len(units)))


def _left(oracle: Oracle, state: State) -> int:
    return oracle.ledger.parameters - oracle.ledger.freed(frozenset(state.units))


def _refuse(
    oracle: Oracle,
    budget: Budget,
    dense: float,
    known: Mapping[frozenset[Unit], float],
    units: Sequence[Unit],
    last: State,
) -> None:
    """Raise the ``BudgetError`` that says why no plan meets the budget."""
    if budget.measure == "loss" and known:
        best = min(known, key=lambda gone: known[gone])
        raise budget.broken(dense, sorted(best), known[best])
    stuck = [unit for unit in units if math.inf in (last.damage.get(unit), known.get(frozenset((*last.units, unit))))]
    budget.insist(oracle.ledger, last.units, stuck)
