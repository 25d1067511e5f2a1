"""Greedy against a naive greedy: the same choices, and how many thinned models it took to make them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError, OptionError
from depthprune.scores import Array
from depthprune.select.rank import Selection
from depthprune.select.search import greedy
from depthprune.units import Unit, parse
from fakes import Damage, FakeLedger, FakeOracle, anything, growing, shrinking, sizes, sublayers, whole

PARTS = sublayers(6)
DAMAGES: dict[str, Callable[[int], Damage]] = {
    "anything": anything,
    "growing": lambda seed: growing(PARTS, seed),
    "shrinking": lambda seed: shrinking(PARTS, seed),
    "growing, with ties": lambda seed: growing(PARTS, seed, whole_numbers=True),
}
BUDGETS = ["15%", "60%", "4 units", "params<=70%", "kv<=40%", "kv<=15"]


def naive_greedy(oracle: FakeOracle, candidates: Sequence[Unit], budget: Budget) -> tuple[list[Unit], int]:
    """Try every candidate at every step; the first of the best goes. Also says how many sets that measures."""
    gone: list[Unit] = []
    measured = 1  # the dense model
    while not budget.met(oracle.ledger, gone):
        left = [unit for unit in candidates if unit not in gone]
        losses = [oracle.mean([*gone, unit]) for unit in left]
        gone.append(left[losses.index(min(losses))])
        measured += len(left)
    return gone, measured


def run(
    damage: Damage, text: str = "6 units", *, seed: int = 0, exact: bool = False, refresh: int = 2
) -> tuple[Selection, FakeOracle, Budget]:
    oracle = FakeOracle(damage, sizes(PARTS, seed))
    budget = Budget.parse(text, oracle.ledger)
    able = budget.candidates(oracle.ledger, PARTS)
    return greedy(oracle, able, budget, exact=exact, refresh=refresh), oracle, budget


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_exact_greedy_is_a_naive_greedy(kind: str, text: str, seed: int) -> None:
    selection, oracle, budget = run(DAMAGES[kind](seed), text, seed=seed, exact=True)
    able = budget.candidates(oracle.ledger, PARTS)
    expected, measured = naive_greedy(oracle, able, budget)
    assert list(selection.units) == expected
    assert selection.evaluations == len(set(oracle.asked)) == measured
    assert budget.met(oracle.ledger, selection.units) and not budget.met(oracle.ledger, selection.units[:-1])
    for count, step in enumerate(selection.steps, start=1):
        assert step.loss == pytest.approx(oracle.mean(expected[:count]), abs=1e-12)
    assert selection.dense == pytest.approx(oracle.mean([]), abs=1e-12)
    assert selection.nested and selection.steps[0].score is None


@pytest.mark.parametrize("kind", ["growing", "growing, with ties"])
@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("refresh", [1, 2, 5])
def test_lazy_greedy_chooses_the_same_where_damage_only_grows(kind: str, text: str, refresh: int) -> None:
    for seed in range(6):
        lazy, oracle, budget = run(DAMAGES[kind](seed), text, seed=seed, refresh=refresh)
        expected, measured = naive_greedy(oracle, budget.candidates(oracle.ledger, PARTS), budget)
        assert list(lazy.units) == expected
        assert lazy.evaluations <= measured


def test_lazy_greedy_measures_fewer() -> None:
    pairs = [
        (run(growing(PARTS, seed), "8 units")[0], run(growing(PARTS, seed), "8 units", exact=True)[0])
        for seed in range(10)
    ]
    assert all(lazy.units == exact.units and lazy.evaluations < exact.evaluations for lazy, exact in pairs)
    assert sum(lazy.evaluations for lazy, _ in pairs) < 0.7 * sum(exact.evaluations for _, exact in pairs)


@pytest.mark.parametrize("kind", DAMAGES)
def test_lazy_greedy_never_measures_more_nor_anything_twice(kind: str) -> None:
    for seed, refresh in itertools.product(range(5), (1, 2, 3, 100)):
        lazy, oracle, _ = run(DAMAGES[kind](seed), "9 units", refresh=refresh)
        assert lazy.evaluations <= run(DAMAGES[kind](seed), "9 units", exact=True)[0].evaluations
        steps = [units for units in oracle.asked if units != frozenset(lazy.units[: len(units)])]
        assert len(steps) == len(set(steps))


def test_where_damage_falls_the_two_may_differ() -> None:
    """The twin: a comparison that could not see a wrong choice would find these equal too."""
    pairs = [(run(shrinking(PARTS, seed))[0], run(shrinking(PARTS, seed), exact=True)[0]) for seed in range(10)]
    assert any(lazy.units != exact.units for lazy, exact in pairs)
    everything = [run(shrinking(PARTS, seed), refresh=len(PARTS))[0] for seed in range(10)]
    assert [lazy.units for lazy in everything] == [exact.units for _, exact in pairs]


def test_protected_units_stay_and_are_not_even_measured() -> None:
    oracle = FakeOracle(growing(PARTS, 0), sizes(PARTS))
    best = greedy(oracle, PARTS, Budget.parse("4 units", oracle.ledger)).units
    left = tuple(unit for unit in PARTS if unit not in best)
    oracle = FakeOracle(growing(PARTS, 0), sizes(PARTS))
    chosen = greedy(oracle, left, Budget.parse("4 units", oracle.ledger)).units
    assert set(chosen) <= set(left) and not set(best) & frozenset().union(*oracle.asked)


def test_a_kv_budget_is_met_by_attention_alone() -> None:
    selection, _, _ = run(growing(PARTS, 0), "kv<=30%")
    assert {unit.sublayer for unit in selection.units} == {"self_attn"}


def test_a_budget_that_is_met_already_drops_nothing() -> None:
    oracle = FakeOracle(anything(0), sizes(PARTS))
    selection = greedy(oracle, PARTS, Budget("nothing", "count", 0))
    assert selection.units == () and selection.evaluations == 1 and selection.dense is not None


def test_only_new_sets_count_as_evaluations() -> None:
    oracle = FakeOracle(growing(PARTS, 0), sizes(PARTS))
    budget = Budget.parse("3 units", oracle.ledger)
    first = greedy(oracle, PARTS, budget)
    second = greedy(oracle, PARTS, budget)
    assert second.units == first.units and first.evaluations > 0 and second.evaluations == 0


@pytest.mark.parametrize("refresh", [0, -1])
def test_refresh_must_refresh_something(refresh: int) -> None:
    with pytest.raises(OptionError, match=f"greedy:refresh must be at least 1, not {refresh}"):
        run(anything(0), refresh=refresh)


def test_a_unit_whose_loss_is_infinite_stays() -> None:
    """A model may overflow without one of its units: that unit stays."""
    usual = growing(PARTS, 0)

    def damage(gone: frozenset[Unit]) -> Array:
        return np.array([math.inf, 1.0]) if PARTS[0] in gone else usual(gone)

    for exact in (False, True):
        oracle = FakeOracle(damage, sizes(PARTS))
        chosen = greedy(oracle, PARTS, Budget.parse("11 units", oracle.ledger), exact=exact)
        assert set(chosen.units) == set(PARTS[1:])
        with pytest.raises(BudgetError) as caught:
            greedy(oracle, PARTS, Budget.parse("12 units", oracle.ledger), exact=exact)
        assert "asks for 12 units, but only 11 can go: 1 units must stay" in str(caught.value)


def test_each_step_is_told() -> None:
    selection, oracle, _ = run(growing(PARTS, 1), "3 units")
    dense = oracle.mean([])
    assert oracle.notes == ["greedy: 12 variants first, at most 34 in all"] + [
        f"{count}. {step.unit}: loss {step.loss:.4f} (dense {dense:.4f})"
        for count, step in enumerate(selection.steps, start=1)
    ]


# Ties. Three blocks; the loss of each sequence without one of them is written down.

BLOCKS = whole(3)
LEDGER = FakeLedger(dict.fromkeys(BLOCKS, 1))


def one_step(rows: dict[str, list[float]], *, tokens: list[float] | None = None) -> Selection:
    table = {frozenset(parse([name])): np.array(row) for name, row in rows.items()}
    table[frozenset()] = np.zeros(len(rows["0"]))
    oracle = FakeOracle(table.__getitem__, LEDGER, tokens=tokens or [8.0] * len(rows["0"]))
    return greedy(oracle, BLOCKS, Budget.parse("1 block", LEDGER))


def test_a_runner_up_within_the_paired_noise_is_a_tie() -> None:
    # Without 1 the mean is 0.01 higher than without 0, and the differences scatter by far more.
    selection = one_step({"0": [1, 2, 3, 4], "1": [1.4, 1.64, 3.4, 3.6], "2": [9, 9, 9, 9]})
    assert selection.units == parse(["0"]) and selection.steps[0].ties == parse(["1"])


def test_a_runner_up_that_is_always_a_little_worse_is_none() -> None:
    """The same gap, and the sequences differ as much from one another: but pair by pair it is the same each time."""
    selection = one_step({"0": [1, 2, 3, 4], "1": [1.01, 2.01, 3.01, 4.01], "2": [9, 9, 9, 9]})
    assert selection.units == parse(["0"]) and selection.steps[0].ties == ()


def test_the_border_is_one_standard_error() -> None:
    # Differences 0 and 1 over two rows of one length: mean 0.5, standard error 0.5. A shift decides.
    for shift, ties in ((-0.01, ("1",)), (0.01, ())):
        selection = one_step({"0": [1, 2], "1": [1 + shift, 3 + shift], "2": [9, 9]})
        assert selection.units == parse(["0"]) and selection.steps[0].ties == parse(ties)


def test_long_sequences_weigh_more() -> None:
    # The gap comes from the short row alone: one row of 1 token against one of 99.
    noisy = one_step({"0": [1, 2], "1": [1, 2.5], "2": [9, 9]}, tokens=[99, 1])
    assert noisy.steps[0].ties == parse(["1"])
    assert one_step({"0": [1, 2], "1": [1.5, 2], "2": [9, 9]}, tokens=[99, 1]).units == parse(["0"])


def test_equal_units_tie_and_the_first_goes() -> None:
    selection = one_step({"0": [3, 3], "1": [2, 2], "2": [2, 2]})
    assert selection.units == parse(["1"]) and selection.steps[0].ties == parse(["2"])


def test_one_sequence_tells_no_ties() -> None:
    selection = one_step({"0": [2], "1": [2.000001], "2": [3]})
    assert selection.steps[0].ties == () and "se" not in selection.steps[0].to_json()


def test_the_error_of_a_step_is_that_of_its_rise() -> None:
    losses: dict[str, list[float]] = {"0": [1, 2, 4], "1": [9, 9, 9], "2": [9, 9, 9]}
    step = one_step(losses).steps[0]
    assert step.error == pytest.approx(np.std(losses["0"], ddof=1) / math.sqrt(3))


def naive_by_budget(oracle: FakeOracle, candidates: Sequence[Unit], budget: Budget) -> list[Unit]:
    """Try every candidate at every step; damage counts for each parameter (or byte) of what is still needed."""
    gone: list[Unit] = []
    while not budget.met(oracle.ledger, gone):
        need = budget.amount - budget.spent(oracle.ledger, frozenset(gone))

        def worth(unit: Unit, need: float = need) -> float:
            damage = oracle.mean([*gone, unit]) - oracle.mean(gone)
            return damage / min(budget.spent(oracle.ledger, frozenset((unit,))), need) if damage > 0 else damage

        gone.append(min((unit for unit in candidates if unit not in gone), key=worth))
    return gone


@pytest.mark.parametrize("kind", ["anything", "growing", "shrinking"])
@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_by_what_the_budget_still_needs_is_the_naive_one(kind: str, text: str, seed: int) -> None:
    oracle = FakeOracle(DAMAGES[kind](seed), sizes(PARTS, seed))
    budget = Budget.parse(text, oracle.ledger)
    able = budget.candidates(oracle.ledger, PARTS)
    selection = greedy(oracle, able, budget, exact=True, per="budget")
    assert list(selection.units) == naive_by_budget(oracle, able, budget)
    assert selection.nested == (budget.measure == "count")
    if kind == "growing":  # then the lazy one is exact, and measures fewer
        lazy = greedy(FakeOracle(oracle.damage, oracle.ledger), able, budget, per="budget")
        assert lazy.units == selection.units and lazy.evaluations <= selection.evaluations


def test_what_is_more_than_the_budget_asks_for_is_worth_nothing() -> None:
    units = parse(["0.self_attn", "1.mlp"])
    ledger = FakeLedger(dict(zip(units, (10, 90), strict=True)))

    def damage(gone: frozenset[Unit]) -> Array:
        return np.full(2, 1 + 0.2 * (units[0] in gone) + 0.9 * (units[1] in gone))

    budget = Budget.parse("10%", ledger)
    assert greedy(FakeOracle(damage, ledger), units, budget, per="parameters").units == (units[1],)
    assert greedy(FakeOracle(damage, ledger), units, budget, per="budget").units == (units[0],)
    with pytest.raises(OptionError, match="greedy:per is one of none, parameters, kv, time, budget, not 'banana'"):
        greedy(FakeOracle(damage, ledger), units, budget, per="banana")
