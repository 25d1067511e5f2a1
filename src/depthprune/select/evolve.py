"""Evolutionary search: exchange units at random and keep what is better. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from depthprune.budget import Budget, Ledger
from depthprune.errors import BudgetError
from depthprune.select.cost import at_least, one_of
from depthprune.select.rank import Oracle, Selection, lowest
from depthprune.select.refine import fill, reordered
from depthprune.select.search import greedy
from depthprune.units import Unit

STARTS = ("greedy", "lowest", "random")
FEWER = 4  # one in so many survives a stage


def evolve(
    oracle: Oracle,
    candidates: Sequence[Unit],
    budget: Budget,
    *,
    generations: int = 20,
    offspring: int = 16,
    mutations: int = 3,
    start: str = "greedy",
    seed: int = 0,
) -> Selection:
    """Change a plan at random, again and again, and keep the change where it lowers the loss.

    Each generation makes ``offspring`` from the parent by up to ``mutations`` level switches (fewer more often): a
    dropped unit stays and a kept one goes, with more of either until the budget is met and no removal is superfluous.
    They are measured on few sequences, each quarter that survives on four times as many, the last one on all, so a
    stage costs about as much as one full measurement. The parent stays unless beaten on all sequences.
    ``start`` is the answer of ``greedy`` or ``lowest``, or the best of ``offspring`` random plans. The same ``seed``
    gives the same answer. Source: EvoPress (level-switch mutation, multi-step selection, one elite parent).
    Raises ``BudgetError`` for a budget on the loss, which leaves nothing to hold constant.
    """
    one_of("evolve:start", start, STARTS)
    for option, value in (("generations", generations), ("offspring", offspring), ("mutations", mutations)):
        at_least(f"evolve:{option}", value, 1)
    if budget.measure == "loss":
        raise BudgetError(
            f"--drop {budget.text!r}: evolve compares plans that free the same, so it needs a budget on the size, such "
            "as 25%; for one on the loss use --select greedy, beam, iterative or lowest"
        )
    before, draw = oracle.evaluations, random.Random(seed)
    extra = 2 + offspring * (generations + (start == "random"))  # the dense model and the first parent, the offspring
    oracle.note(f"evolve: from {start}, then at most {extra} variants")
    units = list(candidates)
    first: Selection | None = None
    if start == "random":
        plans = [_random(oracle.ledger, budget, units, draw) for _ in range(offspring)]
        parent = _survivor(oracle, plans)
    else:
        first = (greedy if start == "greedy" else lowest)(oracle, candidates, budget)
        parent = first.units
        if start == "lowest":
            scores = oracle.scores()
            units = [unit for unit in units if math.isfinite(scores[unit])]
    expected = extra + (first.expected or 0 if first else 0)
    dense, loss = map(float, oracle.losses([frozenset(), frozenset(parent)]).mean())
    steps = reordered(first.steps if first else (), parent, loss)
    tried = {frozenset(parent)}
    changed = False
    for generation in range(1, generations + 1):
        children = _offspring(oracle.ledger, budget, units, parent, draw, offspring, mutations, tried)
        if not children:
            break
        child = _survivor(oracle, children)
        tried.add(frozenset(child))
        found = float(oracle.losses([frozenset(child)]).mean()[0])
        if found < loss or (math.isfinite(found) and not math.isfinite(loss)):
            parent, loss, changed = child, found, True
            steps = reordered(steps, parent, loss)
            oracle.note(f"generation {generation}: loss {loss:.4f} (dense {dense:.4f})")
    if not math.isfinite(loss):
        raise BudgetError(f"--drop {budget.text!r}: no plan was found that leaves a finite loss; try --select greedy")
    if first is not None and not changed:
        steps = first.steps
    nested = first is not None and first.nested and not changed
    return Selection(steps, oracle.evaluations - before, nested, dense, expected)


def _random(ledger: Ledger, budget: Budget, units: Sequence[Unit], draw: random.Random) -> tuple[Unit, ...]:
    """Draw a plan that meets the budget. Raises ``BudgetError`` where there is none."""
    order = draw.sample(list(units), len(units))
    plan = fill(ledger, budget, (), order)
    if plan is None:
        budget.insist(ledger, ())
    assert plan is not None
    return _trimmed(ledger, budget, plan, draw)


def _offspring(
    ledger: Ledger,
    budget: Budget,
    units: Sequence[Unit],
    parent: tuple[Unit, ...],
    draw: random.Random,
    count: int,
    mutations: int,
    tried: set[frozenset[Unit]],
) -> list[tuple[Unit, ...]]:
    """Different children that were not yet measured to the end; fewer than ``count`` where there seem to be no more."""
    children: dict[frozenset[Unit], tuple[Unit, ...]] = {}
    for _ in range(8 * count):
        child = parent
        for _ in range(min(draw.randint(1, mutations), draw.randint(1, mutations))):
            child = _switch(ledger, budget, units, child, draw)
        if frozenset(child) not in tried:
            children.setdefault(frozenset(child), child)
        if len(children) == count:
            break
    return list(children.values())


def _switch(
    ledger: Ledger, budget: Budget, units: Sequence[Unit], plan: tuple[Unit, ...], draw: random.Random
) -> tuple[Unit, ...]:
    """Restore a dropped unit and drop kept ones instead until the budget is met; the same plan where that cannot be."""
    back = draw.choice(plan)
    rest = tuple(unit for unit in plan if unit != back)
    kept = [unit for unit in units if unit not in plan]
    switched = fill(ledger, budget, rest, draw.sample(kept, len(kept)))
    return plan if switched is None else _trimmed(ledger, budget, switched, draw)


def _trimmed(ledger: Ledger, budget: Budget, plan: tuple[Unit, ...], draw: random.Random) -> tuple[Unit, ...]:
    """Restore, in random order, every unit that the budget does not need."""
    for unit in draw.sample(plan, len(plan)):
        rest = tuple(other for other in plan if other != unit)
        if budget.met(ledger, rest):
            plan = rest
    return plan


def _survivor(oracle: Oracle, plans: Sequence[tuple[Unit, ...]]) -> tuple[Unit, ...]:
    """The best of several plans: all on few sequences, the better quarter on more, and so on."""
    alive = list(dict.fromkeys(plans))
    while len(alive) > 1:
        rows = max(1, oracle.sequences // len(alive))
        losses = oracle.losses([frozenset(plan) for plan in alive], rows=rows).mean().tolist()
        order = sorted(range(len(alive)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
        alive = [alive[index] for index in order[: math.ceil(len(alive) / FEWER)]]
    return alive[0]
