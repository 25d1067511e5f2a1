"""DeciLM folders: what lies in them, that transformers runs them as meant, and what cannot be one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cuts import cut
from depthprune.decilm import DeciLMConfig
from depthprune.errors import ExportError, LayoutError
from depthprune.export import check_many, expect, export, nemotron_nas
from depthprune.export.nemotron_nas import MULTIPLE
from depthprune.model import Model, load, wrap
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse
from families import FAMILIES, configuration, shake
from tiny_text import make_tokenizer

PLANS = {
    "blocks": ("1", "2"),
    "attention": ("2.self_attn", "3.self_attn"),
    "attention 0": ("0.self_attn", "2.self_attn"),
    "mlp": ("0.mlp", "3.mlp"),
    "mixed": ("1", "2.mlp", "3.self_attn"),
}


def made(name: str, **changes: Any) -> Model:
    """A tiny model of a family, with other settings than usual."""
    import transformers

    family = FAMILIES[name]
    config = configuration(family)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(transformers, family.network)(config)
    shake(net, 0, family.gain)
    return wrap(net.float().eval(), None, name)


def llamas() -> dict[str, Model]:
    """Models that are shaped like Llama, each in its own way."""
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    return {
        "llama": made("llama"),
        "tied": made("llama", tie_word_embeddings=True),
        "llama3": made("llama", rope_parameters=scaled),
        "wide heads": made("llama", head_dim=16),
        "biases": made("llama", attention_bias=True, mlp_bias=True),
        "mistral": made("mistral", sliding_window=None),
        "qwen2": made("qwen2", use_sliding_window=False, layer_types=["full_attention"] * 4),
    }


@pytest.mark.parametrize("plan", PLANS)
def test_transformers_runs_the_folder_as_meant(plan: str, tmp_path: Path) -> None:
    """In a fresh process, by the folder's own code: logits of the muted dense model, and cached generation."""
    wanted = {}
    for name, model in llamas().items():
        units = parse(PLANS[plan])
        folder = export(cut(model, *PLANS[plan]), tmp_path / name, "nemotron-nas")
        wanted[folder] = replace(expect(model, Plan(model.reference, units)), parameters=None)
    for folder, proofs in check_many(wanted).items():
        assert len(proofs) == 4 and all(proof.passed for proof in proofs), (folder.name, proofs)


def test_a_folder_that_says_something_else_is_found_out(tmp_path: Path) -> None:
    """The twin: another block is said to have no MLP; a bias that the format adds is not zero."""
    llama, qwen = made("llama"), llamas()["qwen2"]
    wanted = {}
    for model, name in ((llama, "sound"), (llama, "moved"), (qwen, "biased")):
        folder = export(cut(model, "1.mlp"), tmp_path / name, "nemotron-nas")
        wanted[folder] = replace(expect(model, Plan(model.reference, parse(["1.mlp"]))), parameters=None)
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    config["block_configs"][1], config["block_configs"][2] = config["block_configs"][2], config["block_configs"][1]
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "biased" / "model.safetensors"
    state = load_file(file)
    state["model.layers.2.self_attn.o_proj.bias"] += 1
    save_file(state, file, {"format": "pt"})
    proofs = check_many(wanted)
    failed = {
        folder.name: [proof.name.split()[0] for proof in each if not proof.passed] for folder, each in proofs.items()
    }
    assert failed == {"sound": [], "moved": ["loads", "logits"], "biased": ["logits"]}


@pytest.mark.parametrize("hidden", [64, 320, 2048, 4096, 5120])
@pytest.mark.parametrize("inner", [1, 256, 257, 896, 5632, 14336])
def test_runtimes_compute_the_width_that_was_written(hidden: int, inner: int) -> None:
    """By the rule of vLLM, MLX-LM and llama.cpp, also where a runtime rounds the ratio to six decimals."""
    from depthprune.export import nemotron_nas

    width = -(-inner // MULTIPLE) * MULTIPLE
    config = type("Config", (), {"intermediate_size": inner, "hidden_size": hidden})
    ratio = nemotron_nas.ratio(config)
    for given in (ratio, round(ratio, 6)):
        size = int(2 * given * hidden / 3)
        assert size + (-size) % MULTIPLE == width


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    model = llamas()["llama3"]
    folder = export(cut(model, "1.self_attn", "2.mlp"), tmp_path / "out", "nemotron-nas")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, True, False, False]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, False, True, False]
    assert config["block_configs"][1]["attention"]["n_heads_in_group"] is None
    assert config["block_configs"][0]["attention"]["n_heads_in_group"] == 2
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    state = load_file(folder / "model.safetensors")
    assert not any(name.startswith(("model.layers.1.self_attn", "model.layers.2.mlp")) for name in state)
    assert not any(name.startswith(("model.layers.1.input_l", "model.layers.2.post_")) for name in state)
    dense = dict(model.net.named_parameters())
    up, down = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down"))
    assert torch.equal(state[up][:48], dense[up]) and state[up].shape == (256, 32) and not state[up][48:].any()
    assert torch.equal(state[down][:, :48], dense[down]) and not state[down][:, 48:].any()
    assert Plan.load(folder / "plan.json").drop == parse(["1.self_attn", "2.mlp"])


def test_a_stub_keeps_the_attention_of_block_0_as_zeros(tmp_path: Path) -> None:
    model = llamas()["biases"]
    smaller = cut(model, "0.self_attn", "1.self_attn")
    stub = export(smaller, tmp_path / "stub", "nemotron-nas:stub=true")
    config = json.loads((stub / "config.json").read_text())
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, True, False, False]
    state = load_file(stub / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if name.startswith("model.layers.0.self_attn")}
    assert len(kept) == 8 and not any(tensor.any() for tensor in kept.values())
    wanted = replace(expect(model, Plan(model.reference, parse(["0.self_attn", "1.self_attn"]))), parameters=None)
    assert all(proof.passed for proof in check_many({stub: wanted})[stub])


def test_the_configuration_reads_and_writes_itself(tmp_path: Path) -> None:
    """What runtimes read by attribute is plain JSON on disk; what is missing is told to the modelling file."""
    none = {"n_heads_in_group": None, "no_op": True}
    blocks = [{"attention": {"no_op": False}, "ffn": {"no_op": True}}, {"attention": none, "ffn": {"no_op": False}}]
    config = DeciLMConfig(block_configs=blocks, num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block_configs"] == blocks
    again = DeciLMConfig.from_pretrained(tmp_path)
    assert again.block_configs[1].attention.no_op and not hasattr(again.block_configs[0].ffn, "ffn_mult")
    assert again.depthprune["skip"] == {
        "0": {"mlp": 0, "post_attention_layernorm": -1}, "1": {"self_attn": 2, "input_layernorm": -1},
    }  # fmt: skip
    assert again.depthprune["no_cache"] == [1]
    assert DeciLMConfig(block_configs=blocks[:1] * 0).depthprune == {}


REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "another family": (lambda: made("gemma2"), "Gemma2ForCausalLM is not shaped like Llama"),
    "norms of queries": (lambda: made("qwen3"), "Qwen3ForCausalLM is not shaped like Llama"),
    "windows": (lambda: made("mistral", sliding_window=8), "sliding windows of 8 tokens"),
    "another activation": (lambda: made("llama", hidden_act="gelu"), "its MLPs use gelu, not silu"),
    "another scaling": (
        lambda: made("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "rotary scaling 'linear'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused(case: str, tmp_path: Path) -> None:
    build, reason = REFUSED[case]
    with pytest.raises(ExportError, match="form nemotron-nas cannot express this model") as error:
        export(cut(build(), "1.mlp"), tmp_path / "out", "nemotron-nas")
    assert reason in str(error.value) and "form hf can" in str(error.value) and not (tmp_path / "out").exists()


def test_stand_ins_lie_in_biases_or_are_refused(tmp_path: Path) -> None:
    """A bias that was folded into the part before it travels; one that a dropped first part holds cannot."""
    model = made("llama")
    folded = cut(model, "2.mlp", form="bias")
    with torch.no_grad():
        for name, parameter in folded.net.named_parameters():
            if name.endswith("bias") and "layers.2.self_attn.o_proj" in name:
                parameter.fill_(0.5)
    state = load_file(export(folded, tmp_path / "folded", "nemotron-nas") / "model.safetensors")
    assert (state["model.layers.2.self_attn.o_proj.bias"] == 0.5).all()
    assert not state["model.layers.1.self_attn.o_proj.bias"].any()
    for units, form in ((("0.self_attn",), "bias"), (("2.mlp",), "lowrank:2")):
        with pytest.raises(ExportError, match="the stand-in for"):
            export(cut(model, *units, form=form), tmp_path / "held", "nemotron-nas")
    assert not (tmp_path / "held").exists()
    shutil.rmtree(tmp_path / "folded")


def test_what_is_decilm_already_is_not_cut_again(subject: Callable[..., Model], tmp_path: Path) -> None:
    """It would be of two kinds at once; the folder of form hf can be cut further."""
    folder = export(cut(subject("llama"), "1.mlp"), tmp_path / "out", "nemotron-nas")
    make_tokenizer().save_pretrained(folder)
    again = load(folder, device="cpu", trust_remote_code=True)
    with pytest.raises(LayoutError, match=r"is DeciLM: prune the folder of form hf that it was made from"):
        drop(again, Plan(again.reference, parse(["2.self_attn"])))
    with pytest.raises(ExportError, match=r"form hf cannot hold what is DeciLM already"):
        export(again, tmp_path / "hf")


def test_a_stub_needs_an_attention_to_be_shaped_like(subject: Callable[..., Model], tmp_path: Path) -> None:
    model = cut(subject("llama"), "1.self_attn", "2.self_attn", "3.self_attn")
    assert export(model, tmp_path / "out", "nemotron-nas:stub=true")
    state = {name: weight for name, weight in model.net.state_dict().items() if "self_attn" not in name}
    model.net.state_dict = lambda: state
    with pytest.raises(ExportError, match="no attention is left"):
        nemotron_nas._zeros(model, "model.layers.0")
