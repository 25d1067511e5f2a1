"""Finding blocks and sublayers, and proving them: sizes, kinds, order, norms, and refusals with their reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
from depthprune.discover import discover, find_stack, size
from depthprune.errors import LayoutError, PlanError
from depthprune.layout import Block
from depthprune.model import Model
from depthprune.units import Unit, parse
from families import tiny

EXPECTED: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "llama": ("model.layers", [("self_attn", "attention"), ("mlp", "mlp")]),
    "gpt2": ("transformer.h", [("attn", "attention"), ("mlp", "mlp")]),
    "gpt_neox": ("gpt_neox.layers", [("attention", "attention"), ("mlp", "mlp")]),
    "opt": ("model.decoder.layers", [("self_attn", "attention"), ("fc1+fc2", "mlp")]),
    "mamba": ("backbone.layers", [("mixer", "mixer")]),
    "granitemoeshared": (
        "model.layers",
        [("self_attn", "attention"), ("block_sparse_moe", "mlp"), ("shared_mlp", "mlp")],
    ),
    "dots1": ("model.layers", [("self_attn", "attention"), ("mlp", "mlp")]),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_blocks_and_sublayers_are_found_in_order(name: str, subject: Callable[..., Model]) -> None:
    layout = subject(name).layout
    path, sublayers = EXPECTED[name]
    assert layout.path == path
    for block in layout.blocks:
        assert [(s.name, s.kind) for s in block.sublayers] == sublayers and block.reason == ""


def test_kinds_differ_from_block_to_block(subject: Callable[..., Model]) -> None:
    layout = subject("qwen3_next").layout
    kinds = {"linear_attention": ("linear_attn", "mixer"), "full_attention": ("self_attn", "attention")}
    wanted = [kinds[kind] for kind in subject("qwen3_next").net.config.layer_types]
    assert [(block.sublayers[0].name, block.sublayers[0].kind) for block in layout.blocks] == wanted
    assert len(layout.units("mlp")) == 4 and len(layout.units("any")) == 8
    assert {layout.kind(unit) for unit in layout.units("mixer")} == {"mixer"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "gptj", "llama_tied", "mixtral", "opt", "phi"])
def test_sizes_add_up(name: str, subject: Callable[..., Model]) -> None:
    model = subject(name)
    layout = model.layout
    assert model.parameters == sum(p.numel() for p in model.net.parameters())
    for block, module in zip(layout.blocks, naive.stack_of(model.net), strict=True):
        assert block.parameters == sum(p.numel() for p in module.parameters())
        together = parse(f"{block.index}.{s.name}" for s in block.sublayers)
        assert layout.freed(together) == layout.freed(parse([str(block.index)])) == block.parameters
        assert sum(s.parameters for s in block.sublayers) <= block.parameters


def served(block: Block) -> dict[str, frozenset[str]]:
    return {norm.name: norm.served for norm in block.serves}


def test_what_goes_with_several_mixers_is_counted(subject: Callable[..., Model]) -> None:
    layout = subject("falcon_h1").layout  # attention and Mamba share a norm and a slot of the cache; then an MLP
    block = layout.blocks[1]
    shared = next(norm for norm in block.serves if len(norm.served) == 2)
    one, both = parse(["1.mamba"]), parse(["1.mamba", "1.self_attn"])
    assert layout.kv_freed(one) == 0 and layout.kv_freed(both) == block.kv_bytes_per_token > 0
    assert layout.kv_freed(parse(["1.self_attn"])) == block.kv_bytes_per_token
    assert layout.freed(both) == sum(block.sublayer(u.sublayer).parameters for u in both) + shared.parameters


def test_a_norm_goes_with_the_last_sublayer_that_it_serves(subject: Callable[..., Model]) -> None:
    llama, gptj = subject("llama").layout.blocks[0], subject("gptj").layout.blocks[0]
    assert served(llama) == {"input_layernorm": {"self_attn"}, "post_attention_layernorm": {"mlp"}}
    assert llama.idle(frozenset({"mlp"})) == ("post_attention_layernorm",)
    assert served(gptj) == {"ln_1": {"attn", "mlp"}}
    assert gptj.idle(frozenset({"mlp"})) == () and gptj.idle(frozenset({"attn", "mlp"})) == ("ln_1",)
    assert sum(s.parameters for s in llama.sublayers) == llama.parameters
    assert sum(s.parameters for s in gptj.sublayers) == gptj.parameters - 2 * 32
    gemma = served(subject("gemma2").layout.blocks[0])
    assert gemma["post_attention_layernorm"] == {"self_attn"} and gemma["pre_feedforward_layernorm"] == {"mlp"}


def test_the_cache_is_measured(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    per_block = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, 4 bytes
    assert [block.kv_bytes_per_token for block in model.layout.blocks] == [per_block] * 4
    assert model.layout.kv_freed(parse(["1.self_attn", "2", "3.mlp"])) == 2 * per_block
    assert discover(model.net, 2).kv_bytes_per_token == 2 * per_block
    assert subject("gpt2").layout.kv_bytes_per_token == 4 * 2 * 32 * 4
    hybrid = subject("qwen3_next").layout
    assert sum(block.kv_bytes_per_token > 0 for block in hybrid.blocks) == len(hybrid.units("attention"))


def test_all_sublayers_of_a_block_are_the_block(subject: Callable[..., Model]) -> None:
    layout = subject("llama").layout
    assert layout.gone(parse(["2.mlp", "1.mlp", "2.self_attn"])) == {1: frozenset({"mlp"}), 2: None}
    assert list(layout.gone(parse(["3", "0.mlp"]))) == [0, 3]
    assert layout.gone(parse(["1", "1.mlp"])) == {1: None}


@pytest.mark.parametrize("unit", ["4", "1.attn", "decoder.1"])
def test_units_that_do_not_exist_are_named(unit: str, subject: Callable[..., Model]) -> None:
    with pytest.raises(PlanError) as caught:
        subject("llama").layout.gone(parse([unit]))
    assert "\n" not in str(caught.value)
    assert "blocks 0 to 3" in str(caught.value) or "self_attn, mlp" in str(caught.value)
    with pytest.raises(PlanError, match="zero is not absent"):
        subject("bloom").layout.gone(parse(["1.mlp"]))


def replaced(model: Any, index: int, forward: Callable[..., Any]) -> None:
    block = naive.stack_of(model)[index]
    own = block.forward
    block.forward = lambda *args, **kwargs: forward(block, own, *args, **kwargs)


def test_a_block_that_adds_a_little_is_not_proven() -> None:
    model = tiny("llama")
    replaced(model, 1, lambda _, own, *args, **kwargs: own(*args, **kwargs) + 1e-3)
    found = discover(model)
    assert [bool(block.sublayers) for block in found.blocks] == [True, False, True, True]
    assert found.blocks[1].reason == (
        "with self_attn, mlp returning zeros it still changes the stream by 0.001, so zero is not absent"
    )
    assert [str(unit) for unit in found.units("any")][2] == "1"


def test_a_sublayer_that_adds_the_residual_itself_is_not_proven() -> None:
    def forward(block: Any, _: Any, stream: Tensor, **kwargs: Any) -> Tensor:
        middle = stream + block.self_attn(block.input_layernorm(stream), **kwargs)[0]
        result: Tensor = block.mlp(middle)
        return result

    model: Any = tiny("llama")
    block = naive.stack_of(model)[2]
    norm, mlp = block.post_attention_layernorm, block.mlp.forward  # type: ignore[union-attr]
    block.mlp.forward = lambda stream: stream + mlp(norm(stream))  # type: ignore[union-attr, operator]
    before = naive.logits(tiny("llama"), torch.arange(3, 9)[None])
    replaced(model, 2, forward)
    assert torch.equal(naive.logits(model, torch.arange(3, 9)[None]), before), "the same arithmetic, other seams"
    found = discover(model)
    assert not found.blocks[2].sublayers and "zero is not absent" in found.blocks[2].reason


def test_a_part_without_a_known_name_is_named() -> None:
    model: Any = tiny("llama")
    block = naive.stack_of(model)[0]
    block.adapter = nn.Linear(32, 32)
    replaced(model, 0, lambda block, own, *args, **kwargs: block.adapter(own(*args, **kwargs)))
    assert discover(model).blocks[0].reason == "its part 'adapter' is neither attention, nor mlp, nor mixer by name"


def test_a_part_that_runs_twice_is_named() -> None:
    model: Any = tiny("llama")
    replaced(model, 0, lambda block, own, stream, **kwargs: own(own(stream, **kwargs), **kwargs))
    assert "runs more than once" in discover(model).blocks[0].reason


def test_stacks_that_cannot_be_found_are_refused() -> None:
    model: Any = tiny("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(LayoutError, match=r"cannot find the stack of blocks in LlamaForCausalLM: no module list of"):
        find_stack(model)
    twin: Any = tiny("llama")
    twin.other = nn.ModuleList([nn.Linear(1, 1) for _ in range(4)])
    with pytest.raises(LayoutError, match="several candidates"):
        find_stack(twin)


def test_a_block_called_twice_is_refused() -> None:
    model: Any = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(LayoutError, match=r"this model calls block 0 2 times in one forward, not once"):
        discover(model)


def test_discovery_leaves_no_trace() -> None:
    model = tiny("gemma2")
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    discover(model)
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys() and not module._forward_hooks
    assert size(model) == sum(p.numel() for p in model.parameters())


def test_a_unit_of_one_block(subject: Callable[..., Model]) -> None:
    layout = subject("llama").layout
    assert layout.kind(Unit("", 1)) == "block" and layout.kind(Unit("", 1, "mlp")) == "mlp"
    assert layout.units("block") == tuple(Unit("", index) for index in range(4))


def test_the_canonical_form_is_the_shortest(subject: Callable[..., Model]) -> None:
    layout = subject("llama").layout

    def short(*names: str) -> list[str]:
        return [str(unit) for unit in layout.canonical(parse(names))]

    assert short("2.mlp", "0.mlp", "2.self_attn", "3") == ["0.mlp", "2", "3"]
    assert short("1.self_attn") == ["1.self_attn"] and short() == []
    assert layout.gone(parse(["2"])) == layout.gone(parse(["2.mlp", "2.self_attn"]))
