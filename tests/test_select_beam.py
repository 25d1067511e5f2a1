"""Beam search against brute force over every set, and against greedy where it is one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError, OptionError
from depthprune.scores import Array
from depthprune.select.beam import beam
from depthprune.select.search import greedy
from depthprune.units import Unit, parse
from fakes import Damage, FakeLedger, FakeOracle, anything, growing, shrinking, sizes, sublayers, whole

PARTS = sublayers(4)
DAMAGES: dict[str, Callable[[int], Damage]] = {
    "anything": anything,
    "growing": lambda seed: growing(PARTS, seed),
    "shrinking": lambda seed: shrinking(PARTS, seed),
    "growing, with ties": lambda seed: growing(PARTS, seed, whole_numbers=True),
}
BUDGETS = ["30%", "60%", "4 units", "params<=70%", "kv<=40%", "kv<=15"]


def at(damage: Damage, text: str, seed: int = 0) -> tuple[FakeOracle, Sequence[Unit], Budget]:
    oracle = FakeOracle(damage, sizes(PARTS, seed))
    budget = Budget.parse(text, oracle.ledger)
    return oracle, budget.candidates(oracle.ledger, PARTS), budget


def every_set(units: Sequence[Unit]) -> Iterator[tuple[Unit, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(units, count) for count in range(len(units) + 1))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_can_be_finds_the_best_of_all_sets(kind: str, text: str, seed: int) -> None:
    oracle, able, budget = at(DAMAGES[kind](seed), text, seed)

    def last_was_needed(units: tuple[Unit, ...]) -> bool:
        return any(not budget.met(oracle.ledger, set(units) - {unit}) for unit in units)

    fitting = [some for some in every_set(able) if budget.met(oracle.ledger, some) and last_was_needed(some)]
    selection = beam(oracle, able, budget, width=10**6, expand=0)
    assert oracle.mean(selection.units) == pytest.approx(min(map(oracle.mean, fitting)), abs=1e-12)
    assert budget.met(oracle.ledger, selection.units)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("text", [*BUDGETS, "loss<=+150%"])
@pytest.mark.parametrize(("width", "expand"), [(1, 0), (1, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_to_its_forecast_and_measures_nothing_twice(
    kind: str, text: str, width: int, expand: int, seed: int
) -> None:
    oracle, able, budget = at(DAMAGES[kind](seed), text, seed)
    selection = beam(oracle, able, budget, width=width, expand=expand)
    assert selection.expected is not None and selection.evaluations == len(set(oracle.asked)) <= selection.expected
    assert oracle.notes[0] == f"beam: {len(able)} variants first, at most {selection.expected} in all"
    prefixes = [selection.units[:count] for count in range(len(selection.units) + 1)]
    steps = [gone for gone in oracle.asked if gone in set(map(frozenset, prefixes))]
    others = oracle.asked[: len(set(oracle.asked))]  # the search itself; after it the steps are looked up once more
    assert len(set(others)) == len(others) and len(steps) >= len(prefixes)
    for prefix, step in zip(prefixes[1:], selection.steps, strict=True):
        assert step.loss == pytest.approx(oracle.mean(prefix)) and step.error is not None
    if not text.startswith("loss"):
        assert budget.met(oracle.ledger, prefixes[-1]) and not budget.met(oracle.ledger, prefixes[-2])


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_beam_of_one_is_greedy(kind: str, count: int) -> None:
    for seed in range(5):
        oracle, able, budget = at(DAMAGES[kind](seed), f"{count} units", seed)
        one, exact = beam(oracle, able, budget, width=1, expand=0), greedy(oracle, able, budget, exact=True)
        assert one.units == exact.units and one.nested
        assert one.evaluations <= exact.expected  # type: ignore[operator]


def test_wider_is_no_worse_in_the_mean_and_often_better() -> None:
    losses = np.array(
        [
            [oracle.mean(beam(oracle, able, budget, width=width, expand=0).units) for width in (1, 3, 1000)]
            for oracle, able, budget in (at(anything(seed), "4 units") for seed in range(20))
        ]
    )
    assert losses[:, 2].mean() < losses[:, 1].mean() < losses[:, 0].mean()
    assert (losses[:, 2] <= losses.min(1)).all()


@pytest.mark.parametrize("seed", range(10))
def test_nested_is_what_it_says(seed: int) -> None:
    """Where it says nested, every prefix is what it chooses for that count; and for some it does not say so."""
    oracle, able, budget = at(anything(seed), "5 units")
    selection = beam(oracle, able, budget)
    smaller = [beam(oracle, able, Budget.parse(f"{n} units", oracle.ledger)).units for n in range(1, 5)]
    same = all(set(units) == set(selection.units[: len(units)]) for units in smaller)
    assert selection.nested == same
    assert not beam(*at(anything(seed), "60%")).nested


def test_nested_and_not_nested_both_happen() -> None:
    assert {beam(*at(anything(seed), "5 units")).nested for seed in range(10)} == {True, False} or {
        beam(*at(DAMAGES["growing"](seed), "5 units")).nested for seed in range(10)
    } == {True, False}


def test_a_small_unit_does_not_compete_with_a_large_one() -> None:
    """The large unit does more damage at once but frees all that is needed: a level by counts would lose it."""
    units = whole(5)
    ledger = FakeLedger({units[0]: 40, **dict.fromkeys(units[1:], 15)})
    small, large = 1.0, 2.5

    def damage(gone: frozenset[Unit]) -> Array:
        return np.full(2, sum(large if unit == units[0] else small for unit in gone) + 1.0)

    oracle = FakeOracle(damage, ledger)
    assert beam(oracle, units, Budget.parse("40%", ledger), width=1, expand=0).units == units[:1]
    assert len(greedy(oracle, units, Budget.parse("40%", ledger)).units) == 3  # the twin


def test_the_loss_budget_frees_the_most_that_it_can() -> None:
    for seed in range(5):
        oracle, able, budget = at(growing(PARTS, seed), "loss<=+70%")
        limit = budget.limit(oracle.mean([]))
        best = max(oracle.ledger.freed(frozenset(some)) for some in every_set(able) if oracle.mean(some) <= limit)
        chosen = beam(oracle, able, budget, width=1000, expand=0)
        assert oracle.ledger.freed(frozenset(chosen.units)) == best and not chosen.nested
        assert oracle.mean(chosen.units) <= limit


def test_an_infinite_loss_is_never_chosen() -> None:
    usual = growing(PARTS, 0)

    def damage(gone: frozenset[Unit]) -> Array:
        return np.array([np.inf, 1.0]) if PARTS[0] in gone else usual(gone)

    oracle, able, budget = at(damage, "7 units")
    assert set(beam(oracle, able, budget).units) == set(PARTS[1:])
    with pytest.raises(BudgetError, match="asks for 8 units, but only 7 can go: 1 units must stay"):
        beam(oracle, able, Budget.parse("8 units", oracle.ledger))
    oracle, able, budget = at(lambda gone: np.full(2, math.inf if gone else 1.0), "1 unit")
    with pytest.raises(BudgetError, match="only 0 can go: 8 units must stay"):
        beam(oracle, able, budget)


def test_the_last_of_the_vital_units_stays() -> None:
    attention = frozenset(unit for unit in PARTS if unit.sublayer == "self_attn")
    ledger = FakeLedger(dict.fromkeys(PARTS, 10), vital=attention)
    oracle = FakeOracle(growing(PARTS, 0), ledger)
    assert not attention <= set(beam(oracle, PARTS, Budget.parse("7 units", ledger)).units)
    with pytest.raises(BudgetError, match="every attention"):
        beam(oracle, PARTS, Budget.parse("8 units", ledger))


def test_ties_are_told() -> None:
    rows = {"0": [1, 2, 3, 4], "1": [1.4, 1.64, 3.4, 3.6], "2": [9, 9, 9, 9]}
    table = {frozenset(parse([name])): np.array(row, dtype=float) for name, row in rows.items()}
    table[frozenset()] = np.zeros(4)
    oracle = FakeOracle(table.__getitem__, FakeLedger(dict.fromkeys(whole(3), 1)), tokens=[8.0] * 4)
    selection = beam(oracle, whole(3), Budget.parse("1 block", oracle.ledger))
    assert selection.units == parse(["0"]) and selection.steps[0].ties == parse(["1"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 0}, "beam:width must be at least 1, not 0"),
        ({"expand": -1}, "beam:expand must be at least 0, not -1"),
        ({"per": "watt"}, "beam:per is one of none, parameters, kv, time, not 'watt'"),
    ],
)
def test_bad_values_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError) as caught:
        beam(*at(anything(0), "2 units"), **options)  # type: ignore[arg-type]
    assert str(caught.value) == says
