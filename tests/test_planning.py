"""From a budget to a plan: which units may go, which stay, and what the plan says about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import depthprune
from depthprune.budget import Budget
from depthprune.data import Data, digest
from depthprune.errors import BudgetError, OptionError, PlanError
from depthprune.layout import Layout
from depthprune.model import Model, wrap
from depthprune.oracle import ModelOracle
from depthprune.plan import Plan
from depthprune.planning import ENDS, SEARCH, candidates, protected, score, select, settle, stability
from depthprune.scores import Scores
from depthprune.select.rank import Selection, Step
from depthprune.surgery import drop
from depthprune.units import Unit, parse
from depthprune.variants import losses
from families import FAMILIES, configuration, tiny


def random_text(seed: int = 0) -> Data:
    tokens = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Data(tokens, mask, "random tokens", digest(tokens, mask), 7, ())


DATA = random_text()


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(tiny("llama"), None, "tiny-llama")


@pytest.fixture(scope="module")
def layout(model: Model) -> Layout:
    return model.layout


@pytest.fixture(scope="module")
def bloom() -> Model:
    """Its sublayers add the residual themselves, so it has only blocks to drop."""
    return wrap(tiny("bloom"), None, "tiny-bloom")


FIRST = Unit("", 0, "self_attn")


# Protection


def test_the_first_attention_is_protected_by_default(layout: Layout) -> None:
    for unit in ("any", "attention"):
        assert protected(layout, unit) == (FIRST,)
        assert FIRST not in candidates(layout, unit) and FIRST in layout.units(unit)
        assert len(candidates(layout, unit)) == len(layout.units(unit)) - 1
    assert candidates(layout, "mlp") == layout.units("mlp")
    assert candidates(layout, "block") == layout.units("block")  # then the next block's attention is the first


@pytest.mark.parametrize("none", ["none", "None ", ("none",)])
def test_none_protects_nothing(layout: Layout, none: str | Sequence[str]) -> None:
    for unit in ("any", "attention", "mlp", "block"):
        assert candidates(layout, unit, none) == layout.units(unit)


@pytest.mark.parametrize(
    ("given", "unit", "left"),
    [
        ("1.mlp,2", "any", ["0.mlp", "1.self_attn", "3.self_attn", "3.mlp"]),  # the default holds, too
        ("none,1.mlp,2", "any", ["0.self_attn", "0.mlp", "1.self_attn", "3.self_attn", "3.mlp"]),
        ("1.mlp 2", "mlp", ["0.mlp", "3.mlp"]),
        ("1.mlp, 2", "block", ["0", "3"]),  # a block that holds a protected part stays
        (["0.self_attn", Unit("", 3)], "block", ["1", "2"]),
        ("0,1,2", "attention", ["3.self_attn"]),
        ("0,1,2,3", "any", []),
        ("ends", "block", ["1", "2"]),
        ("ends", "any", ["1.self_attn", "1.mlp", "2.self_attn", "2.mlp"]),
        ("none,Ends,2.mlp", "mlp", ["1.mlp"]),
        (["ends", Unit("", 1)], "block", ["2"]),
        ("plus", "block", []),  # the first four and the last two: all that there are
    ],
)
def test_what_is_protected_stays(layout: Layout, given: str | list[str | Unit], unit: str, left: list[str]) -> None:
    assert candidates(layout, unit, given) == parse(left)


@pytest.mark.parametrize(("word", "kept"), [("ends", {0, 11}), ("plus", {0, 1, 2, 3, 10, 11})])
def test_words_for_both_ends(word: str, kept: set[int]) -> None:
    family = replace(FAMILIES["llama"], options=FAMILIES["llama"].options | {"num_hidden_layers": 12})
    long = wrap(transformers.LlamaForCausalLM(configuration(family)).eval(), None, "long").layout
    assert {unit.block for unit in protected(long, "block", word)} == kept
    assert {unit.block for unit in candidates(long, "any", word)} == set(range(12)) - kept
    assert FIRST in protected(long, "any", word) and FIRST not in protected(long, "any", f"none,{word}")
    assert FIRST not in candidates(long, "any", f"none,{word}")  # as block 0 is at an end


def test_every_word_for_the_ends_holds_both() -> None:
    assert all({0, -1} <= set(blocks) for blocks in ENDS.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("4", "--protect: there is no unit 4: this model has blocks 0 to 3"),
        ("1,99.mlp", "--protect: there is no unit 99.mlp: this model has blocks 0 to 3"),
        ("decoder.1", "--protect: there is no unit decoder.1: this model has blocks 0 to 3"),
        ("1.attention", "--protect: block 1 has no droppable sublayer 'attention'; it has: self_attn, mlp"),
        ("first", "'first' is no unit; write a block as '12' or a sublayer as '12.self_attn'"),
        ("1;2", "'1;2' is no unit; write a block as '12' or a sublayer as '12.self_attn'"),
    ],
)
def test_protecting_what_is_not_there_is_refused(layout: Layout, given: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        candidates(layout, "any", given)
    assert str(caught.value) == says


def test_a_kind_without_members_is_refused_with_the_reason(layout: Layout, bloom: Model) -> None:
    with pytest.raises(BudgetError, match=r"^this model has no unit of kind mixer that can be dropped$"):
        candidates(layout, "mixer")
    for unit in ("attention", "mlp"):
        with pytest.raises(BudgetError) as caught:
            select(bloom, "25%", data=DATA, unit=unit)
        message = str(caught.value)
        assert message.startswith(f"this model has no unit of kind {unit} that can be dropped: with ")
        assert message.endswith("; use --unit block") and "\n" not in message
    assert candidates(bloom.layout, "any") == candidates(bloom.layout, "block") == parse(list("0123"))


def test_an_unknown_kind_is_an_unknown_option(model: Model) -> None:
    for call in (lambda: select(model, "25%", data=DATA, unit="layer"), lambda: score(model, DATA, unit="layer")):
        with pytest.raises(OptionError) as caught:
            call()
        assert str(caught.value) == "unknown unit 'layer'. Available: any, attention, block, mixer, mlp"


# Budgets with a kind


@pytest.mark.parametrize(
    ("text", "unit", "settled"),
    [
        ("2 blocks", "any", "block"),
        ("2 blocks", "block", "block"),
        ("2 attention", "any", "attention"),
        ("2 mlps", "mlp", "mlp"),
        ("2 units", "mlp", "mlp"),
        ("2 units", "any", "any"),
        ("25%", "attention", "attention"),
        ("kv<=50%", "any", "any"),
    ],
)
def test_a_budget_may_say_the_kind(layout: Layout, text: str, unit: str, settled: str) -> None:
    budget, kind = settle(text, unit, layout)
    assert kind == settled and budget == Budget.parse(text, layout)


@pytest.mark.parametrize(("text", "unit"), [("8 blocks", "attention"), ("2 mlp", "block"), ("1 attention", "mlp")])
def test_a_budget_of_another_kind_is_refused(model: Model, text: str, unit: str) -> None:
    with pytest.raises(BudgetError) as caught:
        select(model, text, data=DATA, unit=unit)
    kind = text.split()[1].rstrip("s")
    assert str(caught.value) == f"--drop {text!r} counts units of kind {kind}, but --unit is {unit}"


def test_more_than_there_is_is_refused_before_anything_is_measured(model: Model) -> None:
    def never(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
        raise AssertionError("measured all the same")

    for text, says in {
        "9 blocks": "asks for 9 units, but the 4 units that may be dropped have 4",
        "4 attention": "asks for 4 units, but the 3 units that may be dropped have 3",
        "kv<=10%": "bytes of KV cache per token, but the 3 units",
    }.items():
        with pytest.raises(BudgetError) as caught:
            select(model, text, data=DATA, metric=never, select="lowest")
        assert says in str(caught.value) and "\n" not in str(caught.value)


# Selecting


def test_a_kv_budget_takes_only_what_frees_kv_cache(model: Model) -> None:
    plan = select(model, "kv<=50%", data=DATA)
    assert [unit.sublayer for unit in plan.drop] == ["self_attn"] * 2
    assert plan.frees["kv_bytes_per_token"] * 2 == model.layout.kv_bytes_per_token
    assert select(model, "kv<=50%", data=DATA, unit="block").frees["kv_bytes_per_token"] * 2 == (
        model.layout.kv_bytes_per_token
    )
    with pytest.raises(BudgetError, match="the 0 units that may be dropped have 0"):
        select(model, "kv<=50%", data=DATA, unit="mlp")


@pytest.mark.parametrize("unit", ["block", "attention", "mlp", "any"])
@pytest.mark.parametrize("how", ["greedy", "greedy:exact=true", "lowest", "contiguous"])
def test_a_plan_says_what_was_chosen_and_why(model: Model, unit: str, how: str) -> None:
    layout = model.layout
    metric = "loss" if how.startswith("greedy") else "cosine"
    plan = select(model, "2 units", data=DATA, unit=unit, metric=metric, select=how)
    gone = frozenset(plan.drop)
    assert len(gone) == 2 and gone <= set(layout.units(unit)) and FIRST not in gone
    assert plan.model == model.reference
    assert plan.frees == {
        "parameters": layout.freed(gone),
        "fraction": round(layout.freed(gone) / layout.parameters, 6),
        "kv_bytes_per_token": layout.kv_freed(gone),
    }
    why = plan.why
    assert [step["unit"] for step in why["steps"]] == [str(u) for u in plan.drop]
    assert (why["unit"], why["budget"], why["select"], why["seed"]) == (unit, "2 units", how, 7)
    assert why["metric"] == metric
    assert why["nested"] is (how != "contiguous")
    assert (why["evaluations"] > 0) is how.startswith("greedy")
    assert why["data"] == DATA.describe()
    assert plan.made_by["depthprune"] == depthprune.__version__ and plan.made_by["torch"] == torch.__version__
    assert Plan.from_json(plan.to_json()) == plan
    json.loads(plan.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_greedy_takes_the_best_of_all_first_steps(model: Model) -> None:
    units = candidates(model.layout, "any")
    mean = losses(model, DATA, [(unit,) for unit in units]).mean().tolist()
    plan = select(model, "1 unit", data=DATA)
    assert plan.drop == (units[mean.index(min(mean))],)
    assert plan.why["steps"][0]["loss"] == pytest.approx(min(mean), abs=1e-6)
    assert plan.why["dense_loss"] == pytest.approx(float(losses(model, DATA, [()]).mean()[0]), abs=1e-6)
    assert plan.why["evaluations"] == len(units) + 1


def test_the_budget_may_be_met_by_one_kind_of_many(model: Model) -> None:
    assert {unit.sublayer for unit in select(model, "2 mlp", data=DATA).drop} == {"mlp"}
    assert {unit.sublayer for unit in select(model, "2 blocks", data=DATA).drop} == {""}
    assert select(model, "2 attention", data=DATA, protect="none,1,2").drop in (
        parse(["0.self_attn", "3.self_attn"]),
        parse(["3.self_attn", "0.self_attn"]),
    )


def test_a_function_may_select(model: Model) -> None:
    def last(oracle: ModelOracle, units: Sequence[Unit], budget: Budget) -> Selection:
        return Selection((Step(units[-1]),), 0, nested=False)

    plan = select(model, "1 unit", data=DATA, select=last)
    assert plan.drop == parse(["3.mlp"]) and plan.why["select"] == "last"


def test_wrong_names_are_told_the_right_ones(model: Model) -> None:
    with pytest.raises(OptionError, match=r"unknown selector 'gredy'\. Did you mean 'greedy'"):
        select(model, "1 unit", data=DATA, select="gredy")
    with pytest.raises(OptionError, match=r"unknown metric 'los'\. Did you mean 'loss'"):
        score(model, DATA, "los")
    with pytest.raises(OptionError, match="lowest has no option 'exact'; it has: per"):
        select(model, "1 unit", data=DATA, select="lowest:exact=true")


def test_scores_include_what_is_protected(model: Model) -> None:
    assert tuple(score(model, DATA, "cosine").values) == model.layout.units("any")
    assert tuple(score(model, DATA, "l2", unit="attention").values) == model.layout.units("attention")


def test_the_metric_decides_how_units_are_chosen(model: Model) -> None:
    assert select(model, "2 units", data=DATA).why["select"] == SEARCH
    assert select(model, "2 units", data=DATA, metric="kl").why["select"] == SEARCH
    ranked = select(model, "2 units", data=DATA, metric="angular:tokens=last")
    assert (ranked.why["select"], ranked.why["metric"]) == ("lowest", "angular:tokens=last")
    with pytest.raises(OptionError, match=r"^greedy goes by what whole plans cost \(loss, .*\), not by cosine;"):
        select(model, "2 units", data=DATA, metric="cosine", select="greedy")


def test_a_smaller_model_is_another_model(model: Model) -> None:
    plan = select(model, "1 block", data=DATA)
    smaller = drop(model, plan)
    assert smaller.reference.blocks == 3 and smaller.reference.fingerprint != model.reference.fingerprint
    with pytest.raises(PlanError, match="this plan is for"):
        drop(smaller, plan)
    with pytest.raises(PlanError, match="this plan is for"):
        drop(model, select(smaller, "1 block", data=DATA))


# Other draws of the calibration rows


def test_stability_counts_how_often_each_unit_is_chosen(model: Model, tmp_path: Path) -> None:
    draws = [random_text(seed) for seed in (1, 2, 3)]
    options = {"unit": "any", "metric": "loss", "select": "greedy", "protect": "none"}
    found = stability(model, "40%", draws, memo=tmp_path / "losses.jsonl", **options)
    plans = [select(model, "40%", data=draw, **options) for draw in draws]  # type: ignore[arg-type]
    every = [str(unit) for plan in plans for unit in plan.drop]
    assert found == {"draws": 3, "chosen": {unit: every.count(unit) for unit in found["chosen"]}}
    assert set(found["chosen"]) == set(every) and len(set(every)) > len(plans[0].drop)  # the draws do differ
    assert len(list(tmp_path.glob("losses-draw-*.jsonl"))) == 3


def test_draws_that_are_alike_say_nothing(model: Model) -> None:
    data = random_text(1)
    again = data.rows(torch.tensor([2, 0, 1]))  # the same rows in another order
    with pytest.warns(UserWarning, match="all draws are alike"):
        stability(model, "1 block", [data, again], metric="cosine", unit="block")
