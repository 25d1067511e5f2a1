"""Damage per parameter, per byte of KV cache, per millisecond: against a sort written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.select.beam import beam
from depthprune.select.cost import rank
from depthprune.select.rank import joint, lowest
from depthprune.select.search import greedy
from depthprune.units import Unit
from fakes import FakeOracle, anything, growing, sizes, sublayers

PARTS = sublayers(5)
MILLISECONDS = {unit: 0.5 + index % 3 for index, unit in enumerate(PARTS)}


def oracle_for(seed: int, *, positive: bool = True) -> FakeOracle:
    draw = np.random.default_rng(seed).uniform(0.01 if positive else -1, 1, len(PARTS)).tolist()
    scores = dict(zip(PARTS, draw, strict=True))
    return FakeOracle(growing(PARTS, seed), sizes(PARTS, seed), scores=scores, milliseconds=MILLISECONDS)


def saved(oracle: FakeOracle, unit: Unit, per: str) -> float:
    if per == "time":
        return MILLISECONDS[unit]
    return {"none": {}, "parameters": oracle.ledger.sizes, "kv": oracle.ledger.caches}[per].get(
        unit, int(per == "none")
    )


@pytest.mark.parametrize("per", ["none", "parameters", "kv", "time"])
@pytest.mark.parametrize("seed", range(5))
def test_lowest_score_per_what_is_saved(per: str, seed: int) -> None:
    oracle = oracle_for(seed)
    scores = oracle.scores()
    paying = sorted((u for u in PARTS if saved(oracle, u, per)), key=lambda u: scores[u] / saved(oracle, u, per))
    expected = [*paying, *sorted((u for u in PARTS if u not in paying), key=lambda u: scores[u])]
    budget = Budget.parse("9 units", oracle.ledger)
    assert list(lowest(oracle, PARTS, budget, per=per).units) == expected[:9]
    assert list(joint(oracle, PARTS, budget, per=per).units) == expected[:9]
    if per == "kv":
        assert {unit.sublayer for unit in expected[:5]} == {"self_attn"}


def test_gains_come_first_and_are_not_made_larger_by_a_small_price() -> None:
    cases = list(itertools.product([-2.0, -0.5, 0.0, 0.5, 2.0], [0.1, 1.0, 50.0]))
    for (one, small), (other, large) in itertools.product(cases, repeat=2):
        if one <= 0 and one < other:
            assert rank(one, small) < rank(other, large)
    assert -0.5 / 0.1 < -2.0 / 1.0 and rank(-2.0, 1.0) < rank(-0.5, 0.1)  # the twin: a plain division has them turned
    assert rank(2.0, 10.0) < rank(1.0, 1.0) < rank(-9.0, 0.0) < rank(9.0, 0.0)  # what saves nothing comes last


def test_the_place_in_line_rises_with_the_damage() -> None:
    """So a lower bound on the damage is one on the place, and lazy greedy stays right."""
    for price in (0.0, 0.2, 1.0, 30.0):
        places = [rank(damage, price) for damage in (-math.inf, -3.0, -0.1, 0.0, 0.1, 2.0, math.inf)]
        assert places == sorted(places)


@pytest.mark.parametrize("per", ["parameters", "kv", "time"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_drops_the_lowest_damage_per_what_is_saved(per: str, exact: bool, seed: int) -> None:
    oracle = oracle_for(seed)
    budget = Budget.parse("50%", oracle.ledger)
    gone: list[Unit] = []

    def place(unit: Unit) -> tuple[bool, float]:
        damage, worth = oracle.mean([*gone, unit]) - oracle.mean(gone), saved(oracle, unit, per)
        return worth == 0, damage / worth if worth else damage

    while not budget.met(oracle.ledger, gone):
        gone.append(min((unit for unit in PARTS if unit not in gone), key=place))
    selection = greedy(oracle, PARTS, budget, exact=exact, per=per)
    assert list(selection.units) == gone
    assert selection.expected is not None and selection.evaluations <= selection.expected


def test_the_price_changes_what_goes() -> None:
    """The twin: selectors that ignored ``per`` would choose the same."""
    for select in (lowest, greedy, beam):
        chosen = []
        for per in ("none", "parameters", "kv", "time"):
            oracle = oracle_for(1)
            options = {"width": 1, "expand": 2} if select is beam else {}
            chosen.append(select(oracle, PARTS, Budget.parse("40%", oracle.ledger), per=per, **options).units)
        assert len(set(chosen)) >= 3


def test_ties_are_counted_in_the_same_measure() -> None:
    """Two units of equal damage per parameter tie, though one does twice the damage and is twice as large."""
    oracle = FakeOracle(anything(0), sizes(PARTS), tokens=[8.0] * 3)
    one, other = PARTS[0], PARTS[1]
    oracle.ledger.sizes[one], oracle.ledger.sizes[other] = 50, 100  # type: ignore[index]
    noise = np.array([0.01, 0.02, 0.0])

    def damage(gone: frozenset[Unit]) -> np.ndarray:
        return 2 + noise + (0.5 * (one in gone) + 1.0 * (other in gone)) * (1 + noise) + 9.0 * len(gone - {one, other})

    oracle.damage = damage
    step = greedy(oracle, PARTS, Budget.parse("1 unit", oracle.ledger), per="parameters").steps[0]
    assert step.unit == one and step.ties == (other,)
    assert greedy(oracle, PARTS, Budget.parse("1 unit", oracle.ledger)).steps[0].ties == ()
