"""Stand-ins: no effect when made, the right one when filled, and still there after writing and reading."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import naive
from command import hold, run
from depthprune import shrink, standin, surgery
from depthprune.errors import ExportError, LayoutError, PlanError
from depthprune.export import check_many, expect, export
from depthprune.export.check import Expected
from depthprune.model import Model, load, wrap
from depthprune.plan import Plan, Reference, with_stand_ins
from depthprune.skip import Skip, skip_sublayers
from depthprune.standin import StandIn, parameters, planned, stand_ins
from depthprune.surgery import drop, without
from depthprune.units import parse
from families import EXACT, cache_gap, tiny
from tiny_text import make_tokenizer

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
A, M = "attention", "mlp"

# The norms that work for each sublayer alone; by what the block multiplies what the sublayer returns.
Parts = dict[str, tuple[str, ...]]
LLAMA: Parts = {"self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}
POST: Parts = {"self_attn": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm",)}
SANDWICH: Parts = {
    "self_attn": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
FAMILIES: dict[str, tuple[Parts, float]] = {
    "llama": (LLAMA, 1.0),
    "llama_tied": (LLAMA, 1.0),
    "llama_bias": (LLAMA, 1.0),
    "qwen2": (LLAMA, 1.0),
    "qwen3": (LLAMA, 1.0),
    "granite": (LLAMA, 0.8),
    "gpt2": ({"attn": ("ln_1",), "mlp": ("ln_2",)}, 1.0),
    "opt": ({"self_attn": ("self_attn_layer_norm",), "fc1+fc2": ("final_layer_norm",)}, 1.0),
    "phi": ({"self_attn": (), "mlp": ()}, 1.0),
    "gpt_neox": ({"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}, 1.0),
    "cohere": ({"self_attn": (), "mlp": ()}, 1.0),
    "stablelm_parallel": ({"self_attn": (), "mlp": ()}, 1.0),
    "gemma2": (SANDWICH, 1.0),
    "olmo2": (POST, 1.0),
    "mixtral": (LLAMA, 1.0),
    "falcon_h1": ({"mamba": (), "self_attn": (), "feed_forward": ("pre_ff_layernorm",)}, 1.0),
    "mamba": ({"mixer": ("norm",)}, 1.0),
    "nemotron_h": ({"mixer": ("norm",)}, 1.0),
}
PLANS = {
    "a block": ["1"],
    "two blocks": ["1", "2"],
    "the first block": ["0"],
    "the first sublayer": ["2.first"],
    "the last sublayer": ["2.last"],
    "some of each": ["0.last", "1", "3.first"],
}
PLAIN = ("llama", "llama_tied", "llama_bias", "granite", "gpt2", "opt", "phi", "gpt_neox", "falcon_h1", "mamba")


def model_of(name: str) -> Model:
    return wrap(tiny(name), None, name)


def plan_of(model: Model, sort: str, form: str) -> Plan:
    """A plan of one of the sorts, with stand-ins."""
    units = []
    for text in PLANS[sort]:
        block, _, which = text.partition(".")
        names = [s.name for s in model.layout.blocks[int(block)].sublayers]
        units.append(f"{block}.{names[0 if which == 'first' else -1]}" if which else block)
    return with_stand_ins(Plan(model.reference, model.layout.canonical(parse(units))), form)


def fill(model: Model, seed: int = 0) -> dict[str, Tensor]:
    """Give all stand-ins random numbers; how far each parameter moved."""
    generator, moved = torch.Generator().manual_seed(seed), {}
    for name in parameters(model):
        path, _, last = name.rpartition(".")
        owner, old = model.net.get_submodule(path), model.net.get_parameter(name)
        new = old.detach() + torch.randn(old.shape, generator=generator) * 0.5
        setattr(owner, last, nn.Parameter(new))
        moved[name] = new - (old.detach() if last == "bias" else 0)
    return moved


def into(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


@contextmanager
def replaced(
    model: Model, name: str, found: tuple[StandIn, ...], moved: dict[str, Tensor], gone: Plan
) -> Iterator[Any]:
    """The dense network with hooks in place of the dropped parts: they answer constants, or maps of their input."""
    net, (norms, multiplier) = model.net, FAMILIES[name]
    stack, hooks, done = naive.stack_of(net), [], set()

    def hook(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        def run(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            new = change(into(args, kwargs))
            return new if isinstance(output, Tensor) else (new, *output[1:])

        hooks.append(module.register_forward_hook(run, with_kwargs=True))

    for unit in gone.drop:
        one = next((each for each in found if each.unit == unit), None)
        adds = _adds(one, moved, done) if one else lambda x: torch.zeros_like(x)
        block = stack[unit.block]
        if not unit.sublayer:
            hook(block, lambda x, adds=adds: x + adds(x))
            continue
        for norm in norms[unit.sublayer]:
            hook(block.get_submodule(norm), lambda x: x)
        first, *rest = unit.sublayer.split("+")
        if rest:  # OPT: the map comes after the activation
            hook(block.get_submodule(first), lambda x: x)
        hook(block.get_submodule((first, *rest)[-1]), lambda x, adds=adds: adds(x) / multiplier)
        if rest:
            wrong = block.get_submodule(rest[-1])
            wrong.forward = lambda x: x
            hooks.append(_Restored(wrong))
    try:
        yield net
    finally:
        for each in hooks:
            each.remove()


class _Restored:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)


def _adds(one: StandIn, moved: dict[str, Tensor], done: set[str]) -> Callable[[Tensor], Tensor]:
    """What a stand-in adds to the stream; of a bias that several units share, the first gets all."""
    if one.kind == "lowrank":
        down, up = (moved[name] for name in one.names)
        return lambda x: one.scale * (x @ down.T @ up.T)
    constant = torch.zeros(32) if one.names[0] in done else one.scale * moved[one.names[0]]
    done.add(one.names[0])
    return lambda x: torch.zeros_like(x[..., :1]) + constant


@pytest.mark.parametrize("form", ["bias", "lowrank:4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_zero_effect_when_made_and_the_right_one_when_filled(name: str, form: str) -> None:
    model = model_of(name)
    for sort in PLANS:
        plan = plan_of(model, sort, form)
        if not model.layout.viable(plan.drop):
            continue
        smaller, bare = drop(model, plan), drop(model, replace(plan, stand_in={}))
        assert torch.equal(naive.logits(smaller.net, TOKENS), naive.logits(bare.net, TOKENS)), sort
        assert planned(model, smaller.plan or plan) == smaller.parameters
        assert smaller.parameters == sum(p.numel() for p in smaller.net.parameters())
        found = stand_ins(smaller)
        assert [one.unit for one in found] == list(plan.drop)
        assert {one.kind for one in found} == {form.partition(":")[0]} and {one.rank for one in found} == {
            0 if form == "bias" else 4
        }
        held = [n for n, part in smaller.net.named_modules() if isinstance(part, Skip) and list(part.parameters())]
        assert len(held) == len({one.names for one in found if any(n.startswith(tuple(held)) for n in one.names)})
        moved = fill(smaller)
        filled = naive.logits(smaller.net, TOKENS)
        assert not torch.allclose(filled, naive.logits(bare.net, TOKENS), atol=1e-2)
        with replaced(model, name, found, moved, plan):
            want = naive.logits(model.net, TOKENS)
        assert (filled - want).abs().max() <= 2e-4 * want.abs().max(), (sort, found)
        if "input_ids" in smaller.net.forward.__code__.co_varnames and name in ("llama", "gpt2", "gemma2", "gpt_neox"):
            assert cache_gap(smaller.net, positions=False) <= 10 * EXACT, sort


# Where they lie


def test_biases_go_where_a_map_can_have_one() -> None:
    def places(name: str, sort: str) -> tuple[list[str], bool]:
        model = model_of(name)
        smaller = drop(model, plan_of(model, sort, "bias"))
        return parameters(smaller), hasattr(smaller.net.config, "depthprune")

    for name in PLAIN:
        (one,), uneven = places(name, "a block")
        assert ".0." in one and not uneven, name
        (one,), uneven = places(name, "the first block")
        assert ".0." in one and uneven, name
    assert places("gpt2", "two blocks") == (["transformer.h.0.mlp.c_proj.bias"], False)
    assert places("llama", "the last sublayer") == (["model.layers.2.self_attn.o_proj.bias"], True)
    assert places("qwen2", "a block") == (["model.layers.1.self_attn.bias"], True)
    # A parallel block: what the attention adds is not read by the MLP beside it, which is the next to write.
    assert places("gpt_neox", "the first sublayer") == (["gpt_neox.layers.2.mlp.dense_4h_to_h.bias"], True)
    assert places("gpt_neox", "the last sublayer") == (["gpt_neox.layers.2.attention.dense.bias"], True)
    assert places("falcon_alibi", "the first sublayer") == (["transformer.h.1.mlp.dense_4h_to_h.bias"], True)


def test_a_flag_adds_biases_of_zero_and_nothing_else() -> None:
    model = model_of("llama")
    smaller = drop(model, plan_of(model, "a block", "bias"))
    new = {name for name, _ in smaller.net.named_parameters()} - {name for name, _ in model.net.named_parameters()}
    assert smaller.net.config.mlp_bias and not smaller.net.config.attention_bias and not model.net.config.mlp_bias
    assert new == {f"model.layers.{i}.mlp.{part}_proj.bias" for i in range(3) for part in ("up", "gate", "down")}
    assert not any(smaller.net.get_parameter(name).any() for name in new)
    assert smaller.plan is not None and smaller.plan.why["stand_ins"]["flags"] == ["mlp_bias"]


def test_the_weights_of_a_map_are_seeded_and_scaled() -> None:
    model = model_of("llama")
    nets = [drop(model, plan_of(model, "two blocks", "lowrank:8")).net for _ in range(2)]
    state = torch.get_rng_state()
    first = nets[0].model.layers[1].self_attn
    assert torch.equal(first.down.weight, nets[1].model.layers[1].self_attn.down.weight)
    assert not torch.equal(first.down.weight, nets[0].model.layers[2].self_attn.down.weight)
    assert first.down.weight.std().item() == pytest.approx(32**-0.5, rel=0.2) and not first.up.weight.any()
    assert first.down.weight.requires_grad and torch.equal(torch.get_rng_state(), state)


def test_the_smaller_model_is_found_as_it_is() -> None:
    model = model_of("llama")
    smaller = drop(model, with_stand_ins(Plan(model.reference, parse(["0.self_attn", "1", "2.mlp"])), "lowrank:4"))
    fill(smaller)
    again = wrap(smaller.net, None, "filled").layout
    for layout in (smaller.layout, again):
        assert [str(unit) for unit in layout.units("any")] == ["0.mlp", "1", "2.self_attn", "3.self_attn", "3.mlp"]
        assert [block.held for block in layout.blocks] == [256, 256, 256, 0]
        assert layout.blocks[1].reason == "it has no weighted parts besides norms and stand-ins"
        assert layout.blocks[1].parameters == 256
        assert all("." not in norm.name and norm.served for block in layout.blocks for norm in block.serves)
        # The last sublayer of a block with a stand-in is not the block.
        assert layout.canonical(parse(["0.mlp"])) == parse(["0.mlp"])
        assert layout.freed(parse(["0.mlp"])) == layout.blocks[0].parameters - 256
    assert again.parameters == smaller.layout.parameters


def test_a_shared_norm_stays_for_the_map_that_reads_it() -> None:
    model = model_of("cohere")
    once = drop(model, with_stand_ins(Plan(model.reference, parse(["1.self_attn"])), "lowrank:4"))
    fill(once)
    serves = {norm.name: norm.served for norm in wrap(once.net, None, "").layout.blocks[1].serves}
    assert serves == {"input_layernorm": {"self_attn", "mlp"}}
    twice = drop(replace(once, plan=None), Plan(Reference("once"), parse(["1.mlp"])))
    assert not isinstance(twice.net.model.layers[1].input_layernorm, Skip)
    with without(once, ["1.mlp"]):
        assert torch.equal(naive.logits(once.net, TOKENS), naive.logits(twice.net, TOKENS))


# Cutting again


@pytest.mark.parametrize("form", ["bias", "lowrank:4"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_cutting_again_keeps_them(name: str, form: str) -> None:
    model = model_of(name)
    attention, mlp = (s.name for s in model.layout.blocks[0].sublayers)
    first = with_stand_ins(Plan(model.reference, parse(["0", f"2.{attention}"])), form)
    once = drop(model, first)
    moved = fill(once)
    for units in (["1"], [f"2.{mlp}"], [f"1.{attention}", f"3.{mlp}"]):
        second = with_stand_ins(Plan(Reference("once"), parse(units)), form)
        smaller = replace(once, layout=wrap(once.net, None, "").layout, plan=None)
        twice = drop(smaller, second)
        with without(once, units):
            want = naive.logits(once.net, TOKENS)
        torch.testing.assert_close(naive.logits(twice.net, TOKENS), want)
        assert twice.parameters == planned(smaller, twice.plan or second)
        kept = [p for n, p in twice.net.named_parameters() if any(p is once.net.get_parameter(m) for m in moved)]
        assert len(kept) == len(moved) or (form == "bias" and kept), "a bias goes with the map that holds it"
        fill(twice)
        with without(once, units):
            assert not torch.allclose(naive.logits(twice.net, TOKENS), want, atol=1e-2)


# What is refused


@pytest.mark.parametrize(
    ("name", "units", "stand_in", "says"),
    [
        ("llama", ["1"], {"1": "lowrank:33"}, "1 cannot have a stand-in of rank 33: the stream is only 32 wide"),
        ("llama", ["1.mlp"], {"1": "bias"}, "the plan has a stand-in for 1, but it does not drop all of it"),
        (
            "llama",
            ["1.mlp", "1.self_attn"],
            {"1.mlp": "bias", "1.self_attn": "lowrank:4"},
            "the plan has two stand-ins for block 1: give all its parts the same",
        ),
        (
            "bloom",
            ["1"],
            {"1": "bias"},
            "1 cannot have a stand-in: block 1 has only itself to drop (with self_attention,",
        ),
        (
            "openai_gpt",
            ["1", "2"],
            {"2": "lowrank:4"},
            "2 cannot have a stand-in: block 2 has only itself to drop (with",
        ),
        ("zamba", ["1", "2"], {"2": "bias"}, "2 cannot have a stand-in: block 2 has only itself to drop (its part"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name: str, units: list[str], stand_in: Any, says: str) -> None:
    model = model_of(name)
    with pytest.raises(PlanError) as caught:
        drop(model, Plan(model.reference, parse(units), stand_in=stand_in))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_both_sublayers_of_a_block_are_one_stand_in() -> None:
    model = model_of("llama")
    for stand_in in ({"1.mlp": "bias", "1.self_attn": "bias"}, {"1.mlp": "bias"}, {"1": "bias"}):
        smaller = drop(model, Plan(model.reference, parse(["1.mlp", "1.self_attn"]), stand_in=stand_in))
        assert [str(one.unit) for one in stand_ins(smaller)] == ["1"]
        assert Plan.from_json((smaller.plan or Plan(Reference(""), ())).to_json()) == smaller.plan


def test_a_model_that_does_not_hold_what_its_plan_says_is_refused() -> None:
    model = model_of("llama")
    plan = plan_of(model, "a block", "lowrank:4")
    with pytest.raises(PlanError, match=r"^this plan does not say where its stand-ins are; [^\n]*$"):
        stand_ins(replace(model, plan=plan))
    smaller = drop(model, plan)
    with pytest.raises(
        PlanError, match=r"^the model has no model\.layers\.1\.self_attn\.down\.weight, where [^\n]* 1$"
    ):
        stand_ins(replace(model, plan=smaller.plan))
    assert stand_ins(model) == () and parameters(drop(model, replace(plan, stand_in={}))) == []


def test_a_later_version_is_refused() -> None:
    net: Any = tiny("llama")
    net.config.depthprune = {"version": 3, "block": "LlamaDecoderLayer", "skip": {"1": {"mlp": 0}}}
    with pytest.raises(ValueError, match="written in version 3, later than 2"):
        skip_sublayers(net)


# Writing and reading


def test_they_come_back_by_every_route(tmp_path: Path) -> None:
    expected: dict[Path, Expected | None] = {}
    for name, sort, form in (
        ("llama", "two blocks", "bias"),
        ("llama_tied", "some of each", "lowrank:4"),
        ("gemma2", "two blocks", "bias"),
        ("mamba", "the first block", "bias"),
        ("opt", "the last sublayer", "lowrank:4"),
    ):
        model = model_of(name)
        smaller = drop(model, plan_of(model, sort, form))
        plan = smaller.plan or plan_of(model, sort, form)
        folder = tmp_path / f"{name}-{sort}".replace(" ", "-")
        if name in ("llama", "gemma2"):
            expected[export(smaller, folder)] = expect(model, plan)
            assert Plan.load(folder / "plan.json") == plan
        fill(smaller)
        filled = export(smaller, folder.with_name(folder.name + "-filled"))
        with torch.no_grad():
            expected[filled] = replace(
                expect(model, plan),
                tensors={"tokens": TOKENS, "logits": smaller.net(TOKENS, use_cache=False).logits.float()},
            )
    broken = tmp_path / "broken"
    export(smaller, broken)
    state = load_file(broken / "model.safetensors")
    save_file({n: t for n, t in state.items() if not n.endswith("up.weight")}, broken / "model.safetensors")
    expected[broken] = expected[filled]
    other = tmp_path / "other"
    export(smaller, other)
    config = json.loads((other / "config.json").read_text())
    config["depthprune"]["stand_in"] = {}
    (other / "config.json").write_text(json.dumps(config))
    expected[other] = expected[filled]
    for folder, proofs in check_many(expected).items():
        failed = [f"{proof.name} {proof.detail}" for proof in proofs if not proof.passed]
        if folder in (broken, other):
            assert any(("missing" if folder == broken else "unexpected") in line for line in failed), failed
        else:
            assert not failed, (folder.name, failed)
            assert len(proofs) == (5 if folder.name.startswith("llama-two") else 8 if "mamba" in folder.name else 10)


def test_a_folder_read_again_has_its_stand_ins(tmp_path: Path) -> None:
    model = model_of("qwen2")
    smaller = drop(model, plan_of(model, "some of each", "bias"))
    fill(smaller)
    folder = export(smaller, tmp_path / "out")
    make_tokenizer().save_pretrained(folder)
    for dtype in ("float32", "bfloat16"):
        again = replace(load(folder, device="cpu", dtype=dtype), plan=Plan.load(folder / "plan.json"))
        assert stand_ins(again) == stand_ins(smaller)
        for name in parameters(again):
            weight = again.net.get_parameter(name)
            assert weight.dtype == getattr(torch, dtype) and weight.device.type == "cpu"
            assert torch.equal(weight, smaller.net.get_parameter(name).to(weight.dtype))
    assert again.layout.units("any") == smaller.layout.units("any")


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_they_are_built_in_the_type_and_the_place_of_the_model(place: str) -> None:
    model = model_of("gpt2")
    smaller = drop(model, plan_of(model, "some of each", "lowrank:4"))
    with torch.device(place):
        built = type(model.net)(smaller.net.config).bfloat16()
        skip_sublayers(built)
    want = {name: tuple(tensor.shape) for name, tensor in smaller.net.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == want
    assert {(p.dtype, p.device.type) for p in built.parameters()} == {(torch.bfloat16, place)}


def test_form_plain_is_for_whole_blocks_without_shells(tmp_path: Path) -> None:
    model = model_of("llama")
    export(drop(model, plan_of(model, "two blocks", "bias")), tmp_path / "bias", "plain")
    with pytest.raises(ExportError, match=r"blocks 1, 2 are gone[^\n]*\(of 1, 2 their stand-ins are left\)"):
        export(drop(model, plan_of(model, "two blocks", "lowrank:4")), tmp_path / "map", "plain")


def test_loaders_that_know_nothing_of_them_fail(tmp_path: Path) -> None:
    model = model_of("llama")
    smaller = drop(model, plan_of(model, "two blocks", "lowrank:4"))
    spec = smaller.net.config.depthprune
    assert spec["version"] == 2 and spec["stand_in"] == {f"{i}.self_attn": {"rank": 4, "width": 32} for i in (1, 2)}
    assert spec["tombstone"] == "1.self_attn.q_proj.weight" and spec["kinds"] == {"1": [M], "2": [M]}
    folder = export(smaller, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    for key in ("depthprune", "auto_map", "per_layer_config"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(model.net).from_pretrained(folder)


def test_the_command_puts_them_in_place(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"format": 1, "model": {"id": "model"}, "drop": ["1", "2"], "stand_in": {"2": "lowrank:4"}}
    Path("plan.json").write_text(json.dumps(fields))
    done = run("drop", "model", "plan.json", "--out", "bias", "--stand-in", "bias", "--form", "plain")
    assert done.code == 0 and "FAIL" not in done.out, (done.out, done.err)
    monkeypatch.setattr(sys.modules["depthprune.export"], "check_many", hold)
    assert run("drop", "model", "plan.json", "--out", "own").code == 0
    assert run("drop", "model", "plan.json", "--out", "none", "--stand-in", "none").code == 0
    assert run("drop", "model", "plan.json", "--out", "map", "--stand-in", "lowrank:2").code == 0
    written = {name: Plan.load(f"{name}/plan.json").stand_in for name in ("bias", "own", "none", "map")}
    assert written == {
        "bias": {"1": "bias", "2": "bias"},
        "own": {"2": "lowrank:4"},
        "none": {},
        "map": {"1": "lowrank:2", "2": "lowrank:2"},
    }
    for form in ("lowrank", "mean", ""):
        done = run("drop", "model", "plan.json", "--out", "x", "--stand-in", form)
        assert done.code == 2 and done.error.startswith(
            f"--stand-in: {form!r} is no stand-in; write bias, or lowrank:16"
        )
    done = run("drop", "model", "plan.json", "--out", "x", "--stand-in", "lowrank:33")
    assert done.code == 1 and done.error == "1 cannot have a stand-in of rank 33: the stream is only 32 wide"
    assert not Path("x").exists()


# Twins: each guard sees its defect


def test_a_wrong_host_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    own = standin._Finder.reads
    model = model_of("gpt_neox")
    plan = plan_of(model, "the first sublayer", "bias")
    monkeypatch.setattr(standin._Finder, "reads", lambda *_: True)  # takes the parallel block for a sequential one
    assert parameters(drop(model, plan)) == ["gpt_neox.layers.2.attention.bias"]
    monkeypatch.setattr(standin._Finder, "proven", lambda *_: True)  # without the proof the constant is read too early
    assert parameters(drop(model, plan)) == ["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]
    smaller = drop(model, plan)
    moved = fill(smaller)
    with replaced(model, "gpt_neox", stand_ins(smaller), moved, plan):
        want = naive.logits(model.net, TOKENS)
    assert (naive.logits(smaller.net, TOKENS) - want).abs().max() > 1e-2
    monkeypatch.setattr(standin._Finder, "reads", own)


def test_a_flag_that_changes_more_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    plan = plan_of(model, "a block", "bias")
    monkeypatch.setattr(standin, "bias_flags", lambda _: iter(()))
    assert parameters(drop(model, plan)) == ["model.layers.1.self_attn.bias"]
    monkeypatch.undo()
    # A flag that the built model does not bear out falls back, too.
    wrong = {"model.layers.0.mlp.down_proj.bias": (32,)}
    monkeypatch.setattr(standin, "bias_flags", lambda _: iter([("mlp_bias", (wrong, []))]))
    smaller = drop(model, plan)
    assert parameters(smaller) == ["model.layers.1.self_attn.bias"] and not smaller.net.config.mlp_bias
    assert planned(model, smaller.plan or plan) == smaller.parameters


def test_flags_that_rename_or_reshape_are_no_bias_flags() -> None:
    net: Any = tiny("llama")
    assert [flag for flag, _ in shrink.bias_flags(net)] == ["attention_bias", "mlp_bias"]
    net.model.layers[0].mlp.up_proj = nn.Linear(32, 40, bias=False)
    assert not list(shrink.bias_flags(net))


def test_an_effect_that_is_not_zero_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def loud(net: Any, *given: Any) -> None:
        for part in net.modules():
            if isinstance(part, Skip) and part.bias is not None:
                part.bias = nn.Parameter(torch.ones_like(part.bias))

    model = model_of("qwen2")
    monkeypatch.setattr(surgery, "fill", loud)
    with pytest.raises(LayoutError, match=r"it computes something else \(logits differ by [^\n]+\)$"):
        drop(model, plan_of(model, "a block", "bias"))


def test_a_part_that_is_not_simply_added_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2")
    block: Any = naive.stack_of(model.net)[1]
    own, layout = block.mlp.forward, model.layout
    norm = nn.LayerNorm(32)
    hook = block.register_forward_hook(lambda _, given, out: given[0] + norm(out - given[0]))
    with pytest.raises(PlanError, match=r"^1\.mlp cannot have a stand-in: what takes its place is not simply added"):
        drop(replace(model, layout=layout), with_stand_ins(Plan(Reference(""), parse(["1.mlp"])), "lowrank:4"))
    hook.remove()
    assert block.mlp.forward == own


def test_a_stand_in_is_no_sublayer_and_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    smaller = drop(model, with_stand_ins(Plan(model.reference, parse(["0", "1.mlp"])), "lowrank:4"))
    fill(smaller)
    assert [len(block.sublayers) for block in wrap(smaller.net, None, "").layout.blocks] == [0, 1, 2, 2]
    monkeypatch.setattr("depthprune.discover.is_skip", lambda _: False)
    wrong = wrap(smaller.net, None, "").layout.blocks
    assert [s.name for s in wrong[0].sublayers] == ["self_attn"] and len(wrong[1].sublayers) == 2
    monkeypatch.undo()
    monkeypatch.setattr("depthprune.discover.silent", lambda _: [])
    wrong = wrap(smaller.net, None, "").layout.blocks
    assert "still changes the stream" in wrong[1].reason
