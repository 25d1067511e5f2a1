"""Budgets on the loss: every selector drops as much as it allows, and says so where that is nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError
from depthprune.select.beam import beam
from depthprune.select.evolve import evolve
from depthprune.select.rank import Selection, contiguous, iterative, joint, lowest
from depthprune.select.search import greedy
from depthprune.units import Unit, parse
from fakes import FakeOracle, growing, sizes, sublayers, whole

PARTS, BLOCKS = sublayers(5), whole(8)
LIMITS = ["loss<=+20%", "loss<=+60%", "loss<=4.5", "loss<=1000"]
SELECTORS: list[Callable[..., Selection]] = [lowest, joint, iterative, greedy, beam, contiguous]


def oracle_for(seed: int, units: Sequence[Unit] = PARTS) -> FakeOracle:
    damage = growing(units, seed)
    oracle = FakeOracle(damage, sizes(units, seed))
    alone = {unit: oracle.mean([unit]) - oracle.mean([]) for unit in units}
    return FakeOracle(damage, oracle.ledger, scores=alone)


@pytest.mark.parametrize("text", LIMITS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("select", SELECTORS, ids=lambda select: select.__name__)
def test_the_loss_stays_within_and_one_more_would_break_it(
    select: Callable[..., Selection], text: str, seed: int
) -> None:
    oracle = oracle_for(seed)
    budget = Budget.parse(text, oracle.ledger)
    selection = select(oracle, PARTS, budget)
    limit = budget.limit(oracle.mean([]))
    assert selection.units and oracle.mean(selection.units) <= limit
    assert selection.dense == pytest.approx(oracle.mean([]))
    assert selection.steps[-1].loss == pytest.approx(oracle.mean(selection.units))
    assert selection.expected is not None and 0 < selection.evaluations <= selection.expected
    if text == "loss<=1000":
        assert set(selection.units) == set(PARTS)


@pytest.mark.parametrize("text", LIMITS)
@pytest.mark.parametrize("seed", range(5))
def test_where_each_stops(text: str, seed: int) -> None:
    oracle = oracle_for(seed)
    budget = Budget.parse(text, oracle.ledger)
    limit = budget.limit(oracle.mean([]))
    order = sorted(PARTS, key=lambda unit: oracle.scores()[unit])
    fitting = max(count for count in range(11) if oracle.mean(order[:count]) <= limit)
    for select in (lowest, joint, iterative):
        assert select(oracle, PARTS, budget).units == tuple(order[:fitting])
    gone: list[Unit] = []
    while len(gone) < len(PARTS):
        best = min((unit for unit in PARTS if unit not in gone), key=lambda unit: oracle.mean([*gone, unit]))
        if oracle.mean([*gone, best]) > limit:
            break
        gone.append(best)
    assert list(greedy(oracle, PARTS, budget).units) == gone
    assert list(greedy(oracle, PARTS, budget, exact=True, race=2).units) == gone
    most = beam(oracle, PARTS, budget, width=10**6, expand=0).units
    assert oracle.ledger.freed(frozenset(most)) >= oracle.ledger.freed(frozenset(gone))


@pytest.mark.parametrize("text", LIMITS)
@pytest.mark.parametrize("seed", range(5))
def test_contiguous_finds_the_longest_run(text: str, seed: int) -> None:
    oracle = oracle_for(seed, BLOCKS)
    budget = Budget.parse(text, oracle.ledger)
    limit = budget.limit(oracle.mean([]))
    runs = [BLOCKS[first:stop] for first in range(8) for stop in range(first + 1, 9)]
    fitting = [run for run in runs if oracle.mean(run) <= limit]
    longest = max(map(len, fitting))
    selection = contiguous(oracle, BLOCKS, budget)
    assert selection.units == min((run for run in fitting if len(run) == longest), key=oracle.mean)
    ends = [run for run in fitting if run[-1] == BLOCKS[6]]
    if ends:
        last = contiguous(oracle, BLOCKS, budget, rule="last")
        assert last.units == max(ends, key=len) and last.expected is not None
        assert last.evaluations <= last.expected and last.steps[0].score is None


@pytest.mark.parametrize("select", SELECTORS, ids=lambda select: select.__name__)
def test_a_loss_that_the_first_removal_breaks_is_refused_with_both_numbers(select: Callable[..., Selection]) -> None:
    units = parse(["0.self_attn", "0.mlp", "1.self_attn", "1.mlp"])
    oracle = FakeOracle(lambda gone: np.full(2, 2.0 + 0.5 * len(gone)), sizes(units), scores=dict.fromkeys(units, 0.5))
    with pytest.raises(BudgetError) as caught:
        select(oracle, units, Budget.parse("loss<=+10%", oracle.ledger))
    assert str(caught.value) == (
        "--drop 'loss<=+10%' cannot be met: it allows a loss of 2.2000, the dense model has 2.0000, "
        "and dropping 0.self_attn leaves 2.5000"
    )
    assert len(select(oracle, units, Budget.parse("loss<=+30%", oracle.ledger)).units) == 1  # the twin


@pytest.mark.parametrize("select", SELECTORS, ids=lambda select: select.__name__)
def test_a_share_of_no_loss_is_refused(select: Callable[..., Selection]) -> None:
    oracle = FakeOracle(lambda gone: np.full(2, 0.5 * len(gone)), sizes(PARTS), scores=dict.fromkeys(PARTS, 0.5))
    with pytest.raises(BudgetError, match="share of the dense model's loss, which is 0 under this metric"):
        select(oracle, PARTS, Budget.parse("loss<=+10%", oracle.ledger))
    assert len(select(oracle, PARTS, Budget.parse("loss<=1.2", oracle.ledger)).units) == 2


def test_evolve_refuses() -> None:
    oracle = oracle_for(0)
    with pytest.raises(BudgetError, match="evolve compares plans that free the same, so it needs a budget on the size"):
        evolve(oracle, PARTS, Budget.parse("loss<=+10%", oracle.ledger))
    assert oracle.asked == []
