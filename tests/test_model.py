"""Loading: what is right comes back whole; what is broken is refused in one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import naive
from depthprune.errors import CheckpointError, OptionError
from depthprune.model import Model, fingerprint, load, wrap
from families import tiny
from tiny_text import make_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, saved by transformers."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    tiny("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "llama"))


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(source, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def change(folder: Path, what: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    what(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_good_folder_loads(good: Path) -> None:
    model = load(good, device="cpu")
    tokens = torch.arange(3, 23)[None]
    assert torch.equal(naive.logits(model.net, tokens), naive.logits(tiny("llama"), tokens))
    assert not model.net.training
    assert model.reference.blocks == 4 and model.reference.id == str(good)
    assert model.dtype == torch.float32 and model.plan is None
    assert model.parameters == sum(p.numel() for p in tiny("llama").parameters())
    assert model.bytes == 4 * model.parameters
    assert model.tokenizer("w1 w2")["input_ids"] == [1, 5, 6]


def test_the_checkpoint_keeps_its_own_dtype(tmp_path: Path) -> None:
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    assert next(model.net.parameters()).dtype == torch.float32
    assert model.dtype == torch.bfloat16 and model.bytes == 2 * model.parameters
    assert next(load(tmp_path, device="cpu", dtype="auto").net.parameters()).dtype in (torch.bfloat16, torch.float32)
    half = load(tmp_path, device="cpu", dtype="bfloat16")
    assert next(half.net.parameters()).dtype == torch.bfloat16
    with pytest.raises(OptionError, match="unknown dtype 'float33'"):
        load(tmp_path, device="cpu", dtype="float33")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "no such model" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(tmp_path / "empty")


@pytest.mark.parametrize("keep", [0, 4, 8, 300, 0.3, 0.7, -1], ids=str)
def test_truncated_weights(folder: Path, keep: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "damaged" in refusal(folder) or str(folder) in refusal(folder)


def test_a_missing_tensor(folder: Path) -> None:
    change(folder, lambda state: state.pop("model.layers.2.mlp.up_proj.weight"))
    message = refusal(folder)
    assert "has no model.layers.2.mlp.up_proj.weight" in message


def test_a_shape_that_does_not_match_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    message = refusal(folder)
    assert "another shape" in message and "mlp.down_proj.weight and 11 more" in message


def test_more_blocks_than_there_are_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    assert "has no model.layers.4.input_layernorm.weight and 8 more" in refusal(folder)


def test_no_weights_and_no_configuration(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert str(folder) in refusal(folder)
    (folder / "config.json").write_text("{")
    assert str(folder) in refusal(folder)
    (folder / "config.json").write_text('{"model_type": "of_tomorrow"}')
    assert "of_tomorrow" in refusal(folder)


def test_no_tokenizer(folder: Path, good: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refusal(folder)
    assert "tokenizer" in message and "--tokenizer" in message
    assert load(folder, device="cpu", tokenizer=str(good)).tokenizer("w1")["input_ids"] == [1, 5]


def test_pickles_are_read_only_when_allowed(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert str(folder) in refusal(folder)
    model = load(folder, device="cpu", allow_pickle=True)
    assert model.reference.fingerprint == wrap(tiny("llama"), None, "").reference.fingerprint


def test_the_fingerprint_knows_weights_names_and_shapes() -> None:
    one: Any = tiny("llama")
    first = fingerprint(one)
    assert first == fingerprint(tiny("llama")) == fingerprint(tiny("llama").bfloat16())
    assert first != fingerprint(tiny("llama", seed=1))
    assert first != fingerprint(tiny("llama_tied"))
    with torch.no_grad():
        one.model.norm.weight.mul_(1.1)
    assert fingerprint(one) != first


def test_wrapping_keeps_the_network(subject: Callable[..., Model]) -> None:
    model = subject("gpt2")
    assert model.device == torch.device("cpu") and model.tokenizer is None
    assert model.reference.revision is None
