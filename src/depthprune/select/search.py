"""Searches that ask for losses: greedy, lazy by default. No torch.

Greedy drops, again and again, the unit whose removal leaves the lowest loss. In most models damage only grows as more
units go, so a unit's last known damage is a lower bound, and only the front-runner has to be measured again until it
stays in front (Minoux's lazy greedy). What that saves is partly spent on refreshing the next few contenders, as the
bound is not a law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from depthprune.budget import Budget
from depthprune.errors import OptionError
from depthprune.scores import Losses
from depthprune.select.rank import Oracle, Selection, Step
from depthprune.units import Unit


def greedy(
    oracle: Oracle, candidates: Sequence[Unit], budget: Budget, *, exact: bool = False, refresh: int = 2
) -> Selection:
    """Drop one unit at a time, always the one that leaves the lowest loss.

    ``exact`` measures every candidate at every step (SLEB for blocks, BlockPruner for sublayers). Otherwise a step
    measures candidates in the order of their last known damage, ``refresh`` at a time, until no stale one could
    still win. Ties go to the first in execution order; a runner-up closer than one paired standard error is noted.
    Raises ``OptionError`` for a ``refresh`` below 1.
    """
    if refresh < 1:
        raise OptionError(f"greedy:refresh must be at least 1, not {refresh}")
    gone: tuple[Unit, ...] = ()
    steps: list[Step] = []
    damage = dict.fromkeys(candidates, -math.inf)
    place = {unit: index for index, unit in enumerate(candidates)}

    def rank(unit: Unit) -> tuple[float, int]:
        return damage[unit], place[unit]

    start = oracle.evaluations
    current = dense = float(oracle.losses([frozenset()]).mean()[0])
    while not budget.met(oracle.ledger, gone):
        left = [u for u in candidates if u not in gone and oracle.ledger.viable(frozenset((*gone, u)))]
        if not left:
            break
        fresh: dict[Unit, int] = {}
        measured: list[tuple[Unit, Losses]] = []
        while len(fresh) < len(left):
            best = min((rank(unit) for unit in fresh), default=(math.inf, len(place)))
            stale = sorted((unit for unit in left if unit not in fresh), key=rank)
            everything = exact or not gone
            front = stale if everything else [unit for unit in stale[:refresh] if not fresh or rank(unit) < best]
            if not front:
                break
            result = oracle.losses([frozenset((*gone, unit)) for unit in front])
            for row, (unit, loss) in enumerate(zip(front, result.mean(), strict=True)):
                damage[unit] = float(loss) - current if math.isfinite(loss) else math.inf
                fresh[unit] = len(measured)
                measured.append((unit, Losses(result.nll[row : row + 1], result.tokens)))
        chosen = min(fresh, key=rank)
        chosen_losses = measured[fresh[chosen]][1]
        current = float(chosen_losses.mean()[0])
        base = oracle.losses([frozenset(gone)])
        steps.append(_step(chosen, chosen_losses, base, measured))
        gone = (*gone, chosen)
        oracle.note(f"{len(gone)}. {chosen}: loss {current:.4f} (dense {dense:.4f})")
    budget.insist(oracle.ledger, gone)
    return Selection(tuple(steps), oracle.evaluations - start, nested=True, dense=dense)


def _step(unit: Unit, losses: Losses, base: Losses, measured: list[tuple[Unit, Losses]]) -> Step:
    """Write down a choice: the loss it leaves, the error of its rise, and contenders within the noise."""
    both = Losses.join(losses, base)
    _, error = both.difference(0, 1)
    ties = []
    for other, other_losses in measured:
        if other != unit:
            gap, noise = Losses.join(other_losses, losses).difference(0, 1)
            if gap <= noise:
                ties.append(other)
    return Step(unit, float(losses.mean()[0]), error, tuple(ties))
