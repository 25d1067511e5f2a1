"""Budgets: what each form asks for, and the arithmetic of what cannot be had."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError
from depthprune.units import parse
from fakes import FakeLedger, sizes, sublayers

# Four blocks: attention 100 with a cache of 8 bytes, MLP 300 with none; 400 outside.
LEDGER = FakeLedger(
    {unit: 100 if unit.sublayer == "self_attn" else 300 for unit in sublayers(4)},
    {unit: 8 for unit in sublayers(4) if unit.sublayer == "self_attn"},
    outside=400,
)


@pytest.mark.parametrize(
    ("text", "measure", "amount", "kind"),
    [
        ("25%", "parameters", 400, None),
        ("12.5 %", "parameters", 200, None),
        (" 0.5% ", "parameters", 8, None),
        ("8 blocks", "count", 8, "block"),
        ("1 block", "count", 1, "block"),
        ("1BLOCKS", "count", 1, "block"),
        ("12 attention", "count", 12, "attention"),
        ("2 attentions", "count", 2, "attention"),
        ("6 mlp", "count", 6, "mlp"),
        ("6 mlps", "count", 6, "mlp"),
        ("3 mixers", "count", 3, "mixer"),
        ("5 units", "count", 5, None),
        ("5 sublayers", "count", 5, None),
        ("params<=1500", "parameters", 500, None),
        ("params <= 1.5e3", "parameters", 500, None),
        ("params<=1.5k", "parameters", 500, None),
        ("params<=75%", "parameters", 500, None),
        ("kv<=50%", "kv", 16, None),
        ("kv<=20", "kv", 12, None),
        ("kv<=0", "kv", 32, None),
    ],
)
def test_forms(text: str, measure: str, amount: float, kind: str | None) -> None:
    budget = Budget.parse(text, LEDGER)
    assert (budget.text, budget.measure, budget.kind) == (text, measure, kind)
    assert budget.amount == pytest.approx(amount)


@pytest.mark.parametrize(("text", "left"), [("params<=6e9", 6e9), ("params<=6B", 6e9), ("params<=600m", 6e8)])
def test_large_models(text: str, left: float) -> None:
    ledger = FakeLedger({sublayers(1)[0]: 7_000_000_000}, outside=1_000_000_000)
    assert Budget.parse(text, ledger).amount == 8e9 - left


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("100%", "leaves nothing of the model; ask for less than 100%"),
        ("250%", "leaves nothing of the model; ask for less than 100%"),
        ("0%", "drops nothing; ask for more than 0%"),
        ("0 blocks", "drops nothing; ask for at least 1"),
        ("params<=2000", "drops nothing: the model has 2,000 already"),
        ("params<=3e9", "drops nothing: the model has 2,000 already"),
        ("params<=100%", "drops nothing: the model has 2,000 already"),
        ("kv<=32", "drops nothing: the model has 32 already"),
        ("kv<=512b", "kv takes a share or bytes per token; write kv<=50% or kv<=512"),
        ("kv<=1k", "kv takes a share or bytes per token; write kv<=50% or kv<=512"),
        ("latency<=0.75x", "budgets on latency do not exist yet; write '25%'"),
        ("loss<=5%", "write loss<=+5% (above the dense model's) or loss<=2.5 (the loss)"),
        ("loss<=+0.1", "write loss<=+5% (above the dense model's) or loss<=2.5 (the loss)"),
        ("loss<=-5%", "is no budget; write '25%'"),
        ("loss>=2", "is no budget; write '25%'"),
        ("8", "has no measure; write '25%'"),
        ("0", "drops nothing and has no measure; write '25%'"),
        ("0.25", "has no measure; write '25%'"),
        ("", "is no budget; write '25%'"),
        ("-5%", "is no budget; write '25%'"),
        ("1.5 blocks", "is no budget; write '25%'"),
        ("8 layers", "is no budget; write '25%'"),
        ("params>=5", "is no budget; write '25%'"),
        ("25% of it", "is no budget; write '25%'"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text, LEDGER)
    message = str(caught.value)
    assert message.startswith(f"--drop {text!r} {says}") or message.startswith(f"--drop {text!r}: {says}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "gone", "spent", "met"),
    [
        ("25%", ["1.mlp"], 300, False),
        ("25%", ["1.mlp", "2.self_attn"], 400, True),
        ("25%", ["1"], 400, True),
        ("25%", ["1", "1.mlp"], 400, True),
        ("params<=1500", ["0.mlp", "1.mlp"], 600, True),
        ("params<=1500", ["0.mlp", "1.self_attn"], 400, False),
        ("kv<=50%", ["0.mlp", "1.mlp", "2.self_attn"], 8, False),
        ("kv<=50%", ["0", "2.self_attn"], 16, True),
        ("2 blocks", ["0", "3"], 2, True),
        ("2 blocks", ["0"], 1, False),
    ],
)
def test_when_it_is_met(text: str, gone: list[str], spent: float, met: bool) -> None:
    budget = Budget.parse(text, LEDGER)
    units = parse(gone)
    assert budget.spent(LEDGER, frozenset(units)) == spent
    assert budget.met(LEDGER, units) is met


def test_a_share_that_is_no_binary_fraction_is_met_by_exactly_that_share() -> None:
    units = sublayers(50)
    ledger = FakeLedger(dict.fromkeys(units, 7))
    for percent in range(1, 100):
        budget = Budget.parse(f"{percent}%", ledger)
        assert budget.met(ledger, units[:percent]) and not budget.met(ledger, units[: percent - 1])


def test_only_what_frees_kv_cache_helps_a_kv_budget() -> None:
    units = sublayers(4)
    attention = tuple(unit for unit in units if unit.sublayer == "self_attn")
    assert Budget.parse("kv<=50%", LEDGER).candidates(LEDGER, units) == attention
    assert Budget.parse("25%", LEDGER).candidates(LEDGER, units) == units


@pytest.mark.parametrize(
    ("text", "units", "arithmetic"),
    [
        ("5 blocks", ["0", "1"], "asks for 5 units, but the 2 units that may be dropped have 2"),
        ("90%", ["0", "1"], "asks for 1,440 parameters, but the 2 units that may be dropped have 800"),
        ("params<=300", ["0"], "asks for 1,700 parameters, but the 1 units that may be dropped have 400"),
        (
            "kv<=0",
            ["0.mlp", "1.self_attn"],
            "asks for 32 bytes of KV cache per token, but the 1 units that may be dropped have 8",
        ),
        ("1 mlp", [], "asks for 1 units, but the 0 units that may be dropped have 0"),
    ],
)
def test_more_than_there_is_is_refused_with_the_arithmetic(text: str, units: list[str], arithmetic: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text, LEDGER).candidates(LEDGER, parse(units))
    assert str(caught.value) == f"--drop {text!r} {arithmetic}"


@pytest.mark.parametrize(
    ("text", "amount", "relative", "limit"),
    [
        ("loss<=+5%", 0.05, True, 2.1),
        (" LOSS <= + 12.5 % ", 0.125, True, 2.25),
        ("loss<=+0%", 0, True, 2.0),
        ("loss<=2.5", 2.5, False, 2.5),
        ("loss<=1e-3", 0.001, False, 0.001),
    ],
)
def test_budgets_on_the_loss(text: str, amount: float, relative: bool, limit: float) -> None:
    budget = Budget.parse(text, LEDGER)
    assert (budget.measure, budget.relative, budget.kind) == ("loss", relative, None)
    assert budget.amount == pytest.approx(amount) and budget.limit(2.0) == pytest.approx(limit)
    units = sublayers(4)
    assert budget.candidates(LEDGER, units) == units
    assert not budget.met(LEDGER, units)  # more might always go
    assert budget.spent(LEDGER, frozenset(parse(["1.mlp", "2.self_attn"]))) == 400
    assert budget.most(LEDGER, units) == 8
    budget.insist(LEDGER, units[:1])
    with pytest.raises(BudgetError, match="cannot be met"):
        budget.insist(LEDGER, ())
    with pytest.raises(BudgetError, match="no units that may be dropped"):
        budget.candidates(LEDGER, ())


def test_other_budgets_do_not_limit_the_loss() -> None:
    assert Budget.parse("25%", LEDGER).limit(2.0) == math.inf


def test_a_share_of_no_loss_is_refused() -> None:
    with pytest.raises(BudgetError, match="which is 0 under this metric; write a number"):
        Budget.parse("loss<=+5%", LEDGER).limit(0.0)
    assert Budget.parse("loss<=0.1", LEDGER).limit(0.0) == 0.1


def test_a_loss_that_cannot_be_had_is_refused_with_both_numbers() -> None:
    error = Budget.parse("loss<=+5%", LEDGER).broken(2.0, parse(["1.mlp", "2"]), 2.34567)
    assert str(error) == (
        "--drop 'loss<=+5%' cannot be met: it allows a loss of 2.1000, the dense model has 2.0000, "
        "and dropping 1.mlp, 2 leaves 2.3457"
    )


@pytest.mark.parametrize("text", ["25%", "60%", "3 units", "params<=70%", "kv<=40%"])
def test_no_order_of_removals_takes_more_than_most(text: str) -> None:
    units, draw = sublayers(5), np.random.default_rng(0)
    ledger = sizes(units)
    budget = Budget.parse(text, ledger)
    able = budget.candidates(ledger, units)
    most = budget.most(ledger, able)
    counts = set()
    for _ in range(300):
        order = [able[index] for index in draw.permutation(len(able))]
        counts.add(next(n for n in itertools.count() if budget.met(ledger, order[:n])))
    smallest = sorted(able, key=lambda unit: budget.spent(ledger, frozenset((unit,))))
    assert max(counts) <= most == next(n for n in itertools.count() if budget.met(ledger, smallest[:n]))


def test_what_must_stay_is_part_of_the_arithmetic() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("50%", LEDGER).insist(LEDGER, parse(["1.mlp"]), parse(["0.mlp", "2.mlp", "3.mlp", "3.self_attn"]))
    assert str(caught.value) == (
        "--drop '50%' asks for 800 parameters, but only 300 can go: 4 units must stay, as their score is infinite "
        "(0.mlp, 2.mlp, 3.mlp, …)"
    )
