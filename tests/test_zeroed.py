"""The zeroed form: the dense shape, the pruned function."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cuts import cut
from depthprune.errors import ExportError
from depthprune.export import check_many, expect, export
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.runtimes import readers
from depthprune.units import parse
from families import tiny
from tiny_text import make_tokenizer

# Whole blocks, sublayers, and both of a block, in families whose configurations are sliced in different ways.
PLANS = {
    "llama": ("1", "2.self_attn", "3.mlp"),
    "qwen2": ("0", "3"),
    "gemma2": ("1", "2.mlp"),
    "gemma3_text": ("2", "0.self_attn"),
    "mixtral": ("1", "3.self_attn"),
    "gpt2": ("0.attn", "2.mlp", "3"),
    "smollm3": ("3", "1.mlp"),
    "gpt_neox": ("1", "2"),
}


def dense(name: str, folder: Path) -> Model:
    """A tiny model that lies in a folder, whose configuration its plans can find."""
    from depthprune.model import load

    net = tiny(name)
    net.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return load(folder, device="cpu")


def test_a_stock_loader_runs_the_pruned_model_in_the_dense_shape(tmp_path: Path) -> None:
    wanted, parameters = {}, {}
    for name, units in PLANS.items():
        model = dense(name, tmp_path / f"dense-{name}")
        folder = export(cut(model, *units), tmp_path / name, "zeroed")
        expected = expect(model, Plan(model.reference, parse(units)))
        wanted[folder] = replace(expected, parameters=model.parameters)
        config = json.loads((folder / "config.json").read_text())
        own = json.loads((tmp_path / f"dense-{name}" / "config.json").read_text())
        assert config == own | {key: config[key] for key in ("transformers_version",)}
        parameters[name] = model.parameters
    for folder, proofs in check_many(wanted).items():
        assert [proof.name.split()[0] for proof in proofs][:3] == ["loads", "parameters", "logits"], folder
        assert all(proof.passed for proof in proofs) and "plain" in proofs[0].name, (folder.name, proofs)


def test_what_is_gone_is_zero_and_the_rest_as_it_was(tmp_path: Path) -> None:
    model = dense("llama", tmp_path / "dense")
    state = load_file(export(cut(model, "1", "2.mlp"), tmp_path / "out", "zeroed") / "model.safetensors")
    was = load_file(tmp_path / "dense" / "model.safetensors")
    gone = ("model.layers.1.", "model.layers.2.mlp.", "model.layers.2.post_attention_layernorm.")
    assert state.keys() == was.keys()
    for name, tensor in state.items():
        assert not tensor.any() if name.startswith(gone) else torch.equal(tensor, was[name]), name
    assert Plan.load(tmp_path / "out" / "plan.json").why["form"] == "zeroed"
    assert readers(tmp_path / "out") == ("transformers", "vllm", "mlx", "openvino")


def test_a_zero_too_few_is_found_out(tmp_path: Path) -> None:
    """The twin: one map that writes to the stream is not zero."""
    model = dense("llama", tmp_path / "dense")
    wanted = replace(expect(model, Plan(model.reference, parse(["2.mlp"]))), parameters=None)
    folder = export(cut(model, "2.mlp"), tmp_path / "out", "zeroed")
    state = load_file(folder / "model.safetensors")
    for part in ("gate", "up", "down"):
        state[f"model.layers.2.mlp.{part}_proj.weight"] += 0.5
    state["model.layers.2.post_attention_layernorm.weight"] += 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert [proof.name.split()[0] for proof in check_many({folder: wanted})[folder] if not proof.passed] == ["logits"]


def test_the_dense_configuration_has_to_be_found(tmp_path: Path) -> None:
    model = dense("llama", tmp_path / "dense")
    smaller = cut(model, "1")
    assert smaller.plan is not None
    lost = replace(smaller.plan, model=replace(smaller.plan.model, id=str(tmp_path / "gone")))
    with pytest.raises(ExportError, match="needs the dense model's configuration: zeroed:dense=FOLDER"):
        export(replace(smaller, plan=lost), tmp_path / "out", "zeroed")
    export(replace(smaller, plan=lost), tmp_path / "out", f"zeroed:dense={tmp_path / 'dense'}")
    parts = cut(model, "1.mlp")  # no block is gone, so nothing is asked of it
    assert parts.plan is not None
    export(replace(parts, plan=replace(parts.plan, model=lost.model)), tmp_path / "parts", "zeroed")


def test_stand_ins_that_the_dense_shape_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = dense("llama", tmp_path / "dense")
    for units, form in ((("0.self_attn",), "bias"), (("2.mlp",), "lowrank:2")):
        with pytest.raises(ExportError, match="form zeroed has no place for"):
            export(cut(model, *units, form=form), tmp_path / "out", "zeroed")
    folded = export(cut(model, "2.mlp", "3", form="bias"), tmp_path / "folded", "zeroed")
    assert json.loads((folded / "config.json").read_text())["attention_bias"]
