"""Selectors that only rank, against brute force over every choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError, OptionError
from depthprune.select.rank import Selection, Step, contiguous, iterative, joint, lowest
from depthprune.select.search import greedy
from depthprune.units import Unit, parse
from fakes import FakeLedger, FakeOracle, anything, sizes, sublayers, whole

BLOCKS, PARTS = whole(7), sublayers(5)
BUDGETS = ["20%", "55%", "3 units", "params<=70%", "kv<=60%", "kv<=15"]


def scored(units: tuple[Unit, ...], seed: int, *, ties: bool = False) -> FakeOracle:
    draw = np.random.default_rng(seed).uniform(-1, 1, len(units))
    values = np.round(draw) if ties else draw
    return FakeOracle(anything(seed), sizes(units, seed), scores=dict(zip(units, values.tolist(), strict=True)))


def assert_minimal(selection: Selection, oracle: FakeOracle, budget: Budget) -> None:
    """The budget is met, and was not met before the last removal."""
    assert budget.met(oracle.ledger, selection.units)
    assert not budget.met(oracle.ledger, selection.units[:-1])


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("units", [BLOCKS, PARTS], ids=["blocks", "sublayers"])
@pytest.mark.parametrize("seed", range(4))
def test_lowest_drops_the_lowest_scores_until_the_budget_is_met(text: str, units: tuple[Unit, ...], seed: int) -> None:
    oracle = scored(units, seed)
    budget = Budget.parse(text, oracle.ledger)
    able = budget.candidates(oracle.ledger, units)
    selection = lowest(oracle, able, budget)
    scores = oracle.scores()
    # Of all sets of that size, none has a lower sum; and no smaller set of the lowest is enough.
    best = min(itertools.combinations(able, len(selection.units)), key=lambda some: sum(scores[unit] for unit in some))
    assert set(selection.units) == set(best)
    assert [step.score for step in selection.steps] == sorted(scores[unit] for unit in best)
    assert_minimal(selection, oracle, budget)
    assert selection.nested and selection.evaluations == selection.expected == 0 and oracle.asked == []
    assert oracle.notes == ["lowest: 0 evaluations besides those of the scores"]


def test_lowest_breaks_ties_in_the_order_of_execution() -> None:
    oracle = scored(PARTS, 0, ties=True)
    scores = oracle.scores()
    selection = lowest(oracle, PARTS, Budget.parse("7 units", oracle.ledger))
    expected: list[Unit] = []
    for value in sorted(set(scores.values())):
        expected += [unit for unit in PARTS if scores[unit] == value]
    assert len(set(scores.values())) <= 3 and selection.units == tuple(expected[:7])


def test_lowest_is_nested() -> None:
    oracle = scored(PARTS, 3)
    choices = [lowest(oracle, PARTS, Budget.parse(f"{count} units", oracle.ledger)).units for count in range(1, 9)]
    assert all(longer[: len(shorter)] == shorter for shorter, longer in itertools.pairwise(choices))


def test_units_that_are_no_candidates_are_never_chosen() -> None:
    oracle = scored(PARTS, 1)
    protected = sorted(PARTS, key=lambda unit: oracle.scores()[unit])[:3]  # those it would like best
    left = tuple(unit for unit in PARTS if unit not in protected)
    for selector in (lowest, contiguous):
        assert not set(protected) & set(selector(oracle, left, Budget.parse("30%", oracle.ledger)).units)


def naive_runs(units: tuple[Unit, ...], enough: Callable[[tuple[Unit, ...]], bool]) -> list[tuple[Unit, ...]]:
    """Every run of neighbours that is enough, and is not enough without its last unit."""
    runs = [units[i:j] for i, j in itertools.combinations(range(len(units) + 1), 2)]
    near = [run for run in runs if all(b.block - a.block in (0, 1) for a, b in itertools.pairwise(run))]
    return [run for run in near if enough(run) and not enough(run[:-1])]


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("units", [BLOCKS, PARTS], ids=["blocks", "sublayers"])
@pytest.mark.parametrize("seed", range(4))
def test_contiguous_drops_the_best_run(text: str, units: tuple[Unit, ...], seed: int) -> None:
    oracle = scored(units, seed)
    budget = Budget.parse(text, oracle.ledger)
    able = budget.candidates(oracle.ledger, units)
    runs = naive_runs(able, lambda run: budget.met(oracle.ledger, run))
    best = min(runs, key=oracle.mean)
    selection = contiguous(oracle, able, budget)
    assert selection.units == best
    rise = oracle.mean(best) - oracle.mean([])
    assert all(step.score == pytest.approx(rise, abs=1e-12) for step in selection.steps)
    assert_minimal(selection, oracle, budget)
    assert not selection.nested and selection.evaluations == selection.expected == len(runs) + 1
    assert set(oracle.asked) == {frozenset(), *(frozenset(run) for run in runs)}
    assert oracle.notes == [f"contiguous: {len(runs)} windows, at most {len(runs) + 1} evaluations"]


def test_contiguous_goes_around_protected_blocks() -> None:
    for protected in BLOCKS:
        left = tuple(unit for unit in BLOCKS if unit != protected)
        for seed in range(5):
            oracle = scored(BLOCKS, seed)
            chosen = [unit.block for unit in contiguous(oracle, left, Budget.parse("2 blocks", oracle.ledger)).units]
            assert chosen[1] == chosen[0] + 1 and protected.block not in chosen


def test_contiguous_takes_the_first_of_equals() -> None:
    oracle = FakeOracle(lambda gone: np.ones(2), sizes(BLOCKS))
    assert contiguous(oracle, BLOCKS, Budget.parse("2 blocks", oracle.ledger)).units == BLOCKS[:2]


def test_contiguous_says_when_no_run_is_long_enough() -> None:
    oracle = scored(BLOCKS, 0)
    left = parse(["0", "1", "3", "4", "6"])
    assert len(contiguous(oracle, left, Budget.parse("2 blocks", oracle.ledger)).units) == 2
    with pytest.raises(BudgetError) as caught:
        contiguous(oracle, left, Budget.parse("3 blocks", oracle.ledger))
    assert str(caught.value).startswith("no run of consecutive units meets --drop '3 blocks'; protect fewer units")


def test_steps_as_json_leave_out_what_is_not_known() -> None:
    unit, other = parse(["1.mlp", "2"])
    assert Step(unit).to_json() == {"unit": "1.mlp"}
    assert Step(unit, score=0.5).to_json() == {"unit": "1.mlp", "score": 0.5}
    assert Step(unit, 2.5, 0.1, (other,)).to_json() == {"unit": "1.mlp", "loss": 2.5, "se": 0.1, "ties": ["2"]}
    assert Step(unit, 0.0, 0.0).to_json() == {"unit": "1.mlp", "loss": 0.0, "se": 0.0}
    assert Step(unit, 2.5, math.nan).to_json() == {"unit": "1.mlp", "loss": 2.5}  # JSON has no NaN
    assert Step(unit, math.inf, math.nan, score=math.inf).to_json() == {"unit": "1.mlp"}


def test_the_last_of_the_vital_units_stays() -> None:
    units = sublayers(3)
    ledger = FakeLedger(dict.fromkeys(units, 10), vital=frozenset(parse(["0.self_attn", "1.self_attn", "2.self_attn"])))
    cheap = {unit: 0.0 if unit.sublayer == "self_attn" else 1.0 for unit in units}
    oracle = FakeOracle(lambda gone: np.array([sum(cheap[unit] for unit in gone)] * 2), ledger, scores=cheap)
    for select in (lowest, greedy):
        chosen = select(oracle, units, Budget.parse("50%", ledger)).units
        assert sum(unit.sublayer == "self_attn" for unit in chosen) == 2 and len(chosen) == 3
        with pytest.raises(BudgetError, match="every attention"):
            select(oracle, units, Budget.parse("95%", ledger))
    free = FakeLedger(dict.fromkeys(units, 10))  # the twin: nothing vital, so all attentions may go
    chosen = lowest(FakeOracle(oracle.damage, free, scores=cheap), units, Budget.parse("50%", free)).units
    assert sum(unit.sublayer == "self_attn" for unit in chosen) == 3


def test_an_infinite_score_is_never_dropped() -> None:
    oracle = scored(PARTS, 0)
    must = PARTS[2:5]
    values = {unit: math.inf if unit in must else value for unit, value in oracle.scores().items()}
    for select in (lowest, joint, iterative):
        strict = FakeOracle(oracle.damage, oracle.ledger, scores=values)
        chosen = select(strict, PARTS, Budget.parse("7 units", oracle.ledger)).units
        assert set(chosen) == set(PARTS) - set(must)
        with pytest.raises(BudgetError) as caught:
            select(strict, PARTS, Budget.parse("8 units", oracle.ledger))
        assert str(caught.value).startswith("--drop '8 units' asks for 8 units, but only 7 can go: 3 units must stay")
        # The twin: with the scores as they were, one of them goes.
        assert set(select(oracle, PARTS, Budget.parse("8 units", oracle.ledger)).units) & set(must)


class SumOfScores(FakeOracle):
    """Windows by the sum of their scores, as under any metric that is no loss."""

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> Sequence[float]:
        scores = self.scores()
        return [sum(scores[unit] for unit in window) for window in windows]


def test_a_run_that_holds_an_infinite_score_is_never_dropped() -> None:
    for must in BLOCKS[1:6]:
        values = {unit: math.inf if unit == must else 1.0 for unit in BLOCKS}
        oracle = SumOfScores(anything(0), sizes(BLOCKS), scores=values)
        for text in ("3 blocks", "loss<=9"):  # this loss allows everything
            chosen = contiguous(oracle, BLOCKS, Budget.parse(text, oracle.ledger)).units
            assert must not in chosen and len(chosen) == (3 if text == "3 blocks" else max(must.block, 6 - must.block))
    strict = SumOfScores(anything(0), sizes(BLOCKS), scores=dict.fromkeys(BLOCKS, math.inf))
    with pytest.raises(BudgetError, match="each of the 6 runs that are long enough holds a unit that must stay"):
        contiguous(strict, BLOCKS, Budget.parse("2 blocks", strict.ledger))


def test_joint_ranks_attention_and_mlp_together() -> None:
    for seed in range(5):
        oracle = scored(PARTS, seed)
        budget = Budget.parse("45%", oracle.ledger)
        expected = sorted(PARTS, key=lambda unit: oracle.scores()[unit])
        chosen = joint(oracle, PARTS, budget)
        assert list(chosen.units) == expected[: len(chosen.units)] and chosen.evaluations == chosen.expected == 0
        assert_minimal(chosen, oracle, budget)


def test_joint_refuses_whole_blocks() -> None:
    oracle = scored(BLOCKS, 0)
    with pytest.raises(OptionError, match="0 is a whole block; use --unit any, or --select lowest"):
        joint(oracle, BLOCKS, Budget.parse("2 blocks", oracle.ledger))
    with pytest.raises(OptionError, match="2 is a whole block"):
        joint(oracle, [*PARTS[:4], BLOCKS[2]], Budget.parse("2 units", oracle.ledger))


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_iterative_scores_again_after_each_removal(text: str, seed: int) -> None:
    damage = anything(seed)

    def values(gone: frozenset[Unit]) -> dict[Unit, float]:
        return {unit: float(damage(gone | {unit})[0]) for unit in PARTS}

    oracle = FakeOracle(damage, sizes(PARTS, seed), scores=values)
    budget = Budget.parse(text, oracle.ledger)
    able = budget.candidates(oracle.ledger, PARTS)
    expected: list[Unit] = []
    while not budget.met(oracle.ledger, expected):
        left = [unit for unit in able if unit not in expected]
        expected.append(min(left, key=lambda unit: values(frozenset(expected))[unit]))
    selection = iterative(oracle, able, budget)
    assert selection.units == tuple(expected) and selection.nested
    assert oracle.scored == [frozenset(expected[:count]) for count in range(len(expected))]
    assert selection.evaluations == selection.expected == 0
    most = budget.most(oracle.ledger, able)
    assert oracle.notes == [f"iterative: scores at most {most} times, 0 evaluations besides those of the scores"]
    assert len(oracle.scored) <= most
    if text == "55%":  # the twin: scoring once chooses others
        assert selection.units != lowest(oracle, able, budget).units


def test_the_last_run_leaves_out_the_final_block_and_needs_no_score() -> None:
    oracle = scored(BLOCKS, 0)
    selection = contiguous(oracle, BLOCKS, Budget.parse("3 blocks", oracle.ledger), rule="last")
    assert selection.units == parse(["3", "4", "5"])
    assert oracle.asked == [] and oracle.scored == [] and selection.evaluations == selection.expected == 0
    assert not selection.nested and selection.steps[0].to_json() == {"unit": "3"}
    assert contiguous(oracle, BLOCKS[:5], Budget.parse("3 blocks", oracle.ledger), rule="last").units == BLOCKS[2:5]
    around = [unit for unit in BLOCKS if unit.block != 4]  # 5 is alone between a protected block and the final one
    assert contiguous(oracle, around, Budget.parse("2 blocks", oracle.ledger), rule="last").units == BLOCKS[2:4]
    with pytest.raises(BudgetError, match="no run of consecutive units"):
        contiguous(oracle, BLOCKS, Budget.parse("7 blocks", oracle.ledger), rule="last")
    parts = scored(PARTS, 0)
    assert contiguous(parts, PARTS, Budget.parse("3 units", parts.ledger), rule="last").units == PARTS[5:8]


@pytest.mark.parametrize("selector", [lowest, joint, iterative])
def test_a_wrong_price_is_refused(selector: Callable[..., Selection]) -> None:
    oracle = scored(PARTS, 0)
    with pytest.raises(OptionError) as caught:
        selector(oracle, PARTS, Budget.parse("2 units", oracle.ledger), per="joule")
    assert str(caught.value) == f"{selector.__name__}:per is one of none, parameters, kv, time, not 'joule'"
    with pytest.raises(OptionError, match="contiguous:rule is one of distance, last, not 'first'"):
        contiguous(oracle, PARTS, Budget.parse("2 units", oracle.ledger), rule="first")
