"""Importance over many coalitions: what a unit is worth on average, whatever else is gone.

Both metrics share a game: the players are the units, the value of a set of dropped units is the loss without them, or
another measure of the damage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from depthprune.errors import OptionError
from depthprune.scores import Array, Losses, Scores
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle

AT_ONCE = 4  # antithetic pairs that walk together, so that the engine can run their rows together
LEAST = 8  # pairs before the standard errors are believed: of fewer, 2 of them hold the value only 85 % of the time


def shapley(
    oracle: ModelOracle,
    units: Sequence[Unit],
    *,
    of: str = "loss",
    permutations: int = 64,
    settled: float = 0.9,
    truncate: float = 0.01,
    seed: int = -1,
) -> Scores:
    """The Shapley value of dropping a unit: its damage, averaged over all orders in which the units could go.

    ``phi_u = mean over permutations of v(before u, and u) - v(before u)``, with v the measure ``of`` the model without
    a set of units: sampled in antithetic pairs (an order and its reverse), with the standard error over pairs. An order
    is cut short once v is within ``truncate`` of the value without any unit (relative to the whole way there); what is
    left is shared out evenly among the rest, so the values always add up. Sampling stops after ``permutations``, or as
    soon as the ranking is settled: when ``1 - mean(se^2) / variance of the values``, the expected squared correlation
    with the true values, reaches ``settled``. Where the loss is not finite, v counts as if every unit were gone.

    Sources: Shapley (1953); Castro et al. (2009), sampling; Ghorbani and Zou (2019), truncation.
    Raises ``OptionError`` for fewer than two units or permutations.
    """
    if permutations < 2 or not 0 <= truncate < 1 or not units:
        raise OptionError(
            f"shapley needs a unit, two permutations, and truncate from 0 to 1, not {len(units)} units, "
            f"permutations={permutations}, truncate={truncate}"
        )
    count = len(units)
    most = permutations // 2
    oracle.note(f"shapley: at most {2 * most * (count - 1) + 2:,} evaluations, fewer once the ranking is settled")
    dense, end = (float(value) for value in oracle.losses([frozenset(), frozenset(units)], measure=of).mean())
    draw = _generator(oracle, seed)
    progress = oracle.progress("sampling orders of removal")
    pairs: list[Array] = []
    while len(pairs) < most:
        orders = [draw.permutation(count) for _ in range(min(AT_ONCE, most - len(pairs)))]
        both = [order for one in orders for order in (one, one[::-1])]
        found = _marginals(oracle, units, both, of, dense, end, truncate)
        pairs += [(found[2 * index] + found[2 * index + 1]) / 2 for index in range(len(orders))]
        if progress is not None:
            progress(len(pairs), most)
        values, errors = _mean(np.stack(pairs))
        if len(pairs) >= LEAST and float((errors**2).mean()) <= (1 - settled) * float(values.var()):
            break
    else:
        values, errors = _mean(np.stack(pairs))
    if progress is not None:
        progress(most, most)
    oracle.note(f"shapley: {2 * len(pairs)} permutations")
    return Scores(
        "shapley",
        {unit: float(value) for unit, value in zip(units, values, strict=True)},
        {unit: float(value) for unit, value in zip(units, errors, strict=True) if math.isfinite(value)},
        oracle.data.describe(),
        dense,
    )


def _mean(pairs: Array) -> tuple[Array, Array]:
    """The mean over pairs (pairs, units) and its standard error."""
    values: Array = pairs.mean(0)
    errors: Array = pairs.std(0, ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else np.full(values.shape, math.nan)
    return values, errors


def _marginals(
    oracle: ModelOracle,
    units: Sequence[Unit],
    orders: Sequence[NDArray[np.int64]],
    of: str,
    dense: float,
    end: float,
    truncate: float,
) -> Array:
    """What each unit adds to the damage in each order (orders, units); all orders go one step at a time, together."""
    count = len(units)
    found = np.zeros((len(orders), count))
    gone = [frozenset[Unit]() for _ in orders]
    value = [dense] * len(orders)
    live = list(range(len(orders)))
    for step in range(count):
        last = step == count - 1  # then every unit is gone, and that was measured
        for number in live:
            gone[number] |= {units[orders[number][step]]}
        means = [end] * len(live) if last else oracle.losses([gone[number] for number in live], measure=of).mean()
        going = []
        for number, mean in zip(live, means, strict=True):
            now = float(mean) if math.isfinite(mean) else end
            found[number, orders[number][step]] = now - value[number]
            value[number] = now
            if not last and abs(end - now) <= truncate * abs(end - dense):
                rest = orders[number][step + 1 :]
                found[number, rest] = (end - now) / len(rest)
            else:
                going.append(number)
        live = going
        if not live:
            break
    return found


def banzhaf(
    oracle: ModelOracle, units: Sequence[Unit], *, of: str = "loss", subsets: int = 10, seed: int = 43
) -> Scores:
    """The mean damage of sub-networks that lack a unit, less that of sub-networks that have it.

    ``mean(v | u absent) - mean(v | u present)`` over random sub-networks with half of the units (chosen without
    replacement), ``subsets`` of them drawn anew for every calibration sequence; v is the measure ``of`` the sub-network
    on that sequence: the loss, or the distance of its logits from the dense model's. Standard errors by the jackknife
    over sequences. The estimator that A deeper look at depth pruning calls Shapley (10 subsets, seed 43; a negative
    seed is that of the data). Sub-networks whose measure is not finite are left out; a unit that is absent, or present,
    in no other must stay.
    Raises ``OptionError`` for fewer than two units, or no subsets.
    """
    count = len(units)
    if count < 2 or subsets < 1:
        raise OptionError(f"banzhaf needs at least two units and one subset, not {count} and {subsets}")
    sequences = oracle.sequences_of(of)
    oracle.note(f"banzhaf: {subsets} sub-networks for each of {sequences} sequences, the work of {subsets} evaluations")
    draw = _generator(oracle, seed)
    progress = oracle.progress("measuring random sub-networks")
    sums = np.zeros((sequences, 2, count))  # summed measure where the unit is present, and absent
    tokens = np.zeros((sequences, 2, count))
    for sequence in range(sequences):
        present = np.zeros((subsets, count), dtype=bool)
        for row in present:
            row[draw.choice(count, count // 2, replace=False)] = True
        gone = [frozenset(unit for unit, there in zip(units, row, strict=True) if not there) for row in present]
        measured: Losses = oracle.sample(gone, sequence, of)
        fine = np.isfinite(measured.nll[:, 0])
        for place, chosen in enumerate((present[fine], ~present[fine])):
            sums[sequence, place] = measured.nll[fine, 0] @ chosen
            tokens[sequence, place] = measured.tokens[0] * chosen.sum(0)
        if progress is not None:
            progress(sequence + 1, sequences)
    values = _gap(sums.sum(0), tokens.sum(0))
    errors: dict[Unit, float] = {}
    if sequences > 1:
        without = [_gap(sums.sum(0) - s, tokens.sum(0) - t) for s, t in zip(sums, tokens, strict=True)]
        jackknife = np.stack(without)
        spread = np.sqrt((sequences - 1) / sequences * ((jackknife - jackknife.mean(0)) ** 2).sum(0))
        errors = {unit: float(error) for unit, error in zip(units, spread, strict=True) if math.isfinite(error)}
    scores = {unit: float(v) if math.isfinite(v) else math.inf for unit, v in zip(units, values, strict=True)}
    return Scores("banzhaf", scores, errors, oracle.data.describe())


def _generator(oracle: ModelOracle, seed: int) -> np.random.Generator:
    """What draws under a seed: that of the data where it is negative."""
    return np.random.default_rng((oracle.data.seed if seed < 0 else seed) % (1 << 64))


def _gap(sums: Array, tokens: Array) -> Array:
    """The mean where a unit is absent less that where it is present (units,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / tokens
    gap: Array = means[1] - means[0]
    return gap
