"""GGUF files: how they are rewritten, what a naive reading of them computes, what is refused; and llama.cpp itself.

The slow tests need a checkout of llama.cpp (``LLAMA_CPP``) and a Python with llama-cpp-python (``DEPTHPRUNE_LLAMA``, or
this one).
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cuts import cut
from depthprune import demo, runtimes
from depthprune.errors import ExportError, OptionError
from depthprune.export import export, gguf, gguf_file, llama_cpp, run_converter
from depthprune.export.deci import deci, interleaved, trimmed
from depthprune.export.gguf_file import Array, Field, File, Tensor
from depthprune.export.gguf_traps import faithful
from depthprune.model import Model, load, wrap
from families import FAMILIES, configuration, shake

WIDTH, HEADS, GROUPS, HEAD, MLP, BLOCKS, VOCABULARY = 32, 4, 2, 8, 48, 4, 96
TOKENS = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))


# A converter and a reader of our own


def converted(source: Path) -> File:
    """What llama.cpp's converter makes of a folder shaped like Llama or Qwen2, written down naively."""
    config = json.loads((source / "config.json").read_text())
    state = {name: tensor.float().numpy() for name, tensor in load_file(source / "model.safetensors").items()}
    name = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}[config["model_type"]]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    numbers = {
        "block_count": config["num_hidden_layers"], "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"], "attention.head_count": heads,
        "attention.head_count_kv": groups, "context_length": config["max_position_embeddings"],
    }  # fmt: skip
    if config.get("head_dim"):
        numbers |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    fields = {f"{name}.{key}": Field(value, "UINT32") for key, value in numbers.items()}
    fields[f"{name}.attention.layer_norm_rms_epsilon"] = Field(config["rms_norm_eps"], "FLOAT32")
    fields[f"{name}.rope.freq_base"] = Field(config["rope_parameters"]["rope_theta"], "FLOAT32")
    fields["general.name"] = Field("tiny", "STRING")
    fields["tokenizer.ggml.model"] = Field("none", "STRING")
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for own, data in state.items():
        part, _, end = own.rpartition(".")
        if part in outside:
            tensors[f"{outside[part]}.{end}"] = Tensor(data, "F32")
            continue
        _, _, index, rest = part.split(".", 3)
        if name == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            data = naively_interleaved(data, heads if "q_proj" in rest else groups)
        tensors[f"blk.{index}.{inside[rest]}.{end}"] = Tensor(data, "F32")
    return File(name, fields, tensors)


def naively_interleaved(data: Array, heads: int) -> Array:
    """Row by row: within a head the first half goes to the even places, the second half to the odd ones."""
    out, size = np.empty_like(data), len(data) // heads
    for head in range(heads):
        for row in range(size):
            half, number = divmod(row, size // 2)
            out[head * size + 2 * number + half] = data[head * size + row]
    return out


def logits(file: File, tokens: list[int]) -> Array:
    """What llama.cpp's ``deci`` computes of a file, by its source: heads and widths block by block, pairs rotated."""
    tensors = {name: _floats(tensor) for name, tensor in file.tensors.items()}
    own = {name.partition(".")[2]: field.value for name, field in file.fields.items() if name.startswith("deci.")}
    head, eps, base = own["attention.key_length"], own["attention.layer_norm_rms_epsilon"], own["rope.freq_base"]
    angles = np.arange(len(tokens))[:, None] * base ** (-np.arange(0, head, 2) / head)
    angles = angles / tensors.get("rope_freqs.weight", np.ones(head // 2))

    def norm(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[f"{name}.weight"]

    def apply(name: str, x: Array) -> Array:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def turned(x: Array) -> Array:  # (T, H, head), neighbours as one complex number
        pairs = x.reshape(*x.shape[:2], -1, 2)
        real, other = pairs[..., 0], pairs[..., 1]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([real * cos - other * sin, real * sin + other * cos], -1).reshape(x.shape)

    x = tensors["token_embd.weight"][tokens]
    mask = np.triu(np.full((len(tokens),) * 2, -np.inf), 1)
    for index in range(own["block_count"]):
        at = f"blk.{index}."
        heads, groups = own["attention.head_count"][index], own["attention.head_count_kv"][index]
        if heads and not groups:  # linear
            x = x + norm(x, f"{at}attn_norm") @ tensors[f"{at}attn_output.weight"].T
        elif heads:
            y = norm(x, f"{at}attn_norm")
            q, k, v = (apply(f"{at}attn_{p}", y).reshape(len(tokens), -1, head) for p in "qkv")
            q, k = turned(q), turned(k)
            assert q.shape[1] == heads and k.shape[1] == v.shape[1] == groups
            k, v = (np.repeat(part, heads // groups, 1) for part in (k, v))
            weights = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head) + mask
            weights = np.exp(weights - weights.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + apply(f"{at}attn_output", np.einsum("hqk,khd->qhd", weights, v).reshape(len(tokens), -1))
        assert own["feed_forward_length"][index] == len(tensors[f"{at}ffn_up.weight"]) > 0
        y = norm(x, f"{at}ffn_norm")
        gate = apply(f"{at}ffn_gate", y)
        x = x + apply(f"{at}ffn_down", gate / (1 + np.exp(-gate)) * apply(f"{at}ffn_up", y))
    head_weights = tensors.get("output.weight", tensors["token_embd.weight"])
    return np.asarray(norm(x, "output_norm") @ head_weights.T)


def _floats(tensor: Tensor) -> Array:
    library = gguf_file.library()
    if tensor.kind in ("F32", "F16"):
        return tensor.data.astype(np.float64)
    return np.asarray(library.quants.dequantize(tensor.data, library.GGMLQuantizationType[tensor.kind]), np.float64)


@pytest.fixture
def own_converter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Our naive converter in the place of llama.cpp's; its name for the option."""

    def convert(script: Path, folder: Path, target: Path, kind: str, vocabulary: bool) -> Path:
        return gguf_file.write(converted(folder), target)

    monkeypatch.setattr(llama_cpp, "convert", convert)
    script = tmp_path / llama_cpp.SCRIPT
    script.touch()
    return str(script)


def model_of(name: str, **changes: Any) -> Model:
    """A tiny model of a family, with some options changed."""
    family = replace(FAMILIES[name], options=FAMILIES[name].options | changes)
    torch.manual_seed(0)
    net = getattr(transformers, family.network)(configuration(family))
    shake(net, 0, family.gain)
    return wrap(net.float().eval(), None, name)


def filled(model: Model) -> Model:
    """Random numbers in all stand-ins."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


CUTS = (
    ("0.self_attn",), ("1.self_attn", "2.self_attn"), ("0.self_attn", "3.self_attn", "1.mlp"), ("3.mlp",), ("0.mlp",),
    ("1", "2.self_attn", "3.mlp"), ("0", "1.self_attn"), ("0.mlp", "1.self_attn", "2.mlp", "3.self_attn"),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:this model has no tokenizer")
@pytest.mark.parametrize("units", CUTS, ids="+".join)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bias", "qwen2"])
def test_a_naive_reading_of_the_file_computes_the_cut_model(
    name: str, units: tuple[str, ...], own_converter: str, tmp_path: Path
) -> None:
    model = cut(filled(model_of(name)), *units)
    folder = gguf.write(model, tmp_path / "out", type="f32", converter=own_converter)
    assert sorted(file.name for file in folder.iterdir()) == ["model.gguf", "plan.json"]
    file = gguf_file.read(folder / "model.gguf")
    assert file.architecture == "deci"
    with torch.no_grad():
        want = model.net(TOKENS).logits[0].double().numpy()
    np.testing.assert_allclose(logits(file, TOKENS[0].tolist()), want, atol=2e-4)


@pytest.mark.filterwarnings("ignore:this model has no tokenizer")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("units", [("0.self_attn",), ("0.self_attn", "1.self_attn", "3.mlp"), ("1", "2.mlp")])
def test_constants_in_the_place_of_what_is_gone_are_in_the_file(
    name: str, units: tuple[str, ...], own_converter: str, tmp_path: Path
) -> None:
    model = filled(cut(model_of(name), *units, form="bias"))
    file = gguf_file.read(gguf.write(model, tmp_path / "out", converter=own_converter) / "model.gguf")
    with torch.no_grad():
        want = model.net(TOKENS).logits[0].double().numpy()
    np.testing.assert_allclose(logits(file, TOKENS[0].tolist()), want, atol=2e-4)


def test_the_naive_reading_sees_a_wrong_file(own_converter: str, tmp_path: Path) -> None:
    """The twin: channels in the other order, and a constant that is missing."""
    model = cut(model_of("llama"), "1.self_attn")
    with pytest.warns(UserWarning, match="no tokenizer"):
        file = gguf_file.read(gguf.write(model, tmp_path / "out", converter=own_converter) / "model.gguf")
    with torch.no_grad():
        want = model.net(TOKENS).logits[0].double().numpy()
    for name, wrong in (("blk.0.attn_q.weight", naively_interleaved), ("blk.2.ffn_down.weight", lambda d, _: d * 0)):
        own = file.tensors[name]
        other = replace(file, tensors={**file.tensors, name: Tensor(wrong(own.data, HEADS), own.kind)})
        assert np.abs(logits(other, TOKENS[0].tolist()) - want).max() > 1e-2


# Files


def llama(**changes: Any) -> File:
    """A file as the converter writes it for a Llama of four blocks, with random weights."""
    draw = np.random.default_rng(0)
    numbers = {
        "block_count": BLOCKS, "embedding_length": WIDTH, "feed_forward_length": MLP, "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS, "attention.key_length": HEAD, "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
    } | changes  # fmt: skip
    shapes = {
        "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (HEADS * HEAD, WIDTH), "attn_k": (GROUPS * HEAD, WIDTH),
        "attn_v": (GROUPS * HEAD, WIDTH), "attn_output": (WIDTH, HEADS * HEAD), "ffn_gate": (MLP, WIDTH),
        "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP),
    }  # fmt: skip
    tensors = {"token_embd.weight": Tensor(draw.normal(size=(VOCABULARY, WIDTH)).astype(np.float32), "F32")}
    for index in range(BLOCKS):
        for part, shape in shapes.items():
            tensors[f"blk.{index}.{part}.weight"] = Tensor(draw.normal(size=shape).astype(np.float32), "F32")
    fields = {f"llama.{key}": Field(value, "UINT32") for key, value in numbers.items() if value is not None}
    return File("llama", fields, tensors)


def zeroed(file: File, gone: dict[int, frozenset[str]]) -> File:
    tensors = dict(file.tensors)
    for index, parts in gone.items():
        for part in parts:
            name = f"blk.{index}.{'attn_output' if part == 'attention' else 'ffn_down'}.weight"
            tensors[name] = replace(tensors[name], data=np.zeros_like(tensors[name].data))
    return replace(file, tensors=tensors)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    library = gguf_file.library()
    packed = library.quants.quantize(np.ones((4, 64), np.float32), library.GGMLQuantizationType.Q8_0)
    fields = {
        "general.name": Field("naïve", "STRING"), "x.flag": Field(True, "BOOL"), "x.rate": Field(0.5, "FLOAT32"),
        "x.words": Field(["a", "ü", ""], "ARRAY", "STRING"), "x.numbers": Field([1, 0, 3], "ARRAY", "UINT32"),
        "x.windows": Field([True, False], "ARRAY", "BOOL"), "x.many": Field([-1.5, 2.0], "ARRAY", "FLOAT32"),
    }  # fmt: skip
    tensors = {
        "a.weight": Tensor(np.arange(6, dtype=np.float32).reshape(2, 3), "F32"),
        "b.weight": Tensor(np.arange(4, dtype=np.float16), "F16"),
        "c.weight": Tensor(packed, "Q8_0"),
    }
    file = gguf_file.read(gguf_file.write(File("x", fields, tensors), tmp_path / "a.gguf"))
    again = gguf_file.read(gguf_file.write(file, tmp_path / "b.gguf"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert again.architecture == "x" and dict(again.fields) == fields
    assert list(again.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert again.tensors[name].kind == tensor.kind
        np.testing.assert_array_equal(again.tensors[name].data, tensor.data)


def test_zeros_of_a_quantized_type_are_zero() -> None:
    library = gguf_file.library()
    made = gguf_file.zeros(3, 64, kind="Q4_0")
    assert made.data.shape == (3, 36)
    assert not library.quants.dequantize(made.data, library.GGMLQuantizationType.Q4_0).any()


def test_without_the_package_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OptionError, match=r"^form gguf needs the package gguf: pip install [^\n]+$"):
        gguf_file.library()


# Sublayers that are gone

GONE = {0: frozenset({"attention"}), 1: frozenset({"attention", "mlp"}), 2: frozenset({"mlp"})}


def test_arrays_and_stubs_of_what_is_gone(tmp_path: Path) -> None:
    source = zeroed(llama(), GONE)
    file = gguf_file.read(gguf_file.write(deci(source, GONE, {}), tmp_path / "out.gguf"))
    assert file.architecture == "deci" and not [name for name in file.fields if name.startswith("llama.")]
    assert file.own("attention.head_count") == [HEADS, 0, HEADS, HEADS], "block 0 has a linear attention"
    assert file.own("attention.head_count_kv") == [0, 0, GROUPS, GROUPS]
    assert file.own("feed_forward_length") == [MLP, 32, 32, MLP]
    assert file.own("attention.key_length") == file.own("attention.value_length") == HEAD
    assert file.own("block_count") == BLOCKS
    names = {name for name in file.tensors if name.startswith(("blk.0.attn", "blk.1.attn"))}
    assert names == {"blk.0.attn_norm.weight", "blk.0.attn_output.weight"}
    assert file.tensors["blk.0.attn_output.weight"].kind == "Q4_0"
    for name in ("blk.0.attn_output", "blk.1.ffn_gate", "blk.1.ffn_up", "blk.2.ffn_down"):
        assert not _floats(file.tensors[f"{name}.weight"]).any()
    assert file.tensors["blk.2.ffn_down.weight"].data.shape == (WIDTH, 32)
    kept = [name for name in source.tensors if name in file.tensors and "norm" not in name and name[4] not in "012"]
    assert len(kept) == 8
    for name in kept:
        np.testing.assert_array_equal(file.tensors[name].data, source.tensors[name].data)


def test_a_constant_in_block_0_keeps_one_head_and_others_go_into_the_map_before() -> None:
    constants = {(index, "attention"): np.full(WIDTH, index + 1.0) for index in (0, 1)} | {
        (1, "mlp"): np.full(WIDTH, 10.0), (2, "mlp"): np.full(WIDTH, 20.0)
    }  # fmt: skip
    source = zeroed(llama(), GONE)
    own = Tensor(np.full(WIDTH, 0.5, np.float32), "F32")
    source = replace(source, tensors={**source.tensors, "blk.0.ffn_down.bias": own})
    file = deci(source, GONE, constants)
    assert file.own("attention.head_count")[:2] == [1, 0] == file.own("attention.head_count_kv")[:2]
    assert file.tensors["blk.0.attn_q.weight"].data.shape == (HEAD, WIDTH)
    assert file.tensors["blk.0.attn_output.weight"].data.shape == (WIDTH, HEAD)
    biases = {name: tensor.data[0] for name, tensor in file.tensors.items() if name.endswith("bias")}
    assert biases == {
        "blk.0.attn_output.bias": 1.0, "blk.0.ffn_down.bias": 2.5, "blk.1.ffn_down.bias": 10.0,
        "blk.2.ffn_down.bias": 20.0,
    }  # fmt: skip


def test_biases_that_are_zero_are_left_out() -> None:
    extra = {f"blk.3.{part}.bias": Tensor(np.zeros(WIDTH, np.float32), "F32") for part in ("attn_q", "ffn_down")}
    extra["blk.3.attn_v.bias"] = Tensor(np.ones(GROUPS * HEAD, np.float32), "F32")
    source = zeroed(llama(), GONE)
    file = deci(replace(source, tensors={**source.tensors, **extra}), GONE, {})
    assert [name for name in file.tensors if name.endswith("bias")] == ["blk.3.attn_v.bias"]
    assert trimmed(source) is source, "there is nothing to leave out"


@pytest.mark.filterwarnings("ignore:this model has no tokenizer")
def test_whole_block_plans_keep_only_the_biases_that_stand_in(own_converter: str, tmp_path: Path) -> None:
    model = cut(model_of("llama"), "1", "3", form="bias")
    with torch.no_grad():
        model.net.model.layers[0].mlp.down_proj.bias.fill_(0.5)
    file = gguf_file.read(gguf.write(model, tmp_path / "out", converter=own_converter) / "model.gguf")
    assert file.architecture == "llama"
    assert [name for name in file.tensors if name.endswith("bias")] == ["blk.0.ffn_down.bias"]


def test_what_is_not_zero_is_not_dropped() -> None:
    with pytest.raises(AssertionError, match=r"blk\.2\.ffn_down"):
        deci(zeroed(llama(), {0: GONE[0], 1: GONE[1]}), GONE, {})


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (replace(llama(), architecture="gemma2"), "no architecture gemma2 with sublayers missing"),
        (llama(expert_count=4), "deci has no expert_count"),
        (llama(**{"rope.dimension_count": 4}), "rotates whole heads"),
        (replace(llama(), tensors={**llama().tensors, "blk.0.attn_q_norm.weight": gguf_file.zeros(8)}), "attn_q_norm"),
    ],
    ids=["architecture", "field", "rotation", "tensor"],
)
def test_files_that_deci_cannot_be_are_refused(file: File, reason: str) -> None:
    with pytest.raises(ExportError, match=rf"^form gguf cannot[^\n]+{reason}[^\n]+form hf can[^\n]+zeroed[^\n]+$"):
        deci(file, {}, {})


# The order of rotary channels


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 8), (2, 16)])
def test_rows_move_as_they_do_naively(heads: int, size: int) -> None:
    draw = np.random.default_rng(1)
    for shape in ((heads * size, 5), (heads * size,)):
        rows = draw.normal(size=shape)
        np.testing.assert_array_equal(interleaved(rows, heads), naively_interleaved(rows, heads))


def test_quantized_rows_move_as_they_do_before_they_are_quantized() -> None:
    library = gguf_file.library()
    rows, kind = np.random.default_rng(2).normal(size=(16, 64)).astype(np.float32), library.GGMLQuantizationType.Q8_0
    packed = library.quants.quantize(rows, kind)
    np.testing.assert_array_equal(interleaved(packed, 2), library.quants.quantize(interleaved(rows, 2), kind))


# Traps


def said(architecture: str, **fields: Any) -> File:
    named = {f"{architecture}.{key.replace('__', '.')}": field for key, field in fields.items()}
    return File(architecture, named, {})


def count(blocks: int) -> Field:
    return Field(blocks, "UINT32")


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere2"])
def test_windows_are_written_where_llama_cpp_reads_them(name: str) -> None:
    config = SimpleNamespace(layer_types=[S, F, F], sliding_window=8)
    file = faithful(said(name, block_count=count(3)), config)
    field = file.fields[f"{name}.attention.sliding_window_pattern"]
    assert (field.value, field.kind, field.members) == ([True, False, False], "ARRAY", "BOOL")


def test_windows_that_the_converter_wrote_have_to_be_right() -> None:
    own = Field([True, False], "ARRAY", "BOOL")
    file = said("olmo2", block_count=count(2), attention__sliding_window_pattern=own)
    assert faithful(file, SimpleNamespace(layer_types=[S, F])) is file
    with pytest.raises(ExportError, match=r"other sliding windows[^\n]+form hf can$"):
        faithful(file, SimpleNamespace(layer_types=[F, S]))


def test_windows_that_cannot_be_said_are_refused() -> None:
    with pytest.raises(ExportError, match="which blocks of qwen2 have sliding windows"):
        faithful(said("qwen2", block_count=count(2)), SimpleNamespace(layer_types=[S, F], sliding_window=8))
    with pytest.raises(ExportError, match="every fourth block of llama4"):
        faithful(said("llama4", block_count=count(2)), SimpleNamespace(layer_types=["chunked_attention", F]))


def test_windows_of_all_blocks_that_llama_cpp_ignores_are_refused_or_limit_the_text() -> None:
    windowed = SimpleNamespace(sliding_window=8)
    for name, fields in (("llama", {}), ("phi3", {"attention__sliding_window": count(8)})):
        file = said(name, block_count=count(2), context_length=count(128), **fields)
        with pytest.raises(ExportError, match=f"no sliding windows for {name}, and reads texts of over 8 tokens"):
            faithful(file, windowed)
        assert faithful(file, windowed, "limit").fields[f"{name}.context_length"].value == 8
        short = said(name, block_count=count(2), context_length=count(8), **fields)
        assert faithful(short, windowed).fields[f"{name}.context_length"].value == 8
    file = said("mistral3", block_count=count(2), attention__sliding_window=count(8))
    assert faithful(file, windowed) is file


def test_windows_that_depend_on_the_number_of_blocks_are_refused() -> None:
    own = Field([True] * 64, "ARRAY", "BOOL")
    file = said("exaone4", block_count=count(64), attention__sliding_window_pattern=own)
    assert faithful(file, SimpleNamespace(layer_types=[S] * 64)) is file
    file = said("exaone4", block_count=count(2), attention__sliding_window_pattern=replace(own, value=[True] * 2))
    with pytest.raises(ExportError, match="sliding windows only with 64 blocks, not 2"):
        faithful(file, SimpleNamespace(layer_types=[S] * 2))


@pytest.mark.parametrize(("blocks", "normed", "right"), [(40, 0, 1), (64, 1, 1), (56, 1, 0), (64, 0, 0)])
def test_norms_of_queries_depend_on_the_number_of_blocks(blocks: int, normed: int, right: int) -> None:
    """Command R+ has 64 blocks and norms, Command R has neither; a pruned Command R+ would not load."""
    tensors = {"blk.0.attn_q_norm.weight": Tensor(np.ones((2, 8), np.float32), "F32")} if normed else {}
    file = replace(said("command-r", block_count=count(blocks)), tensors=tensors)
    if right:
        assert faithful(file, SimpleNamespace()) is file
    else:
        with pytest.raises(ExportError, match=r"takes such a command-r only with (64 blocks or more|fewer than 64)"):
            faithful(file, SimpleNamespace())


@pytest.mark.parametrize("name", ["smollm3", "llama4"])
def test_blocks_without_rotary_positions_have_to_be_every_fourth(name: str) -> None:
    file = said(name, block_count=count(5))
    assert faithful(file, SimpleNamespace(no_rope_layers=[1, 1, 1, 0, 1])) is file
    for wrong in ([1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]):
        with pytest.raises(ExportError, match=r"every 4th block[^\n]+drop whole groups of 4 blocks; form hf can$"):
            faithful(file, SimpleNamespace(no_rope_layers=wrong))


def test_other_families_cannot_have_blocks_without_rotary_positions() -> None:
    file = said("llama", block_count=count(2))
    assert faithful(file, SimpleNamespace(no_rope_layers=[1, 1])) is file
    with pytest.raises(ExportError, match="no block of llama without rotary positions"):
        faithful(file, SimpleNamespace(no_rope_layers=[1, 0]))


@pytest.mark.parametrize(("name", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_scale_of_the_largest_gemma_goes_by_its_number_of_blocks(name: str, largest: int) -> None:
    config = SimpleNamespace(query_pre_attn_scalar=144, hidden_size=4608, num_attention_heads=32, head_dim=128)
    faithful(said(name, block_count=count(largest)), config)
    with pytest.raises(ExportError, match="with 40 blocks by 128, this model by 144"):
        faithful(said(name, block_count=count(40)), config)
    config.query_pre_attn_scalar = 128
    faithful(said(name, block_count=count(40)), config)
    with pytest.raises(ExportError, match=f"with {largest} blocks by 144, this model by 128"):
        faithful(said(name, block_count=count(largest)), config)


def test_other_activations_than_the_architecture_has_are_refused() -> None:
    with pytest.raises(ExportError, match="with silu, this model has gelu"):
        faithful(said("llama", block_count=count(2)), SimpleNamespace(hidden_act="gelu"))


# What cannot be written


def test_a_whole_model_lacks_nothing() -> None:
    assert gguf.missing(cut(model_of("gemma2"), "1")) == ({}, {})


def test_other_families_with_sublayers_missing_are_refused() -> None:
    with pytest.raises(ExportError, match=r"^form gguf cannot[^\n]+Gemma2ForCausalLM[^\n]+form hf can, or form zeroed"):
        gguf.missing(cut(model_of("gemma2"), "1.mlp"))


def test_maps_of_low_rank_are_refused() -> None:
    with pytest.raises(ExportError, match=r"1\.mlp has a map of low rank[^\n]+form hf can$"):
        gguf.missing(cut(model_of("llama"), "1.mlp", form="lowrank:2"))


def test_an_unknown_type_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"unknown GGUF type 'q4_km'. Did you mean 'q4_k_m'"):
        export(model_of("llama"), tmp_path / "out", "gguf:type=q4_km")


def test_the_converter_is_found_by_name_then_environment_then_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: tmp_path / name / llama_cpp.SCRIPT for name in ("named", "environment", "path")}
    for script in places.values():
        script.parent.mkdir()
        script.touch(mode=0o755)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert llama_cpp.converter() == places["path"]
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "environment"))
    assert llama_cpp.converter() == places["environment"]
    assert llama_cpp.converter(str(places["named"])) == llama_cpp.converter(str(tmp_path / "named")) == places["named"]
    with pytest.raises(OptionError, match=r"^there is no convert_hf_to_gguf.py at nowhere[^\n]+$"):
        llama_cpp.converter("nowhere")
    monkeypatch.setenv("LLAMA_CPP", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match=r"^form gguf needs llama.cpp's [^\n]+LLAMA_CPP=PATH[^\n]+$"):
        llama_cpp.converter()


def test_nothing_is_left_where_the_converter_fails(tmp_path: Path) -> None:
    broken = tmp_path / llama_cpp.SCRIPT
    broken.write_text("import sys\nprint('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr)\nsys.exit(1)\n")
    with pytest.raises(ExportError, match=r"^llama.cpp's converter cannot write this model: Model X is not supported$"):
        gguf.write(model_of("llama"), tmp_path / "out", converter=str(broken))
    assert list(tmp_path.iterdir()) == [broken]


CONVERTER = """
import sys
from pathlib import Path

class TextModel:
    dir_model = Path({folder!r})
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "known":
            return "llama-bpe"
        raise NotImplementedError
    def _create_vocab_sentencepiece(self):
        raise ModuleNotFoundError("sentencepiece")
    def set_vocab(self):
        print("vocabulary")
    def write(self):
        self.set_vocab()

class Family(TextModel):
    hparams = {{"vocab_size": 7}}
    class gguf_writer:
        add_tokenizer_model = add_vocab_size = staticmethod(print)

def main():
    model = Family()
    print(sys.argv[1:], model.get_vocab_base_pre("known"), model.get_vocab_base_pre("other"))
    try:
        model._create_vocab_sentencepiece()
    except FileNotFoundError:
        print("no pieces")
    model.write()
"""


def test_the_converter_is_made_lenient(tmp_path: Path) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(folder=str(tmp_path)))
    command = [sys.executable, "-P", str(run_converter.__file__), str(script), "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['x'] llama-bpe unproven", "no pieces", "vocabulary"]
    done = subprocess.run([*command, "--without-vocabulary"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['x'] llama-bpe unproven", "no pieces", "none", "7"]
    (tmp_path / "tokenizer.model").touch()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "pip install sentencepiece" in done.stderr or "ModuleNotFoundError" in done.stderr


# Tokenizers, as far as they can be compared without llama.cpp


def words(text: str) -> dict[str, list[int]]:
    return {"input_ids": [len(word) for word in text.split()]}


def answering(monkeypatch: pytest.MonkeyPatch, **rules: Callable[[str], list[int]]) -> list[Any]:
    """llama.cpp as a few rules."""
    asked: list[Any] = []

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        known = {name: rule for name, rule in rules.items() if name.replace("_", "-") in request["rules"]}
        return {"rules": {name.replace("_", "-"): [r(t) for t in request["texts"]] for name, r in known.items()}}

    monkeypatch.setattr(llama_cpp, "ask", ask)
    return asked


def right(text: str) -> list[int]:
    return words(text)["input_ids"]


def wrong(text: str) -> list[int]:
    return words(text)["input_ids"][:3]


def test_the_rule_that_makes_the_same_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, gpt_2=wrong, qwen2=right)
    assert llama_cpp.splitting(Path("x"), run_converter.UNPROVEN, words) == ("qwen2", "")
    assert asked[0]["rules"] == llama_cpp.RULES and len(asked[0]["texts"]) > len(llama_cpp.SAMPLES) + 5


def test_a_tokenizer_that_no_rule_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, gpt_2=wrong)
    with pytest.raises(ExportError, match=r"^llama.cpp has no rule for this tokenizer: with its nearest, gpt-2,"):
        llama_cpp.splitting(Path("x"), run_converter.UNPROVEN, words)


def test_other_tokens_under_the_rule_that_the_converter_knows_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, llama_bpe=wrong, gpt_2=right)
    rule, warning = llama_cpp.splitting(Path("x"), "llama-bpe", words)
    assert rule == "llama-bpe" and "other tokens than the model's tokenizer" in warning
    assert asked[0]["rules"] == ("llama-bpe",)


def test_without_llama_cpp_only_known_tokenizers_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(request: dict[str, Any]) -> dict[str, Any]:
        raise OptionError("llama.cpp is not installed here")

    monkeypatch.setattr(llama_cpp, "ask", ask)
    assert llama_cpp.splitting(Path("x"), "llama-bpe", words) == ("llama-bpe", "")
    with pytest.raises(ExportError, match=r"can only be told by trying: llama.cpp is not installed here$"):
        llama_cpp.splitting(Path("x"), run_converter.UNPROVEN, words)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(OptionError, match=r"^gguf:type=q6_k is quantized by llama.cpp: pip install [^\n]+$"):
        llama_cpp.quantize(Path("x"), Path("y"), "q6_k")


def test_what_llama_cpp_says_of_quantizing_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_cpp, "ask", lambda request: {"error": "too small"})
    with pytest.raises(ExportError, match=r"cannot quantize this model to q6_k: too small$"):
        llama_cpp.quantize(Path("x"), tmp_path / "y", "q6_k")
    monkeypatch.setattr(llama_cpp, "ask", lambda request: {})
    with pytest.raises(ExportError, match=r"it wrote nothing$"):
        llama_cpp.quantize(Path("x"), tmp_path / "y", "q6_k")


def test_scores_fall_with_the_order_of_merges() -> None:
    model = {"type": "BPE", "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"], ["▁th", "e"]]}
    assert llama_cpp.scores({"model": model}, ["<s>", "t", "he", "▁t", "▁the"]) == [-5.0, -5.0, -1.0, 0.0, -2.0]
    lines = {"type": "BPE", "merges": ["▁ t", "h e"]}
    assert llama_cpp.scores({"model": lines}, ["he", "▁t"]) == [-1.0, 0.0]
    assert llama_cpp.scores({"model": {"type": "Unigram"}}, ["he"]) is None


def with_vocabulary(kind: str, rule: str) -> File:
    fields = {
        "tokenizer.ggml.model": Field(kind, "STRING"), "tokenizer.ggml.pre": Field(rule, "STRING"),
        "tokenizer.ggml.tokens": Field(["a", "b", "ab"], "ARRAY", "STRING"),
        "tokenizer.ggml.scores": Field([-1000.0] * 3, "ARRAY", "FLOAT32"),
    }  # fmt: skip
    return File("llama", fields, {})


def test_the_file_gets_the_rule_and_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": [["a", "b"]]}}))
    asked: list[Path] = []

    def splitting(file: Path, rule: str, tokenizer: Any) -> tuple[str, str]:
        asked.append(file)
        return ("qwen2", "") if rule == run_converter.UNPROVEN else (rule, "other tokens")

    monkeypatch.setattr(llama_cpp, "splitting", splitting)
    target = tmp_path / "model.gguf"
    file = gguf._with_tokenizer(with_vocabulary("gpt2", run_converter.UNPROVEN), target, tmp_path, words)
    assert file.fields["tokenizer.ggml.pre"].value == "qwen2" and asked == [target]
    assert file.fields["tokenizer.ggml.scores"].value == [-1000.0] * 3
    with pytest.warns(UserWarning, match="other tokens"):
        file = gguf._with_tokenizer(with_vocabulary("llama", "default"), target, tmp_path, words)
    assert file.fields["tokenizer.ggml.pre"].value == "default"
    assert file.fields["tokenizer.ggml.scores"].value == [-2.0, -2.0, 0.0]
    assert gguf_file.read(asked[1]).fields["tokenizer.ggml.scores"].value == [-2.0, -2.0, 0.0], "compared as written"
    (tmp_path / "tokenizer.model").touch()  # from which the converter has read them
    with pytest.warns(UserWarning, match="other tokens"):
        file = gguf._with_tokenizer(with_vocabulary("llama", "default"), target, tmp_path, words)
    assert file.fields["tokenizer.ggml.scores"].value == [-1000.0] * 3


def test_sentencepiece_files_come_along(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("with", "without", "out", "other")}
    for folder in places.values():
        folder.mkdir()
    (places["with"] / "tokenizer.model").write_bytes(b"pieces")
    model = model_of("llama")
    for name, out, there in (("with", "out", True), ("without", "other", False), ("no/such", "other", False)):
        tokenizer = SimpleNamespace(name_or_path=str(places.get(name, name)))
        gguf._tokenizer_model(replace(model, tokenizer=tokenizer), places[out])
        assert (places[out] / "tokenizer.model").is_file() is there


# The proof's own reading of llama.cpp

LOADED = """
print_info: n_layer               = 3
print_info: n_head                = [4, 0, 4]
print_info: n_head_kv             = [2, 0, 1]
print_info: n_embd_head_k         = 8
"""
CACHE = (
    "llama_kv_cache: size =    1.50 MiB (  4096 cells,   3 layers,  1/1 seqs), "
    "K (f32):    0.38 MiB, V (f32):    1.12 MiB\n"
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script that runs llama.cpp, loaded without llama.cpp."""
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    module = importlib.import_module("depthprune.runtimes.prove_llama_cpp")
    yield module
    del sys.modules[module.__name__]


def test_layers_are_counted_by_the_bytes_of_keys(driver: ModuleType) -> None:
    kept = driver.caches(["llama_context: x\n", CACHE[:40], CACHE[40:]])
    assert [cells for cells, _, _ in kept] == [4096]
    assert driver.layers(LOADED, kept) == 2
    same = LOADED.replace("[2, 0, 1]", "1")
    assert driver.layers(same, kept) == 3


def test_bytes_that_do_not_add_up_are_no_count(driver: ModuleType) -> None:
    for wrong_size in ("0.25", "0.50"):
        assert (
            driver.layers(LOADED, driver.caches([CACHE.replace("K (f32):    0.38", f"K (f32):    {wrong_size}")]))
            is None
        )
    assert driver.layers(LOADED, []) is None
    assert driver.layers("", driver.caches([CACHE])) is None
    coarse = CACHE.replace("4096 cells", "256 cells").replace("0.38", "0.02")  # 5 numbers more or less
    assert driver.layers(LOADED, driver.caches([coarse])) is None


# llama.cpp itself


@pytest.fixture
def checkout() -> str:
    try:
        script = llama_cpp.converter()
        runtimes.python("llama.cpp")
    except OptionError as error:
        pytest.skip(str(error))
    return str(script)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
RUN: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    ("llama", {}, ("1", "3"), ""),
    ("llama", {}, ("0.self_attn",), ""),
    ("llama", {}, ("0.self_attn", "2.self_attn", "1.mlp", "3.mlp"), ""),
    ("llama", {}, ("1", "3.self_attn"), ""),
    ("llama", {}, ("0.self_attn", "1.self_attn", "2.mlp", "3"), "bias"),
    ("llama", {}, ("1", "3"), "bias"),
    ("llama_tied", {}, ("1.self_attn", "2.mlp"), ""),
    ("llama_bias", {}, ("1.self_attn", "2.mlp"), ""),
    ("llama_bias", {}, ("0.self_attn", "2"), "bias"),
    ("llama", {"rope_parameters": LLAMA3}, ("0.self_attn", "2.mlp"), ""),
    ("llama", {"head_dim": 16}, ("1.self_attn", "2.mlp"), ""),
    ("qwen2", {}, ("2",), ""),
    ("qwen2", {}, ("0.self_attn", "2.self_attn", "3.mlp"), ""),
    ("qwen2", {}, ("1.self_attn", "2.mlp"), "bias"),
    ("qwen3", {}, ("1",), ""),
    ("olmo2", {}, ("1",), ""),
    ("gemma2", {"query_pre_attn_scalar": 8}, ("0",), ""),
    ("gemma3_text", {"vocab_size": 300}, ("0",), ""),
    ("cohere2", {"rotary_pct": 1.0}, ("1",), ""),
]


def byte_level(size: int = 300) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes as GPT-2 splits text, learnt from the samples, with a token in front."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(llama_cpp.texts(), trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


def pieces(size: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer of words with their space in front and bytes for what is rare, as sentencepiece makes them."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, limit_alphabet=60, show_progress=False)
    made.train_from_iterator(llama_cpp.texts()[len(llama_cpp.SAMPLES) :], trainer)
    state = json.loads(made.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are no special tokens
    state["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    made = Tokenizer.from_str(json.dumps(state))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this model has no tokenizer", "ignore:llama.cpp has no sliding windows")
@pytest.mark.parametrize(("name", "changes", "units", "form"), RUN, ids=lambda part: str(part)[:40])
def test_llama_cpp_computes_the_cut_model(
    name: str, changes: dict[str, Any], units: tuple[str, ...], form: str, checkout: str, tmp_path: Path
) -> None:
    model = cut(model_of(name, **changes), *units, form=form)
    if "vocab_size" in changes:  # the converter wants one
        model = replace(model, tokenizer=byte_level(changes["vocab_size"]))
    folder = gguf.write(filled(model) if form else model, tmp_path / "out", type="f32")
    proofs = runtimes.prove(folder, "llama.cpp", runtimes.refer(model))
    if form and "0.self_attn" in units:  # the one head that holds the constant
        proofs = [proof for proof in proofs if not proof.name.startswith("KV cache")]
    assert [proof for proof in proofs if not proof.passed] == []
    assert len(proofs) >= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this model has no tokenizer")
@pytest.mark.parametrize(
    ("name", "unit", "part"),
    [("gemma2", "0", "faithful"), ("qwen2", "0.self_attn", "interleaved"), ("llama", "2.mlp", "NARROW")],
)
def test_llama_cpp_sees_what_was_not_put_right(
    name: str, unit: str, part: str, checkout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: windows that are not said, rows in the other order, and an MLP of width 0."""
    stack = importlib.import_module("depthprune.export.deci")
    if part == "faithful":
        monkeypatch.setattr(gguf, part, lambda file, config, windows: file)
    else:
        monkeypatch.setattr(stack, part, 0 if part == "NARROW" else lambda data, heads: data)
    if part == "NARROW":
        monkeypatch.setattr(stack, "_narrow", lambda index, width: {})
    model = cut(model_of(name), unit)
    folder = gguf.write(model, tmp_path / "out", type="f32")
    proofs = runtimes.prove(folder, "llama.cpp", runtimes.refer(model))
    assert any(not proof.passed and proof.name.startswith(("log-prob", "runs")) for proof in proofs), proofs


@pytest.mark.slow
@pytest.mark.parametrize("make", [byte_level, pieces])
def test_llama_cpp_makes_the_same_tokens(
    make: Callable[[], PreTrainedTokenizerFast], checkout: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tokenizer = make()
    model = replace(cut(model_of("llama", vocab_size=len(tokenizer)), "1.self_attn"), tokenizer=tokenizer)
    folder = gguf.write(model, tmp_path / "out", type="q8_0")
    fields = gguf_file.read(folder / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].value == ("gpt-2" if make is byte_level else "default")
    assert [str(warning.message) for warning in recwarn if "llama.cpp" in str(warning.message)] == []
    scores = {name: field for name, field in fields.items() if name.endswith("scores")}
    if make is pieces:  # the twin: with the scores that the converter gives, llama.cpp merges in another order
        [name] = scores
        flat = replace(scores[name], value=[-1000.0] * len(tokenizer))
        file = gguf_file.read(folder / "model.gguf")
        gguf_file.write(replace(file, fields={**file.fields, name: flat}), tmp_path / "flat.gguf")
        assert "other tokens" in llama_cpp.splitting(tmp_path / "flat.gguf", "default", tokenizer)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_k_m", "q4_0"])
def test_coarser_files_stay_near(kind: str, checkout: str, tmp_path: Path) -> None:
    model = cut(load(demo.unpack(tmp_path / "demo"), device="cpu"), "0.self_attn", "5.self_attn", "6.mlp", "9")
    folder = gguf.write(model, tmp_path / "out", type=kind)
    reference = runtimes.refer(model)
    answer = runtimes.ask(folder / "model.gguf", "llama.cpp", vars(reference))
    gaps = [abs(a - b) for a, b in zip(answer["logprobs"], reference.logprobs, strict=True)]
    assert sum(gaps) / len(gaps) <= {"f16": 0.003, "bf16": 0.03, "q8_0": 0.06}.get(kind, 0.4)
    assert answer["kv_layers"] == reference.attentions == 13
    assert answer["kv_bytes"] == 13 * 2 * 64 * 4
    assert answer["dtype"] == ("quantized" if kind.startswith("q4") else "float16")
    assert (folder / "model.gguf").stat().st_size < {"f16": 0.6, "bf16": 0.6, "q8_0": 0.35}.get(kind, 0.3) * 32e6
