"""Greedy's racing and its exchanges: the choices of full measurement for fewer sequences, and never a worse end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError, OptionError
from depthprune.scores import Array
from depthprune.select.refine import TRIES
from depthprune.select.search import greedy
from depthprune.units import Unit, parse
from fakes import Damage, FakeLedger, FakeOracle, anything, growing, shrinking, sizes, sublayers, whole

PARTS = sublayers(6)
TOKENS = [8.0] * 16


def quiet(seed: int) -> Damage:
    """Sequences differ, but every unit raises each of them by the same."""
    usual, level = growing(PARTS, seed, 1), np.random.default_rng(seed).uniform(1, 3, 16)
    return lambda gone: usual(gone)[0] + level


def noisy(seed: int) -> Damage:
    """Every sequence has its own noise of the size of the differences."""
    usual = anything(seed, 16)
    return lambda gone: 0.3 * len(gone) + 0.2 * usual(gone)


def at(damage: Damage, text: str = "8 units") -> tuple[FakeOracle, Budget]:
    oracle = FakeOracle(damage, sizes(PARTS), tokens=TOKENS)
    return oracle, Budget.parse(text, oracle.ledger)


@pytest.mark.parametrize("race", [2, 4, 8, 100])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_without_noise_a_race_chooses_the_same_on_fewer_sequences(race: int, exact: bool, seed: int) -> None:
    full, budget = at(quiet(seed))
    raced, _ = at(quiet(seed))
    one = greedy(full, PARTS, budget, exact=exact)
    other = greedy(raced, PARTS, budget, exact=exact, race=race)
    assert other.units == one.units and other.evaluations == one.evaluations
    assert [step.loss for step in other.steps] == pytest.approx([step.loss for step in one.steps])
    assert raced.work < full.work
    candidates = [rows for gone, rows in zip(raced.asked, raced.rows, strict=True) if len(gone) == 1]
    assert candidates.count(max(2, 16 // race)) >= 12  # every single unit, on few sequences


def naive_race(oracle: FakeOracle, gone: list[Unit], left: list[Unit], rows: int) -> tuple[Unit, set[Unit]]:
    """Racing as it is told: who is within two standard errors runs twice as many sequences."""

    def losses(unit: Unit) -> Array:
        return oracle.damage(frozenset((*gone, unit)))[:rows]

    while True:
        front = min(left, key=lambda unit: losses(unit).mean())
        gaps = {unit: losses(unit) - losses(front) for unit in left if unit != front}
        errors = {unit: gap.std(ddof=1) / np.sqrt(len(gap)) for unit, gap in gaps.items()}
        near = [unit for unit in gaps if gaps[unit].mean() <= 2 * errors[unit]]
        if not near or rows == len(TOKENS):
            return front, {unit for unit in near if gaps[unit].mean() <= errors[unit]}
        left, rows = [front, *near], min(2 * rows, len(TOKENS))


@pytest.mark.parametrize("race", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(6))
def test_a_race_is_the_naive_race(race: int, seed: int) -> None:
    oracle, budget = at(noisy(seed))
    selection = greedy(oracle, PARTS, budget, exact=True, race=race)
    gone: list[Unit] = []
    for step in selection.steps:
        left = [unit for unit in PARTS if unit not in gone]
        chosen, ties = naive_race(oracle, gone, left, 16 // race)
        assert step.unit == chosen and set(step.ties) == ties
        gone.append(chosen)
        assert step.loss == pytest.approx(oracle.mean(gone))  # on all sequences, however few decided
    if race > 1:
        assert set(oracle.rows) >= {16 // race, 32 // race, 16}  # some went on


def test_few_sequences_mislead_and_the_race_finds_out() -> None:
    """Unit 1 looks better on the first two sequences, by little; unit 0 is better on all."""
    blocks = whole(3)
    rows = {"0": [1.0, 2.0] + [1.0] * 6, "1": [0.5, 2.4] + [3.0] * 6, "2": [9.0] * 8}
    table = {frozenset(parse([name])): np.array(row) for name, row in rows.items()} | {frozenset(): np.zeros(8)}
    oracle = FakeOracle(table.__getitem__, FakeLedger(dict.fromkeys(blocks, 1)), tokens=[8.0] * 8)
    budget = Budget.parse("1 block", oracle.ledger)
    assert oracle.losses([frozenset(blocks[:1]), frozenset(blocks[1:2])], rows=2).mean().tolist() == [1.5, 1.45]
    oracle.asked, oracle.rows = [], []
    assert greedy(oracle, blocks, budget, race=4).units == blocks[:1]
    most = {gone: max(r for g, r in zip(oracle.asked, oracle.rows, strict=True) if g == gone) for gone in oracle.asked}
    assert most[frozenset(blocks[2:])] == 2 and most[frozenset(blocks[1:2])] == 8


def test_a_loss_that_is_infinite_further_on_is_found_out() -> None:
    def damage(gone: frozenset[Unit]) -> Array:
        row = quiet(0)(gone)
        row[-1] = np.inf if best in gone else row[-1]
        return row

    best = greedy(*[at(quiet(0))[0], PARTS, at(quiet(0))[1]]).units[0]
    oracle, budget = at(damage, "11 units")
    assert set(greedy(oracle, PARTS, budget, race=4).units) == set(PARTS) - {best}
    with pytest.raises(BudgetError, match="only 11 can go: 1 units must stay"):
        greedy(oracle, PARTS, Budget.parse("12 units", oracle.ledger), race=4)


@pytest.mark.parametrize(("race", "swaps", "says"), [(0, 0, "race must be at least 1"), (1, -1, "swaps must be at")])
def test_bad_values_are_refused(race: int, swaps: int, says: str) -> None:
    oracle, budget = at(quiet(0))
    with pytest.raises(OptionError, match=f"greedy:{says}"):
        greedy(oracle, PARTS, budget, race=race, swaps=swaps)


KINDS: dict[str, Callable[[int], Damage]] = {
    "anything": lambda seed: anything(seed, 16),
    "growing": lambda seed: growing(PARTS, seed, 16),
    "shrinking": lambda seed: shrinking(PARTS, seed, 16),
    "noisy": noisy,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["35%", "5 units", "kv<=50%", "loss<=+150%"])
@pytest.mark.parametrize("seed", range(4))
def test_exchanges_lower_the_loss_within_the_budget_and_the_forecast(kind: str, text: str, seed: int) -> None:
    oracle, budget = at(KINDS[kind](seed), text)
    able = budget.candidates(oracle.ledger, PARTS)
    plain = greedy(oracle, able, budget)
    swapped = greedy(oracle, able, budget, swaps=5)
    assert oracle.mean(swapped.units) <= oracle.mean(plain.units)
    assert budget.met(oracle.ledger, swapped.units) or text.startswith("loss")
    if text.startswith("loss"):
        assert oracle.mean(swapped.units) <= budget.limit(oracle.mean([]))
        freed = [oracle.ledger.freed(frozenset(one.units)) for one in (plain, swapped)]
        assert freed[1] >= freed[0]
    assert swapped.nested == (swapped.units == plain.units) and len(set(swapped.units)) == len(swapped.units)
    for count, step in enumerate(swapped.steps, start=1):  # a loss that is written down is the loss of the prefix
        assert step.loss is None or step.loss == pytest.approx(oracle.mean(swapped.units[:count]))
    assert swapped.steps[-1].loss is not None
    for selection in (plain, greedy(at(KINDS[kind](seed))[0], able, budget, swaps=5, race=4)):
        assert selection.expected is not None and selection.evaluations <= selection.expected


def test_exchanges_mend_what_greedy_got_wrong() -> None:
    """1 alone is the least, but 0 and 2 together are: greedy is stuck with 1, an exchange gets out."""
    blocks = whole(3)
    table = {"": 0.0, "0": 2, "1": 1, "2": 2.1, "01": 6, "12": 5, "02": 3}
    oracle = FakeOracle(
        lambda gone: np.full(2, table["".join(sorted(map(str, gone)))]), FakeLedger(dict.fromkeys(blocks, 1))
    )
    budget = Budget.parse("2 blocks", oracle.ledger)
    stuck = greedy(oracle, blocks, budget)
    assert stuck.units == (blocks[1], blocks[2]) and stuck.nested
    mended = greedy(oracle, blocks, budget, swaps=3)
    assert mended.units == (blocks[2], blocks[0]) and not mended.nested
    assert [step.to_json() for step in mended.steps] == [{"unit": "2"}, {"unit": "0", "loss": 3.0}]
    assert "swap: 1 stays, 0 goes: loss 3.0000" in oracle.notes


def test_a_large_unit_may_be_exchanged_for_two_small_ones() -> None:
    blocks = whole(3)
    ledger = FakeLedger({blocks[0]: 2, blocks[1]: 1, blocks[2]: 1})
    table = {"": 0.0, "0": 1, "1": 2, "2": 2, "12": 0.5}
    oracle = FakeOracle(lambda gone: np.full(2, table.get("".join(sorted(map(str, gone))), 9.0)), ledger)
    budget = Budget.parse("50%", ledger)
    assert greedy(oracle, blocks, budget).units == (blocks[0],)
    assert set(greedy(oracle, blocks, budget, swaps=1).units) == {blocks[1], blocks[2]}


def test_what_became_superfluous_is_restored() -> None:
    """A small unit went first, then a large one that is enough alone."""
    blocks = whole(2)
    ledger = FakeLedger({blocks[0]: 1, blocks[1]: 9})
    oracle = FakeOracle(lambda gone: np.full(2, float(ledger.freed(gone))), ledger)
    budget = Budget.parse("60%", ledger)
    assert greedy(oracle, blocks, budget).units == blocks
    assert greedy(oracle, blocks, budget, swaps=1).units == (blocks[1],)


def test_the_forecast_counts_the_exchanges() -> None:
    oracle, budget = at(anything(0, 16), "3 units")
    assert greedy(oracle, PARTS, budget, exact=True).evaluations == 1 + 12 + 11 + 10
    assert greedy(oracle, PARTS, budget, exact=True).expected == 34
    assert greedy(oracle, PARTS, budget, swaps=2, race=4).expected == 34 + 2 * 3 * TRIES
    last = oracle.notes[-1] if oracle.notes[-1].startswith("greedy") else [n for n in oracle.notes if n[0] == "g"][-1]
    assert last == "greedy: 12 variants first, at most 58 in all, on 4 of 16 sequences at first"
