"""Proofs in other runtimes: what they are asked, what their answers are held against, and how one is found."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import run
from cuts import cut
from depthprune import runtimes
from depthprune.errors import CheckpointError, OptionError
from depthprune.export import export
from depthprune.export.check import expect_as_it_is, fitted
from depthprune.model import Model, load
from depthprune.plan import Plan
from depthprune.runtimes import Reference, judge, prove, readers, refer
from depthprune.units import parse

REFERENCE = Reference((5, 6), (5, 6, 7, 8, 9), (-1.0, -2.0, -0.5, -3.0), (1.0, 2e-5, 0.3), 3)
ANSWER: dict[str, Any] = {
    "version": "a runtime 1.0",
    "logprobs": [-1.00005, -2.0, -0.5, -3.0],
    "generated": [7, 8, 9],
    "kv_layers": 3,
}


@pytest.mark.parametrize("units", [(), ("1.self_attn", "2.mlp"), ("0", "3.self_attn")])
def test_the_reference_is_that_of_the_model_without_those_units(
    subject: Callable[..., Model], units: tuple[str, ...]
) -> None:
    """Against transformers' own greedy generation of the model that was cut for good."""
    model = subject("llama")
    smaller = cut(model, *units)
    found = refer(model, Plan(model.reference, parse(units)))
    prompt = torch.tensor([found.prompt])
    smaller.net.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
    written = smaller.net.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert written[0].tolist() == list(found.text) and len(found.prompt) == 24 and len(found.margins) == 64
    said = torch.log(torch.softmax(smaller.net(written).logits[0].double(), -1))
    for position, token in enumerate(found.text[1:]):
        assert abs(found.logprobs[position] - said[position, token].item()) < 1e-5
    best = said[23:-1].sort(-1, descending=True).values
    assert torch.allclose(torch.tensor(found.margins).double(), best[:, 0] - best[:, 1], atol=1e-5)
    assert found.attentions == 4 - sum("attn" in unit or unit == "0" for unit in units)
    assert found == refer(smaller)


def test_an_equal_answer_holds() -> None:
    proofs = judge(ANSWER, "mlx", REFERENCE)
    assert [proof.name for proof in proofs] == [
        "runs in mlx", "log-probabilities (mlx)", "greedy text (mlx)", "KV cache (mlx)",
    ]  # fmt: skip
    assert all(proof.passed for proof in proofs)
    tie = judge(ANSWER | {"generated": [7, 4, 4]}, "mlx", REFERENCE)[2]
    assert tie.passed and "1 of 3 tokens equal, then a tie" in tie.detail
    assert len(judge(ANSWER, "mlx", replace(REFERENCE, attentions=None))) == 3


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a log-probability": ({"logprobs": [-1.0, -2.0, -0.5, -3.0002]}, "log-probabilities (vllm)"),
    "the first token": ({"generated": [4, 8, 9]}, "greedy text (vllm)"),
    "the last token": ({"generated": [7, 8, 4]}, "greedy text (vllm)"),
    "too few tokens": ({"generated": [7, 8]}, "greedy text (vllm)"),
    "a layer too many": ({"kv_layers": 4}, "KV cache (vllm)"),
    "an error": ({"error": "ValueError: no"}, "runs in vllm"),
    "a number that is none": ({"logprobs": [-1.0, float("nan"), -0.5, -3.0]}, "log-probabilities (vllm)"),
}


@pytest.mark.parametrize("defect", WRONG)
def test_another_answer_does_not(defect: str) -> None:
    changed, name = WRONG[defect]
    assert [proof.name for proof in judge(ANSWER | changed, "vllm", REFERENCE) if not proof.passed] == [name]


def test_half_precision_is_allowed_its_rounding() -> None:
    half = replace(REFERENCE, dtype="bfloat16")
    rounded = ANSWER | {"logprobs": [-1.01, -2.02, -0.5, -3.03]}
    assert judge(rounded, "vllm", half)[1].passed and not judge(rounded, "vllm", REFERENCE)[1].passed
    assert not judge(ANSWER | {"logprobs": [-1.2, -2.0, -0.5, -3.0]}, "vllm", half)[1].passed


def fake(folder: Path, script: str) -> str:
    """A Python in which every runtime is installed and answers as ``script`` does, given what is ``asked``."""
    body = f"import json, sys\nasked = json.load(open(sys.argv[-1]))\n{script}\n"
    (folder / "answer.py").write_text(body, encoding="utf-8")
    shell = f'#!/bin/sh\n[ "$2" = "-c" ] && exit 0\nexec {sys.executable} {folder}/answer.py "$@"\n'
    (folder / "python").write_text(shell, encoding="utf-8")
    (folder / "python").chmod((folder / "python").stat().st_mode | stat.S_IXUSR)
    return str(folder / "python")


SAY = "print(json.dumps({'depthprune': {**answer}}))"


def test_a_runtime_is_asked_in_its_own_process(tmp_path: Path) -> None:
    """It gets the reference and says one line among others; what it does instead is told."""
    script = f"print('a banner'); answer = {ANSWER!r}\nassert asked['text'] == [5, 6, 7, 8, 9]\n{SAY}\nprint('bye')"
    assert all(proof.passed for proof in prove(tmp_path, "mlx", REFERENCE, fake(tmp_path, script)))
    [died] = prove(tmp_path, "mlx", REFERENCE, fake(tmp_path, "sys.exit('Segmentation fault')"))
    assert not died.passed and died.detail == "it died (exit 1): Segmentation fault"
    [silent] = prove(tmp_path, "mlx", REFERENCE, fake(tmp_path, "print('done')"))
    assert silent.detail == "it died (exit 0): no output"


def test_where_a_runtime_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = (
        r"vllm is not installed here: pip install 'depthprune\[vllm\]', or name a Python that has it: --runtime vllm="
    )
    with pytest.raises(OptionError, match=hint):
        runtimes.python("vllm")
    with pytest.raises(OptionError, match=r"llama\.cpp is not installed for nowhere"):
        runtimes.python("llama.cpp", "nowhere")
    with pytest.raises(OptionError, match=r"unknown runtime 'vlm'\. Did you mean 'vllm'"):
        runtimes.python("vlm")
    there = fake(tmp_path, "")
    monkeypatch.setenv("DEPTHPRUNE_VLLM", there)
    assert runtimes.python("vllm") == there


def test_who_reads_what(subject: Callable[..., Model], tmp_path: Path) -> None:
    llama = subject("llama")
    whole, uneven = export(cut(llama, "1"), tmp_path / "whole"), export(cut(llama, "1.mlp"), tmp_path / "uneven")
    deci = export(cut(llama, "1.mlp"), tmp_path / "deci", "nemotron-nas")
    assert readers(whole) == ("transformers", "vllm", "mlx", "openvino")
    assert readers(deci) == ("transformers", "vllm", "mlx")
    assert readers(uneven) == ("transformers", "vllm")
    assert readers(export(cut(subject("bert"), "1"), tmp_path / "bert")) == ("transformers",)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "model.gguf").touch()
    assert readers(tmp_path / "file") == readers(tmp_path / "file" / "model.gguf") == ("llama.cpp",)
    with pytest.raises(CheckpointError, match=r"is no model: it has no config.json and no file.gguf"):
        readers(tmp_path)


def test_what_was_written_is_proven_where_it_can_be(
    subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that does not take the family is told of; one that computes something else is held against it."""
    model = cut(subject("llama"), "1")
    folder, said = export(model, tmp_path / "out"), list[str]()
    reference = refer(model)
    sound = {"logprobs": reference.logprobs, "generated": reference.text[24:], "kv_layers": 3, "version": "x"}

    def proofs(**answer: Any) -> list[str]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        monkeypatch.setenv("DEPTHPRUNE_MLX", fake(tmp_path / "bin", f"answer = {answer!r}\n{SAY}"))
        found = runtimes.prove_written(folder, model, expect_as_it_is(model), said.append)
        return [proof.name for proof in found if "mlx" in proof.name and not proof.passed]

    assert proofs(**sound) == [] and not said
    assert proofs(**sound | {"kv_layers": 4}) == ["KV cache (mlx)"] and not said
    assert proofs(error="Model type llama not supported.") == []
    assert said == ["mlx does not take it: Model type llama not supported."]


def test_where_only_one_runtime_reads_a_form_its_refusal_is_a_failure(
    subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = cut(subject("llama"), "1"), list[str]()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "model.gguf").touch()
    monkeypatch.setenv("DEPTHPRUNE_LLAMA", fake(tmp_path, f"answer = {{'error': 'it does not load'}}\n{SAY}"))
    [proof] = runtimes.prove_written(tmp_path / "file", model, expect_as_it_is(model), said.append)
    assert (proof.name, proof.passed, proof.detail) == ("runs in llama.cpp", False, "it does not load") and not said


def test_quantized_weights_are_held_to_their_mean() -> None:
    """Single tokens may be far off, and the greedy text part; a file that computes something else is further off."""
    rounded = ANSWER | {"dtype": "quantized", "logprobs": [-1.9, -2.0, -0.5, -3.1], "generated": [7, 4, 4]}
    proofs = judge(rounded, "llama.cpp", REFERENCE)
    assert [proof.passed for proof in proofs] == [True] * 3 and "quantized" in proofs[1].detail
    wrong = judge(rounded | {"logprobs": [-4.0, -5.0, -0.5, -3.0], "kv_layers": 9}, "llama.cpp", REFERENCE)
    assert [proof.passed for proof in wrong] == [True, False, False]
    assert judge(rounded | {"dtype": "float32"}, "mlx", replace(REFERENCE, dtype="quantized"))[1].passed


def test_a_file_is_compared_with_the_folder_that_it_was_made_from(desk: Path) -> None:
    """Weights were recovered, so the dense model cannot say what the file should compute; the pruned folder can."""
    Path("plan.json").write_text(json.dumps({"format": 1, "model": {"id": "model"}, "drop": ["1"]}))
    assert run("drop", "model", "plan.json", "--out", "small").code == 0
    Path("small/recovery.json").write_text(json.dumps({"format": 1, "stages": []}))
    reference = refer(load("small", device="cpu"))
    Path("file").mkdir()
    Path("file/model.gguf").touch()
    for name in ("plan.json", "recovery.json"):
        Path("file", name).write_bytes(Path("small", name).read_bytes())
    answer = {"logprobs": reference.logprobs, "generated": reference.text[len(reference.prompt) :], "kv_layers": 3}
    named = fake(desk, f"answer = {answer!r}\n{SAY}")
    for path in ("file", "file/model.gguf"):
        words = ("check", path, "--runtime", f"llama.cpp={named}")
        assert run(*words, "--against", "small").code == 0
        for more in ((), ("--against", "model")):
            refused = run(*words, *more)
            assert refused.code == 2 and "give --against FOLDER, the pruned folder that it was made" in refused.error
    with save_elsewhere(Path("small/model.safetensors")):  # the twin: of other weights
        done = run("check", "file", "--runtime", f"llama.cpp={named}", "--against", "small")
        assert done.code == 1 and "FAIL log-probabilities" in done.out


@contextmanager
def save_elsewhere(file: Path) -> Iterator[None]:
    """Other weights in a file for a while."""
    before = load_file(file)
    save_file({name: 1.5 * weight for name, weight in before.items()}, file, {"format": "pt"})
    yield
    save_file(before, file, {"format": "pt"})


def test_a_quantized_folder_is_not_held_to_the_dense_numbers(
    subject: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cut(subject("llama"), "1")
    folder = export(model, tmp_path / "out")
    exact = fitted(expect_as_it_is(model), folder)
    assert exact.parameters == model.parameters and "logits" in exact.tensors
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    coarse = fitted(expect_as_it_is(model), folder)
    assert coarse.parameters is None and set(coarse.tensors) == {"tokens"}
    monkeypatch.setattr(runtimes, "load", lambda *_, **asked: model if not asked["dequantize"] else None)
    assert runtimes._reference(folder, subject("llama"), False).dtype == "quantized"


def test_the_command(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"format": 1, "model": {"id": "model"}, "drop": ["1"]}
    Path("plan.json").write_text(json.dumps(plan))
    assert run("drop", "model", "plan.json", "--out", "small").code == 0
    found = run("check", "small", "--runtime", "vllm")
    assert found.code == 2 and found.error.startswith("vllm is not installed here")
    assert run("check", "small", "--runtime", "llama.cpp=" + fake(desk, "")).error.startswith(
        "llama.cpp does not read small: it reads --form gguf"
    )
    script = (
        "answer = {'logprobs': [0.0] * (len(asked['text']) - 1), 'generated': [], 'kv_layers': asked['attentions']}"
    )
    named = fake(desk, f"{script}\n{SAY}")
    for against in ((), ("--against", "model")):
        done = run("check", "small", "--runtime", f"mlx={named}", "--json", *against)
        passed = {proof["name"]: proof["passed"] for proof in json.loads(done.out)["proofs"]}
        assert done.code == 1 and passed == {
            "runs in mlx": True, "log-probabilities (mlx)": False, "greedy text (mlx)": False, "KV cache (mlx)": True,
        }  # fmt: skip
    both = run("check", "small", "--runtime", "transformers", "--runtime", f"mlx={named}")
    assert "ok   loads with plain transformers" in both.out and "FAIL greedy text (mlx)" in both.out


def test_layers_of_cache_that_a_form_keeps_are_not_held_against_it(
    subject: Callable[..., Model], tmp_path: Path
) -> None:
    """A stub of zeros for the attention of block 0 has its layer; where a whole block 0 is gone there is none."""
    for number, (units, option, counted) in enumerate(
        [(("0.self_attn",), ":stub=true", None), (("0.self_attn",), "", 3), (("0",), ":stub=true", 3)]
    ):
        model = cut(subject("llama"), *units)
        folder = export(model, tmp_path / str(number), f"nemotron-nas{option}")
        assert runtimes.adjusted(refer(model), folder).attentions == counted
    model = cut(subject("llama"), "1.self_attn")
    assert runtimes.adjusted(refer(model), export(model, tmp_path / "zeroed", "zeroed")).attentions is None
