"""Llama-shaped GGUF files with attentions and MLPs missing, as the one architecture of llama.cpp that can lack them.

``deci`` was made for DeciLM and Nemotron-NAS: it has the number of heads and the width of the MLP block by block. Read
against its source, three things need a stub, which are zeros and cost next to nothing:

- an MLP of width 0 would take the block's attention with it, so a dropped one stays 32 wide;
- the heads of block 0 say how wide a head is, so an attention dropped there becomes the ``linear`` attention of
  Nemotron 51B, a square matrix of zeros in 4 bits, which has no KV cache; in the other blocks it is really gone;
- only where a stand-in is to be added in that very place, block 0 keeps one head of zeros, with its layer of KV cache.

Biases that stand in for what is gone go into the last map before them, which is always there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from depthprune.errors import ExportError
from depthprune.export.gguf_file import Array, Field, File, Tensor, zeros

NARROW = 32  # the width of an MLP that is gone: what quantization groups
SOURCES = ("llama", "qwen2")  # qwen2 differs in its biases and in the order of rotary channels

_KNOWN = re.compile(
    r"block_count|context_length|embedding_length|feed_forward_length|vocab_size|attention\.(head_count|head_count_kv|"
    r"layer_norm_rms_epsilon|key_length|value_length)|rope\.(dimension_count|freq_base|scaling\.\w+)"
)
_TENSORS = re.compile(
    r"(token_embd|output|output_norm|rope_freqs)\.weight|blk\.\d+\.((attn|ffn)_norm\.weight|"
    r"(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.(weight|bias))"
)


def deci(file: File, gone: Mapping[int, frozenset[str]], constants: Mapping[tuple[int, str], Array]) -> File:
    """A file in which ``gone`` are zeros (``attention``, ``mlp``, by block), without these zeros.

    ``constants`` (D,) are added to the stream in the place of what is gone.
    Raises ``ExportError`` for files that are not shaped like Llama's.
    """
    _refuse(file)
    file = trimmed(file)
    count, width = int(file.own("block_count")), int(file.own("embedding_length"))
    heads, groups = int(file.own("attention.head_count")), int(file.own("attention.head_count_kv"))
    head = int(file.own("attention.key_length") or width // heads)
    mlp = int(file.own("feed_forward_length"))
    lost = {part: {index for index, parts in gone.items() if part in parts} for part in ("attention", "mlp")}
    biases = _hosted(file, constants)

    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        if _belongs(name, lost):
            assert not name.endswith(("attn_output.weight", "ffn_down.weight")) or not np.any(tensor.data), name
            continue
        turned = name.split(".")[2:3] in (["attn_q"], ["attn_k"]) and file.architecture == "qwen2"
        data = interleaved(tensor.data, heads if "attn_q" in name else groups) if turned else tensor.data
        tensors[name] = replace(tensor, data=data)

    queries = [0 if index in lost["attention"] else heads for index in range(count)]
    keys = [0 if index in lost["attention"] else groups for index in range(count)]
    if 0 in lost["attention"]:
        held = (0, "attention") in constants
        queries[0], keys[0] = (1, 1) if held else (heads, 0)
        tensors |= _first(width, head, held)
    widths = [NARROW if index in lost["mlp"] else mlp for index in range(count)]
    for index in lost["mlp"]:
        tensors |= _narrow(index, width)
    for name, bias in biases.items():
        own = tensors.get(name)
        tensors[name] = Tensor(bias if own is None else own.data + bias, "F32")

    fields = {name.replace(f"{file.architecture}.", "deci.", 1) if name.startswith(f"{file.architecture}.") else name: f
              for name, f in file.fields.items()}  # fmt: skip
    fields.pop("general.size_label", None)  # counts the zeros
    fields["deci.attention.head_count"] = Field(queries, "ARRAY", "UINT32")
    fields["deci.attention.head_count_kv"] = Field(keys, "ARRAY", "UINT32")
    fields["deci.feed_forward_length"] = Field(widths, "ARRAY", "UINT32")
    fields["deci.attention.key_length"] = fields["deci.attention.value_length"] = Field(head, "UINT32")
    return File("deci", fields, tensors)


def trimmed(file: File) -> File:
    """A file without biases that are zero, which some maps have only because others were to have one."""
    idle = {name for name, tensor in file.tensors.items() if name.endswith(".bias") and not np.any(tensor.data)}
    return replace(file, tensors={n: t for n, t in file.tensors.items() if n not in idle}) if idle else file


def interleaved(data: Array, heads: int) -> Array:
    """Rows of queries or keys from halves, which is how Qwen2's files have them, to pairs, as Llama's have them.

    The rows are (heads * 2 * n, …). Within a head row i < n moves to 2 i, row n + i to 2 i + 1.
    """
    size, *rest = data.shape
    return data.reshape(heads, 2, size // heads // 2, *rest).swapaxes(1, 2).reshape(size, *rest)


def _refuse(file: File) -> None:
    prefix, reason = f"{file.architecture}.", ""
    if file.architecture not in SOURCES:
        reason = f"llama.cpp has no architecture {file.architecture} with sublayers missing"
    elif odd := [n for n in file.fields if n.startswith(prefix) and not _KNOWN.fullmatch(n.removeprefix(prefix))]:
        reason = f"deci has no {odd[0].removeprefix(prefix)}"
    elif extra := [name for name in file.tensors if not _TENSORS.fullmatch(name)]:
        reason = f"deci has no {extra[0]}"
    else:
        head = file.own("attention.key_length") or file.own("embedding_length") // file.own("attention.head_count")
        if any(file.own(name) not in (None, head) for name in ("rope.dimension_count", "attention.value_length")):
            reason = "deci rotates whole heads, and has values as wide as keys"
    if reason:
        raise ExportError(f"form gguf cannot express this plan: {reason}; form hf can, or zeroed and then gguf")


def _belongs(name: str, lost: Mapping[str, set[int]]) -> bool:
    """Whether a tensor is of a sublayer that is gone."""
    if not name.startswith("blk."):
        return False
    _, index, part, *_ = name.split(".")
    return int(index) in lost["attention" if part.startswith("attn") else "mlp"]


def _hosted(file: File, constants: Mapping[tuple[int, str], Array]) -> dict[str, Array]:
    """The biases that constants become: of the map that writes to the stream last before the place of each."""
    found: dict[str, Array] = {}
    for (index, part), constant in constants.items():
        if part == "mlp":
            name = f"blk.{index}.ffn_down.bias"
        else:
            name = f"blk.{index - 1}.ffn_down.bias" if index else "blk.0.attn_output.bias"
        found[name] = found[name] + constant if name in found else constant.astype(np.float32)
    return found


def _first(width: int, head: int, held: bool) -> dict[str, Tensor]:
    """What is left of an attention that is gone from block 0: a linear one, or one head where a bias has to be held."""
    norm = {"blk.0.attn_norm.weight": Tensor(np.ones(width, np.float32), "F32")}
    if not held:
        return norm | {"blk.0.attn_output.weight": zeros(width, width, kind="F16" if width % NARROW else "Q4_0")}
    maps = {f"blk.0.{name}.weight": zeros(head, width) for name in ("attn_q", "attn_k", "attn_v")}
    return norm | maps | {"blk.0.attn_output.weight": zeros(width, head)}


def _narrow(index: int, width: int) -> dict[str, Tensor]:
    """What is left of an MLP that is gone."""
    return {
        f"blk.{index}.ffn_norm.weight": Tensor(np.ones(width, np.float32), "F32"),
        f"blk.{index}.ffn_gate.weight": zeros(NARROW, width),
        f"blk.{index}.ffn_up.weight": zeros(NARROW, width),
        f"blk.{index}.ffn_down.weight": zeros(width, NARROW),
    }
