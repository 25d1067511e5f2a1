"""``without`` for a moment is ``drop`` for good, in full forwards and with the cache, and leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import naive
from depthprune import surgery
from depthprune.errors import DepthpruneError
from depthprune.model import Model
from depthprune.surgery import drop, without
from families import EXACT, NEEDS_POSITIONS, cache_gap, names

ONE_STACK = names("decoder") + names("encoder")


def trace(net: nn.Module) -> dict[str, Any]:
    """All that surgery could leave behind: plain attributes of every module, replaced forwards, the configuration."""
    simple = (bool, int, float, str, type(None))
    found: dict[str, Any] = {
        f"{path}.{key}": value if isinstance(value, simple) else id(value)
        for path, module in net.named_modules()
        for key, value in vars(module).items()
        if (isinstance(value, simple) or key == "forward") and not key.endswith("_state")  # of the last decoding
    }
    for path, module in net.named_modules():
        found[f"{path} is"] = id(module)
    config: Any = net.config
    found["config"] = config.to_json_string(use_diff=False)
    found["config vars"] = repr(sorted(vars(config.get_text_config(decoder=True)).items(), key=lambda item: item[0]))
    return found


def same_weights(net: nn.Module, before: dict[str, Tensor]) -> bool:
    now = net.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], value) for name, value in before.items())


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def droppable(name: str, model: Model) -> dict[str, tuple[Any, ...]]:
    found = cases.plans(model.layout)
    return {sort: units for sort, units in found.items() if (name, sort) not in cases.REFUSED}


@pytest.mark.parametrize("name", ONE_STACK)
def test_without_and_drop_agree_with_swapped_modules(name: str) -> None:
    model, tokens = cases.model(name), cases.text().tokens
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    dense, traces = naive.logits(model.net, tokens), trace(model.net)
    for sort, units in droppable(name, model).items():
        smaller = drop(model, cases.plan(model, units))
        with without(model, units):
            muted = naive.logits(model.net, tokens)
        assert trace(model.net) == traces, sort
        with naive.removed(model.net, units):
            swapped = naive.logits(model.net, tokens)
        dropped = naive.logits(smaller.net, tokens)
        assert torch.equal(muted, dropped), sort
        assert largest(muted, swapped) <= 1e-5 * float(swapped.abs().max()), sort
        assert largest(muted, dense) > 0.05, sort
        assert smaller.parameters == model.parameters - model.layout.freed(units), sort
        assert smaller.parameters == sum(p.numel() for p in {id(p): p for p in smaller.net.parameters()}.values())
    assert trace(model.net) == traces
    assert same_weights(model.net, before)
    assert torch.equal(naive.logits(model.net, tokens), dense)


@pytest.mark.parametrize("name", names("decoder"))
def test_cached_decoding_is_the_full_forward(name: str) -> None:
    model, positions = cases.model(name), name in NEEDS_POSITIONS | cases.KEEPS_SLOT
    own = cache_gap(model.net, positions=positions)  # without positions, the model has to count them by its cache
    allowed = max(3 * own, EXACT * float(naive.logits(model.net, cases.text().tokens).abs().max()))
    assert math.isinf(own) == (name in ("openai_gpt", "rwkv"))
    traces = trace(model.net)
    for sort, units in droppable(name, model).items():
        with without(model, units):
            assert cache_gap(model.net, positions=positions) <= allowed, (sort, "without")
        smaller = drop(model, cases.plan(model, units))
        assert cache_gap(smaller.net, positions=positions) <= allowed, (sort, "drop")
    assert cache_gap(model.net, positions=positions) == own
    assert trace(model.net) == traces


def test_hybrid_blocks_count_positions_where_no_keys_are_written() -> None:
    """A limit, seen: Falcon-H1 without the attention of block 0 decodes wrongly where no position ids are given."""
    model = cases.model("falcon_h1")
    with without(model, model.layout.units("attention")[:1]):
        assert cache_gap(model.net, positions=False) > 100 * EXACT
        assert cache_gap(model.net) < EXACT
    with without(model, model.layout.units("attention")[1:2]):
        assert cache_gap(model.net, positions=False) < EXACT


@pytest.mark.parametrize(("name", "sort"), sorted(key for key in cases.REFUSED if key[0] in ONE_STACK))
def test_what_cannot_be_dropped_is_refused_in_one_line(name: str, sort: str) -> None:
    model = cases.model(name)
    before, traces = naive.logits(model.net, cases.text().tokens), trace(model.net)
    with pytest.raises(DepthpruneError) as refusal:
        drop(model, cases.plan(model, cases.plans(model.layout)[sort]))
    message = str(refusal.value)
    assert cases.REFUSED[name, sort] in message and "\n" not in message
    assert trace(model.net) == traces
    assert torch.equal(naive.logits(model.net, cases.text().tokens), before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen2_sliding", "jamba"])
def test_an_exception_inside_leaves_no_trace_either(name: str) -> None:
    model, tokens = cases.model(name), cases.text().tokens
    dense, traces = naive.logits(model.net, tokens), trace(model.net)
    units = cases.plans(model.layout)["mixed"]
    with pytest.raises(ZeroDivisionError), without(model, units):
        assert trace(model.net) != traces
        assert largest(naive.logits(model.net, tokens), dense) > 0.05
        raise ZeroDivisionError
    assert trace(model.net) == traces
    assert torch.equal(naive.logits(model.net, tokens), dense)


@pytest.mark.parametrize("leftover", ["forward", "slot", "sharing"])
def test_the_trace_sees_what_is_left_behind(leftover: str) -> None:
    model = cases.model("llama")
    traces = trace(model.net)
    block = naive.stack_of(model.net)[1]
    if leftover == "forward":
        block.mlp.forward = lambda stream: stream * 0  # type: ignore[union-attr]
    elif leftover == "slot":
        block.self_attn.layer_idx = 0  # type: ignore[union-attr]
    else:
        model.net.config.kv_sharing_modes = ["reuse", None, None, None]
    assert trace(model.net) != traces


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2_sliding"])
def test_without_slots_of_its_own_the_cache_goes_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.model(name)
    units = cases.plans(model.layout)["attention"]
    assert units[0].block == 0
    with without(model, units):
        assert cache_gap(model.net, positions=False) <= EXACT * 10
    monkeypatch.setattr(surgery, "cache_slots", lambda *_: None)
    with without(model, units):
        assert cache_gap(model.net, positions=False) > 100 * EXACT


def test_a_block_that_keeps_its_old_number_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.model("llama")
    plan = cases.plan(model, cases.plans(model.layout)["block"])
    assert cache_gap(drop(model, plan).net) <= EXACT
    monkeypatch.setattr(surgery, "renumber", lambda *_: None)
    monkeypatch.setattr(surgery, "prove", lambda *_: "")  # which would refuse it
    net = drop(model, plan).net
    for module in net.modules():
        if getattr(module, "layer_idx", None) == 3:
            module.layer_idx = 2  # two attentions on one slot
    with torch.no_grad():
        assert cache_gap(net) > 100 * EXACT
