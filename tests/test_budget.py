"""Budgets: what each form asks for, and the arithmetic of what cannot be had."""

from __future__ import annotations

import pytest

from depthprune.budget import Budget
from depthprune.errors import BudgetError
from depthprune.units import parse
from fakes import FakeLedger, sublayers

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
        ("latency<=0.75x", "budgets on latency and loss do not exist yet; write '25%'"),
        ("loss<=+5%", "budgets on latency and loss do not exist yet; write '25%'"),
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
