"""Dropping for good and for a moment: what stays shared, what is refused, how blocks are renumbered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import naive
from depthprune import surgery
from depthprune.errors import LayoutError, PlanError
from depthprune.model import Model
from depthprune.plan import Plan, Reference
from depthprune.shrink import shrink
from depthprune.surgery import clone, drop, renumber, without
from depthprune.units import parse
from families import tiny

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def plan(model: Model, *units: str) -> Plan:
    return Plan(model.reference, parse(units))


def test_the_smaller_model_shares_its_weights(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    smaller = drop(model, plan(model, "1", "2.mlp"))
    own = {parameter.data_ptr() for parameter in model.net.parameters()}
    assert all(parameter.data_ptr() in own for parameter in smaller.net.parameters() if parameter.numel())
    assert smaller.net.config.num_hidden_layers == 3 and model.net.config.num_hidden_layers == 4
    assert not smaller.net.training and smaller.plan == plan(model, "1", "2.mlp")
    assert [str(unit) for unit in smaller.layout.units("any")] == [
        "0.self_attn", "0.mlp", "1.self_attn", "2.self_attn", "2.mlp",
    ]  # fmt: skip


def test_blocks_are_really_gone_and_renumbered(subject: Callable[..., Model]) -> None:
    model = subject("qwen2_sliding")
    smaller = drop(model, plan(model, "0", "2"))
    blocks = naive.stack_of(model.net)
    left: Any = smaller.net.model.layers
    assert [block.self_attn.layer_idx for block in left] == [0, 1]
    assert smaller.net.config.layer_types == [model.net.config.layer_types[index] for index in (1, 3)]
    assert left[1].mlp.down_proj.weight is blocks[3].mlp.down_proj.weight  # type: ignore[union-attr]
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_dropping_twice_is_dropping_together(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    once = drop(model, plan(model, "1", "3"))
    first = drop(model, plan(model, "1"))
    twice = drop(first, Plan(Reference(""), parse(["2"])))
    assert torch.equal(naive.logits(twice.net, TOKENS), naive.logits(once.net, TOKENS))


@pytest.mark.parametrize("count", range(6))
def test_each_prefix_of_a_plan_is_a_plan(count: int, subject: Callable[..., Model]) -> None:
    model = subject("gemma2")
    whole = plan(model, "2.self_attn", "1", "0.mlp", "3.mlp", "2.mlp")
    prefix = whole.prefix(count)
    assert prefix.drop == whole.drop[:count]
    with without(model, prefix.drop):
        muted = naive.logits(model.net, TOKENS)
    assert torch.equal(naive.logits(drop(model, prefix).net, TOKENS), muted)
    with naive.removed(model.net, prefix.drop):
        torch.testing.assert_close(naive.logits(model.net, TOKENS), muted, rtol=1e-5, atol=1e-5)
    assert drop(model, prefix).parameters == model.parameters - model.layout.freed(prefix.drop)


def test_an_empty_plan_changes_nothing(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    assert drop(model, plan(model)) is model
    with without(model, []) as same:
        assert same is model


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["0", "1", "2", "3"], "drops every block"),
        (["0", "1.self_attn", "1.mlp", "2", "3"], "drops every block"),
        ([f"{index}.self_attn" for index in range(4)], "every attention"),
        (["9"], "blocks 0 to 3"),
        (["1.attn"], "no droppable sublayer 'attn'"),
    ],
)
def test_impossible_plans_are_refused(units: list[str], message: str, subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with pytest.raises(PlanError, match=message) as caught:
        drop(model, plan(model, *units))
    assert "\n" not in str(caught.value)
    if "no " in message or "blocks" in message:
        with pytest.raises(PlanError), without(model, units):
            raise AssertionError("not reached")


def test_a_plan_for_another_model_is_refused(subject: Callable[..., Model]) -> None:
    with pytest.raises(PlanError, match="fingerprint"):
        drop(subject("llama"), plan(subject("llama", 1), "1"))


def test_a_configuration_that_does_not_fit_leaves_shells(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shrink
    model = subject("qwen2_sliding")
    right = drop(model, plan(model, "1"))
    monkeypatch.setattr(surgery, "shrink", lambda config, kept, total: own(config, kept[::-1], total))
    shells = drop(model, plan(model, "1"))
    assert (len(right.layout.blocks), len(shells.layout.blocks)) == (3, 4)
    assert right.parameters == shells.parameters
    assert torch.equal(naive.logits(right.net, TOKENS), naive.logits(shells.net, TOKENS))


def test_a_configuration_that_does_not_fit_is_refused_where_there_are_no_shells(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject("opt_postnorm")
    assert len(drop(model, plan(model, "1")).layout.blocks) == 3
    monkeypatch.setattr(surgery, "prove", lambda *_: "its configuration says otherwise")
    with pytest.raises(LayoutError, match=r"^1 unit \(1\) cannot be dropped from OPTForCausalLM: its conf[^\n]+wise$"):
        drop(model, plan(model, "1"))


def test_wrong_arithmetic_is_refused(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(net: Any) -> Any:
        copy = clone(net)
        copy.model.norm.weight = torch.nn.Parameter(net.model.norm.weight * 1.01)  # type: ignore[union-attr]
        return copy

    model = subject("llama")
    monkeypatch.setattr(surgery, "clone", scaled)
    with pytest.raises(LayoutError, match=r"it computes something else \(logits differ by [^\n]+\)$"):
        drop(model, plan(model, "1"))


def test_a_clone_has_its_own_modules_and_the_same_weights() -> None:
    net: Any = tiny("llama_tied")
    copy: Any = clone(net)
    assert copy.model.layers[0] is not net.model.layers[0] and copy.config is not net.config
    assert all(a is b for a, b in zip(copy.parameters(), net.parameters(), strict=True))
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_a_model_that_was_just_used_can_be_dropped_from(subject: Callable[..., Model]) -> None:
    model = subject("recurrent_gemma")
    model.net(input_ids=TOKENS)  # with gradients: its modules now hold states that hang on a graph
    smaller = drop(model, plan(model, "1.mlp_block"))
    with without(model, ["1.mlp_block"]):
        assert torch.equal(naive.logits(smaller.net, TOKENS), naive.logits(model.net, TOKENS))


def test_renumbering_leaves_other_numbers_alone() -> None:
    block: Any = torch.nn.Module()
    block.inner = torch.nn.Linear(1, 1)
    block.layer_idx, block.inner.layer_idx, block.inner.layer_id = 3, 2, 3
    block.is_causal, block.layer_index = True, None
    renumber(block, 3, 1)
    assert (block.layer_idx, block.inner.layer_idx, block.inner.layer_id, block.is_causal) == (1, 2, 1, True)
    assert block.layer_index is None


def test_generation_works_without_units(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with without(model, ["0.self_attn", "2"]):
        muted = model.net.generate(TOKENS, **options)
    assert torch.equal(drop(model, plan(model, "0.self_attn", "2")).net.generate(TOKENS, **options), muted)
    assert not torch.equal(model.net.generate(TOKENS, **options), muted)
