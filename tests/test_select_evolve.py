"""Evolutionary search: the optimum of small cases, the elite parent, the stages, and the same answer twice."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError, OptionError
from depthprune.scores import Array
from depthprune.select.evolve import _offspring, evolve
from depthprune.select.rank import lowest
from depthprune.select.search import greedy
from depthprune.units import Unit
from fakes import Damage, FakeLedger, FakeOracle, anything, growing, shrinking, sizes, sublayers

PARTS = sublayers(4)
DAMAGES: dict[str, Callable[[int], Damage]] = {
    "anything": lambda seed: anything(seed, 16),
    "growing": lambda seed: growing(PARTS, seed, 16),
    "shrinking": lambda seed: shrinking(PARTS, seed, 16),
}
BUDGETS = ["30%", "60%", "4 units", "params<=70%", "kv<=40%"]
STARTS = ["greedy", "lowest", "random"]


def at(damage: Damage, text: str, seed: int = 0) -> tuple[FakeOracle, tuple[Unit, ...], Budget]:
    scores = dict(zip(PARTS, np.random.default_rng(seed).uniform(0, 1, len(PARTS)).tolist(), strict=True))
    oracle = FakeOracle(damage, sizes(PARTS, seed), tokens=[8.0] * 16, scores=scores)
    budget = Budget.parse(text, oracle.ledger)
    return oracle, budget.candidates(oracle.ledger, PARTS), budget


def minimal(oracle: FakeOracle, budget: Budget, units: tuple[Unit, ...]) -> bool:
    """The budget is met, and needs every one of these units."""
    fewer = [set(units) - {unit} for unit in units]
    return budget.met(oracle.ledger, units) and not any(budget.met(oracle.ledger, some) for some in fewer)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("seed", range(2))
def test_it_finds_the_optimum_of_small_cases(start: str, text: str, seed: int) -> None:
    quiet = growing(PARTS, seed, 1)  # every sequence alike, so that few say what all do
    oracle, able, budget = at(lambda gone: np.repeat(quiet(gone), 16), text, seed)
    sets = itertools.chain.from_iterable(itertools.combinations(able, n) for n in range(1, len(able) + 1))
    best = min(oracle.mean(some) for some in sets if minimal(oracle, budget, some))
    selection = evolve(oracle, able, budget, start=start, generations=30)
    assert oracle.mean(selection.units) == pytest.approx(best)
    if start != "greedy":
        assert minimal(oracle, budget, selection.units)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("seed", range(2))
def test_never_worse_than_its_start_nor_beyond_its_forecast(kind: str, text: str, start: str, seed: int) -> None:
    oracle, able, budget = at(DAMAGES[kind](seed), text, seed)
    selection = evolve(oracle, able, budget, start=start, generations=6, offspring=9, seed=seed)
    assert budget.met(oracle.ledger, selection.units) and len(set(selection.units)) == len(selection.units)
    assert selection.expected is not None and selection.evaluations == len(set(oracle.asked)) <= selection.expected
    assert selection.steps[-1].loss == pytest.approx(oracle.mean(selection.units)) or start == "lowest"
    assert selection.dense == pytest.approx(oracle.mean([]))
    for count, step in enumerate(selection.steps, start=1):
        assert step.loss is None or step.loss == pytest.approx(oracle.mean(selection.units[:count]))
    if start != "random":
        first = {"greedy": greedy, "lowest": lowest}[start](oracle, able, budget)
        assert oracle.mean(selection.units) <= oracle.mean(first.units)
        assert selection.nested == (set(selection.units) == set(first.units))
    again = evolve(*at(DAMAGES[kind](seed), text, seed), start=start, generations=6, offspring=9, seed=seed)
    assert again == selection  # the same seed, a fresh oracle


def test_another_seed_goes_another_way() -> None:
    asked = []
    for seed in range(3):
        oracle, able, budget = at(anything(0, 16), "4 units")
        evolve(oracle, able, budget, generations=2, seed=seed)
        asked.append(oracle.asked)
    assert asked[0] != asked[1] != asked[2]


def test_only_survivors_are_measured_on_more_sequences() -> None:
    oracle, able, budget = at(DAMAGES["growing"](0), "4 units")
    evolve(oracle, able, budget, start="lowest", generations=1, offspring=16)
    parent, *children = [rows for gone, rows in zip(oracle.asked, oracle.rows, strict=True) if gone][:22]
    assert parent == 16 and sorted(children) == [1] * 16 + [4] * 4 + [16]


def test_the_parent_stays_unless_beaten_on_all_sequences() -> None:
    """Children that shine on the first sequences alone are seen through; the twin believes them."""
    start = frozenset(PARTS[:4])

    def damage(gone: frozenset[Unit]) -> Array:
        row = np.full(16, 2.0 if gone == start else 3.0)
        row[:4] = 2.0 if gone == start else 0.0
        return row

    scores = {unit: float(index) for index, unit in enumerate(PARTS)}
    oracle = FakeOracle(damage, sizes(PARTS), tokens=[8.0] * 16, scores=scores)
    budget = Budget.parse("4 units", oracle.ledger)
    selection = evolve(oracle, PARTS, budget, start="lowest")
    assert set(selection.units) == start and selection.nested
    short = FakeOracle(lambda gone: damage(gone)[:4], oracle.ledger, tokens=[8.0] * 4, scores=scores)
    assert set(evolve(short, PARTS, budget, start="lowest").units) != start


@pytest.mark.parametrize("text", ["40%", "3 units", "kv<=60%"])
def test_children_meet_the_budget_and_free_no_more_than_needed(text: str) -> None:
    oracle, able, budget = at(growing(PARTS, 0, 16), text)
    parent = lowest(oracle, able, budget).units
    draw = random.Random(0)
    children = _offspring(oracle.ledger, budget, able, parent, draw, 10, 3, {frozenset(parent)})
    sets = [frozenset(child) for child in children]
    assert children and len(set(sets)) == len(sets) and frozenset(parent) not in sets
    assert all(minimal(oracle, budget, child) for child in children)
    seen = set(sets[:2])  # what was measured to the end is not made again
    assert not seen & {frozenset(c) for c in _offspring(oracle.ledger, budget, able, parent, draw, 99, 3, seen)}


def test_an_infinite_score_stays_and_so_does_an_infinite_loss() -> None:
    oracle, able, budget = at(growing(PARTS, 0, 16), "5 units")
    values = {unit: math.inf if unit == PARTS[0] else value for unit, value in oracle.scores().items()}
    free = FakeOracle(lambda gone: np.full(16, 0.0 if PARTS[0] in gone else 9.0), oracle.ledger, tokens=[8.0] * 16)
    free._scores = values
    assert PARTS[0] not in evolve(free, able, budget, start="lowest").units
    assert PARTS[0] in evolve(free, able, budget, start="greedy").units  # the twin: it knows of no score
    broken = FakeOracle(lambda gone: np.full(16, math.inf if gone else 1.0), oracle.ledger, tokens=[8.0] * 16)
    with pytest.raises(BudgetError, match="no plan was found that leaves a finite loss"):
        evolve(broken, able, budget, start="random", generations=2)


def test_the_vital_units_do_not_all_go() -> None:
    attention = frozenset(unit for unit in PARTS if unit.sublayer == "self_attn")
    ledger = FakeLedger(dict.fromkeys(PARTS, 10), vital=attention)
    oracle = FakeOracle(lambda gone: np.full(2, 9.0 - len(gone & attention)), ledger)
    for seed in range(5):
        chosen = evolve(oracle, PARTS, Budget.parse("5 units", ledger), start="random", seed=seed).units
        assert len(attention & set(chosen)) == 3
    with pytest.raises(BudgetError, match="every attention"):
        evolve(oracle, PARTS, Budget.parse("8 units", ledger), start="random")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generations": 0}, "evolve:generations must be at least 1, not 0"),
        ({"offspring": 0}, "evolve:offspring must be at least 1, not 0"),
        ({"mutations": 0}, "evolve:mutations must be at least 1, not 0"),
        ({"start": "dense"}, "evolve:start is one of greedy, lowest, random, not 'dense'"),
    ],
)
def test_bad_values_are_refused(options: dict[str, object], says: str) -> None:
    oracle, able, budget = at(anything(0, 16), "2 units")
    with pytest.raises(OptionError) as caught:
        evolve(oracle, able, budget, **options)  # type: ignore[arg-type]
    assert str(caught.value) == says and oracle.asked == []
