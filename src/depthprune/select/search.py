"""Greedy search by the loss, lazy by default. No torch.

Greedy drops, again and again, the unit whose removal leaves the lowest loss. In most models damage only grows as more
units go, so a unit's last known damage is a lower bound, and only the front-runner has to be measured again until it
stays in front (Minoux's lazy greedy). What that saves is partly spent on refreshing the next few contenders, as the
bound is not a law. Racing spends sequences where they decide: all candidates run on few, and only those that are too
close to the front-runner on more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from depthprune.budget import Budget
from depthprune.scores import Array, paired
from depthprune.select.cost import PER, at_least, one_of, prices, rank, shares
from depthprune.select.rank import Oracle, Selection, Step
from depthprune.select.refine import TRIES, refine
from depthprune.units import Unit


def greedy(
    oracle: Oracle,
    candidates: Sequence[Unit],
    budget: Budget,
    *,
    exact: bool = False,
    refresh: int = 2,
    per: str = "none",
    race: int = 1,
    swaps: int = 0,
) -> Selection:
    """Drop one unit at a time, always the one that leaves the lowest loss.

    ``exact`` measures every candidate at every step (SLEB for blocks, BlockPruner for sublayers). Otherwise a step
    measures candidates in the order of their last known damage, ``refresh`` at a time, until no stale one could
    still win. Ties go to the first in execution order; a runner-up closer than one paired standard error is noted.
    ``per`` divides damage by what a unit saves: ``parameters``, ``kv`` or ``time``; ``budget``: by what it brings of
    what the budget still needs, so that a large unit goes before a small one only where it is worth it.
    ``race`` above 1 measures candidates on that fraction of the sequences, and doubles it for those within two paired
    standard errors of the front-runner until one is left or every sequence is used. ``swaps`` is the most rounds of
    exchanging dropped units for kept ones at the end. A unit without which the loss is infinite stays. Under a budget
    on the loss it stops before the first removal that would break it.
    Raises ``OptionError`` for a ``refresh`` or ``race`` below 1, ``BudgetError`` where the budget cannot be met.
    """
    for option, value, least in (("refresh", refresh, 1), ("race", race, 1), ("swaps", swaps, 0)):
        at_least(f"greedy:{option}", value, least)
    one_of("greedy:per", per, (*PER, "budget"))
    by_budget = per == "budget"
    price = prices("greedy", "none" if by_budget else per, candidates, oracle.ledger, oracle.milliseconds)
    place = {unit: index for index, unit in enumerate(candidates)}
    damage = dict.fromkeys(candidates, -math.inf)

    def line(unit: Unit) -> tuple[tuple[bool, float], int]:
        return rank(damage[unit], price[unit]), place[unit]

    most = budget.most(oracle.ledger, candidates)
    expected = 1 + sum(len(candidates) - step for step in range(most)) + swaps * most * TRIES
    rows = oracle.sequences if race == 1 else min(oracle.sequences, max(2, oracle.sequences // race))
    few = f", on {rows} of {oracle.sequences} sequences at first" if rows < oracle.sequences else ""
    oracle.note(f"greedy: {len(candidates)} variants first, at most {expected} in all{few}")
    start = oracle.evaluations
    dense = float(oracle.losses([frozenset()]).mean()[0])
    limit = budget.limit(dense)
    gone: tuple[Unit, ...] = ()
    steps: list[Step] = []
    stuck: set[Unit] = set()
    while not budget.met(oracle.ledger, gone):
        if by_budget:
            price = shares(budget, candidates, gone, oracle.ledger)
        left = [u for u in candidates if u not in {*gone, *stuck} and oracle.ledger.viable(frozenset((*gone, u)))]
        fresh: dict[Unit, Array] = {}
        while len(fresh) < len(left):
            best = min(map(line, fresh), default=None)
            stale = sorted((unit for unit in left if unit not in fresh), key=line)
            if not exact and gone:
                stale = [unit for unit in stale[:refresh] if best is None or line(unit) < best]
            if not stale:
                break
            risen, tokens = rises(oracle, gone, stale, rows)
            fresh |= risen
            damage |= {unit: mean(rise, tokens) for unit, rise in risen.items()}
        able = {unit: rise for unit, rise in fresh.items() if damage[unit] < math.inf}
        if not able:
            stuck |= {unit for unit in left if damage[unit] == math.inf}
            break
        chosen, ties = _settle(oracle, gone, able, tokens, price, place)
        step = measure(oracle, gone, chosen, ties)
        assert step.loss is not None
        if not math.isfinite(step.loss):  # only on sequences that the race had not come to
            stuck.add(chosen)
            continue
        if step.loss > limit:
            if not gone:
                raise budget.broken(dense, [chosen], step.loss)
            break
        gone = (*gone, chosen)
        steps.append(step)
        oracle.note(f"{len(gone)}. {chosen}: loss {step.loss:.4f} (dense {dense:.4f})")
    budget.insist(oracle.ledger, gone, sorted(stuck))
    waiting = [unit for unit in sorted(candidates, key=line) if damage[unit] < math.inf and unit not in stuck]
    if budget.measure == "loss":  # what may be exchanged then must free as much
        budget = replace(budget, measure="parameters", amount=float(oracle.ledger.freed(frozenset(gone))))
    final = refine(oracle, waiting, budget, tuple(steps), rounds=swaps)
    # a smaller budget would have weighed its own last removals by what it still needed
    nested = final == tuple(steps) and not (by_budget and budget.measure in ("parameters", "kv"))
    return Selection(final, oracle.evaluations - start, nested, dense, expected)


def rises(
    oracle: Oracle, gone: Sequence[Unit], units: Sequence[Unit], rows: int | None = None
) -> tuple[dict[Unit, Array], Array]:
    """How much each unit raises the summed loss of each sequence once others are gone, and the sequences' tokens."""
    sets = [frozenset(gone), *(frozenset((*gone, unit)) for unit in units)]
    result = oracle.losses(sets, rows=None if rows == oracle.sequences else rows)
    return {unit: nll - result.nll[0] for unit, nll in zip(units, result.nll[1:], strict=True)}, result.tokens


def mean(rise: Array, tokens: Array) -> float:
    """The rise in nats per token; infinite where it is no number."""
    value = float(rise.sum() / tokens.sum())
    return value if math.isfinite(value) else math.inf


def measure(oracle: Oracle, gone: Sequence[Unit], unit: Unit, ties: Sequence[Unit] = ()) -> Step:
    """Write down a choice on all sequences: the loss it leaves, the paired error of its rise, and its ties."""
    result = oracle.losses([frozenset((*gone, unit)), frozenset(gone)])
    return Step(unit, float(result.mean()[0]), result.difference(0, 1)[1], tuple(ties))


def _settle(
    oracle: Oracle,
    gone: Sequence[Unit],
    able: Mapping[Unit, Array],
    tokens: Array,
    price: Mapping[Unit, float],
    place: Mapping[Unit, int],
) -> tuple[Unit, list[Unit]]:
    """Choose among measured units: more sequences for those too close to call; also those still within the noise."""
    near, rise = list(able), dict(able)
    while True:
        lines = {unit: rank(mean(rise[unit], tokens), price[unit]) for unit in near}
        front = min(near, key=lambda unit: (lines[unit], place[unit]))
        # The same division that ranks them, sequence by sequence, makes the differences paired.
        rate = {u: rise[u] / price[u] if lines[u][1] > 0 and price[u] > 0 else rise[u] for u in near}
        gaps = {
            unit: paired(rate[unit], rate[front], tokens)
            for unit in near
            if unit != front and lines[unit][0] == lines[front][0] and lines[unit][1] < math.inf
        }
        near = [unit for unit, (gap, noise) in gaps.items() if gap <= 2 * noise]
        if not near or len(tokens) >= oracle.sequences:
            return front, [unit for unit in near if gaps[unit][0] <= gaps[unit][1]]
        near = [front, *near]
        rise, tokens = rises(oracle, gone, near, min(2 * len(tokens), oracle.sequences))
