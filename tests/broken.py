"""Folders as other tools leave them, made by hand: blocks taken out of a saved model with nothing but its files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from families import tiny

NUMBER = re.compile(r"(.*?\.)(\d+)(\..*)")
WEIGHTS = "model.safetensors"


def saved(name: str, folder: Path, *, seed: int = 0) -> Path:
    """A tiny model of a family as transformers saves it, in one file of weights."""
    tiny(name, seed=seed).save_pretrained(folder)
    return folder


def cut(dense: Path, out: Path, kept: Sequence[int], *, renumber: bool = True, **fields: Any) -> Path:
    """Copy a folder with some of its blocks; fields of the configuration are set, and those that are ``...`` go."""
    shutil.copytree(dense, out)
    state = load_file(out / WEIGHTS)
    save_file(selected(state, kept, renumber), out / WEIGHTS, {"format": "pt"})
    configure(out, **fields)
    return out


def selected(state: Mapping[str, Tensor], kept: Sequence[int], renumber: bool) -> dict[str, Tensor]:
    """The tensors of some blocks (twice, where a block is named twice) and those outside of all blocks."""
    found = {}
    for name, tensor in state.items():
        match = NUMBER.fullmatch(name)
        if match is None:
            found[name] = tensor
        else:
            for place, block in enumerate(kept):
                if int(match[2]) == block:
                    found[f"{match[1]}{place if renumber else block}{match[3]}"] = tensor.clone()
    return found


def configure(folder: Path, **fields: Any) -> None:
    """Set fields of a folder's configuration; those that are ``...`` are removed."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def reweigh(folder: Path, change: Mapping[str, Tensor | None]) -> None:
    """Replace tensors of a folder; those that are None are removed."""
    state = load_file(folder / WEIGHTS) | dict(change)
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, folder / WEIGHTS, {"format": "pt"}
    )


def shard(folder: Path) -> list[str]:
    """Split a folder's weights into two files and an index; their names."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: state[name] for name in half}, folder / file, {"format": "pt"})
    places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


MODELLING = """
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM


class ShallowLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(LlamaDecoderLayer(config, number) for number in config.numbers)
        self.post_init()
"""


def remote(dense: Path, out: Path, kept: Sequence[int], numbers: Sequence[int]) -> Path:
    """A folder with a modelling file of its own, whose blocks take the cache slots ``numbers``."""
    auto = {"AutoModelForCausalLM": "modeling_shallow.ShallowLlama"}
    names = {"architectures": ["ShallowLlama"], "auto_map": auto, "numbers": list(numbers)}
    cut(dense, out, kept, num_hidden_layers=len(kept), **names)
    (out / "modeling_shallow.py").write_text(MODELLING)
    return out
