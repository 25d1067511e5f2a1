"""Writing folders: what lies in them, in which dtype, what is left of the model, and what the check says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import naive
from depthprune.errors import CheckpointError, DepthpruneError, ExportError, OptionError
from depthprune.export import check, export
from depthprune.export.check import check_many, own_code, routes
from depthprune.export.prove import generation_gap
from depthprune.model import Model, load, wrap
from depthprune.plan import Plan
from depthprune.surgery import drop
from depthprune.units import parse
from families import tiny
from tiny_text import make_tokenizer

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def smaller(model: Model, *units: str) -> Model:
    return drop(model, Plan(model.reference, parse(units)))


def test_a_plain_folder_needs_nothing_of_ours(subject: Callable[..., Model], tmp_path: Path) -> None:
    model = subject("llama")
    folder = export(smaller(model, "1", "3"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and "depthprune" not in config and "auto_map" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "plan.json",
    ]  # fmt: skip
    assert Plan.load(folder / "plan.json").drop == parse(["1", "3"])
    state = load_file(folder / "model.safetensors")
    assert torch.equal(state["model.layers.1.mlp.up_proj.weight"], model.net.model.layers[2].mlp.up_proj.weight)


def test_an_uneven_folder_carries_its_modelling_file(subject: Callable[..., Model], tmp_path: Path) -> None:
    folder = export(smaller(subject("llama"), "1.self_attn"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoModelForCausalLM": "modeling_depthprune.LlamaForCausalLM",
        "AutoModel": "modeling_depthprune.LlamaModel",
    }
    text = (folder / "modeling_depthprune.py").read_text()
    assert "import depthprune" not in text.split('"""')[2]
    compile(text, "modeling_depthprune.py", "exec")


def test_weights_keep_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    net = tiny("llama_tied").bfloat16()
    net.save_pretrained(tmp_path / "in")
    make_tokenizer().save_pretrained(tmp_path / "in")
    model = load(tmp_path / "in", device="cpu")
    folder = export(smaller(model, "2", "1.mlp"), tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in state, "tied weights are written once"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    original = load_file(tmp_path / "in" / "model.safetensors")
    assert torch.equal(state["model.norm.weight"], original["model.norm.weight"])
    again = load(folder, device="cpu")
    assert again.tokenizer("w1")["input_ids"] == model.tokenizer("w1")["input_ids"]
    assert again.parameters == smaller(model, "2", "1.mlp").parameters


def test_the_model_is_as_before_after_writing(subject: Callable[..., Model], tmp_path: Path) -> None:
    model = smaller(subject("llama"), "1.self_attn")
    before, logits = dict(vars(model.net.config)), naive.logits(model.net, TOKENS)
    first = export(model, tmp_path / "one")
    assert vars(model.net.config).keys() == before.keys()
    assert "auto_map" not in vars(model.net.config)
    assert torch.equal(naive.logits(model.net, TOKENS), logits)
    second = export(model, tmp_path / "two")
    for name in ("config.json", "model.safetensors", "modeling_depthprune.py"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_loading_what_was_written_and_pruning_it_again(subject: Callable[..., Model], tmp_path: Path) -> None:
    model = subject("gemma2")
    folder = export(smaller(model, "1.self_attn", "3"), tmp_path / "out")
    make_tokenizer().save_pretrained(folder)
    again = load(folder, device="cpu")
    with torch.no_grad():
        want = naive.logits(smaller(model, "1.self_attn", "3").net, TOKENS)
    assert torch.equal(naive.logits(again.net, TOKENS), want)
    assert [str(unit) for unit in again.layout.units("any")] == [
        "0.self_attn", "0.mlp", "1.mlp", "2.self_attn", "2.mlp",
    ]  # fmt: skip


def test_no_room_is_said_before_anything_is_written(
    subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"^no room for [^\n]+ and 1,000 are free$"):
        export(subject("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_nothing(subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("llama")
    before = dict(vars(model.net.config))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.net), "save_pretrained", full)
    with pytest.raises(DepthpruneError, match="No space left on device"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert vars(model.net.config) == before


def test_an_unknown_form_lists_the_known_ones(subject: Callable[..., Model], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="hf"):
        export(subject("llama"), tmp_path / "out", form="hff")


def test_the_check_reads_the_plan_of_the_folder(subject: Callable[..., Model], tmp_path: Path) -> None:
    model = subject("llama")
    folder = export(smaller(model, "0.self_attn", "2"), tmp_path / "out")
    proofs = check(folder, against=model)
    assert [proof.name for proof in proofs] == [
        f"{what} {how}" if what == "loads with" else f"{what} ({how})"
        for how in ("trust_remote_code", "import depthprune")
        for what in ("loads with", "parameters", "logits", "cached generation", "cached decoding, step by step")
    ]
    assert all(proof.passed for proof in proofs) and len(proofs) == 10
    assert proofs[0].to_json() == {"name": proofs[0].name, "passed": True, "detail": proofs[0].detail}
    other = check(folder, against=subject("llama", 1))
    assert [proof.name.split()[0] for proof in other if not proof.passed] == ["weights", "logits", "logits"]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check(tmp_path)


def test_routes_follow_the_configuration() -> None:
    assert routes({}) == ("plain",)
    assert routes({"depthprune": {"skip": {}}}) == routes({"text_config": {"depthprune": {"skip": {}}}}) == ("aware",)
    assert routes({"depthprune": {"skip": {}}}, trusted=True) == ("remote", "aware")
    assert routes({"auto_map": {}, "model_type": "nemotron-nas"}) == ("plain",)
    assert routes({"auto_map": {"AutoConfig": "x"}, "model_type": "nemotron-nas"}, trusted=True) == ("remote",)


@pytest.mark.parametrize("form", ["hf", "nemotron-nas"])
def test_only_code_that_we_wrote_is_run_without_being_trusted(
    form: str, subject: Callable[..., Model], tmp_path: Path
) -> None:
    folder = export(smaller(subject("llama"), "1.self_attn"), tmp_path / "out", form)
    assert own_code(folder) and not own_code(export(smaller(subject("llama"), "1"), tmp_path / "plain"))
    file = next(folder.glob("modeling_*.py"))
    mark = tmp_path / "it ran"
    file.write_text(file.read_text() + f"\nopen({str(mark)!r}, 'w').close()\n")
    assert not own_code(folder)
    found = {proof.name: proof.passed for proof in check(folder)}
    assert not mark.exists()
    if form == "hf":
        assert found.pop("loads with import depthprune") and "loads with trust_remote_code" not in found
    else:
        assert found == {"loads with plain transformers": False}
    check(folder, trust_remote_code=True)
    assert mark.exists(), "the twin: trusted, it is run"


def test_a_process_that_dies_is_reported(
    subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(subject("llama"), tmp_path / "out")
    script = tmp_path / "a" / "b" / "dies.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; sys.exit('killed by the test')")
    monkeypatch.setattr(sys.modules["depthprune.export.prove"], "__file__", str(script))
    with pytest.raises(DepthpruneError, match=r"died \(exit 1\): killed by the test$"):
        check_many({folder: None})


def test_the_generation_gap_sees_two_attentions_on_one_slot() -> None:
    net: Any = tiny("llama")
    assert (generation_gap(net, TOKENS) or 1.0) < 1e-3
    net.model.layers[2].self_attn.layer_idx = 1
    assert (generation_gap(net, TOKENS) or 0.0) > 0.1
    assert generation_gap(tiny("bert"), TOKENS) is None


def test_an_encoder_comes_back_too(tmp_path: Path) -> None:
    model = wrap(tiny("modernbert"), None, "modernbert")
    folder = export(smaller(model, "1.mlp"), tmp_path / "out")
    proofs = check(folder, against=model)
    assert all(proof.passed for proof in proofs) and not any("generation" in proof.name for proof in proofs)


def test_only_heads_that_vllm_makes_alike_are_named_for_it(subject: Callable[..., Model], tmp_path: Path) -> None:
    """Granite divides its logits, which vLLM's Transformers backend does not; nor does it know BERT's head."""
    named = {}
    for name in ("llama", "gemma2", "cohere", "granite", "bert"):
        model = subject(name)
        unit = next(str(unit) for unit in model.layout.units("any") if unit.block == 2)
        folder = export(smaller(model, unit), tmp_path / name)
        [named[name]] = json.loads((folder / "config.json").read_text())["architectures"]
    ours = "DepthpruneForCausalLM"
    assert named == {
        "llama": ours, "gemma2": ours, "cohere": ours, "granite": "GraniteForCausalLM", "bert": "BertForMaskedLM",
    }  # fmt: skip


def test_folders_beside_the_weights_can_be_entered(subject: Callable[..., Model], tmp_path: Path) -> None:
    """Named chat templates lie in a folder of their own."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    model = replace(smaller(subject("llama"), "1"), tokenizer=tokenizer)
    folder = export(model, tmp_path / "out")
    inner = [path for path in folder.iterdir() if path.is_dir()]
    assert inner and all(path.stat().st_mode & 0o100 for path in inner)
