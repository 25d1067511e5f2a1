"""Writing a pruned model as a GGUF file, for llama.cpp and all that is built on it.

llama.cpp's own converter reads a transformers folder and writes the file; what it cannot know is put right afterwards:
sublayers that are gone (``deci.py``), patterns that pruning shifts (``gguf_traps.py``), and the tokenizer.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from depthprune import skip
from depthprune.errors import ExportError, unknown
from depthprune.export import gguf_file, hf, llama_cpp, zeroed
from depthprune.export.deci import deci, trimmed
from depthprune.export.gguf_file import Array, Field, File
from depthprune.export.gguf_traps import faithful
from depthprune.files import new_folder, place, read_json, write_json
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.surgery import clone

NAME = "model.gguf"
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # which the converter writes
QUANTIZED = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")  # of which sublayers can be missing


def write(model: Model, path: str | Path, *, type: str = "f16", converter: str = "", windows: str = "refuse") -> Path:
    """Write a folder with ``model.gguf``, which llama.cpp loads, and the plan.

    Whole-block plans become a file of the model's own architecture; plans that drop attentions or MLPs of Llama,
    Mistral or Qwen2 one of ``deci``, whose attentions that are gone take no weights and no KV cache (as long as flash
    attention is on, which is the default; without it llama.cpp keeps values for every block). A dropped MLP stays 32
    wide, an attention dropped from block 0 leaves a square matrix of zeros. Where a bias stands in for that attention,
    one head and its layer of KV cache stay.

    ``type`` is that of the weights: f32, f16, bf16 and q8_0 come from the converter, q4_k_m and the like from
    llama.cpp's quantizer. ``converter`` is ``convert_hf_to_gguf.py`` or a checkout of llama.cpp that holds it; by
    default ``$LLAMA_CPP``, then the path. ``windows=limit`` is for families whose sliding windows llama.cpp ignores:
    the file then says that texts are no longer than a window. Tokens are compared with those of llama.cpp where it can
    be run.
    Raises ``OptionError`` for an unknown type and a missing tool, ``ExportError`` where llama.cpp cannot express the
    plan.
    """
    script = tools(type=type, converter=converter, windows=windows)
    path = place(path, folder=True)
    gone, constants = missing(model)
    hf.room(model, path)
    with new_folder(path) as folder:
        work = folder / ".work"
        source = hf.write(_whole(model) if hf.uneven(model) else model, work / path.name)
        _tokenizer_model(model, source)
        exact = {"torch.float32": "f32", "torch.bfloat16": "bf16"}.get(str(model.dtype), "f16")
        first = type if type in CONVERTED else exact
        target = llama_cpp.convert(script, source, work / NAME, first, vocabulary=model.tokenizer is not None)
        for weights in source.glob("*.safetensors"):  # room for what comes now
            weights.unlink()
        converted = gguf_file.read(target)
        file = faithful(converted, model.net.config.get_text_config(decoder=True), windows)
        file = _with_tokenizer(file, target, source, model.tokenizer)
        if gone:
            file = deci(file, gone, constants)
        elif file.architecture == "llama":
            file = trimmed(file)
        if file is not converted:
            target = gguf_file.write(file, work / "rewritten.gguf")
        if type in QUANTIZED:
            target = llama_cpp.quantize(target, work / "quantized.gguf", type)
        del converted, file  # views of the files that go
        target.rename(folder / NAME)
        shutil.rmtree(work)
        if model.plan is not None:
            model.plan.save(folder / "plan.json")
        if model.recovery is not None:
            write_json(folder / "recovery.json", model.recovery)
    return path


def tools(*, type: str = "f16", converter: str = "", windows: str = "refuse") -> Path:
    """Check what can be checked before there is a model to write, as ``write`` does, and find the converter."""
    if type not in CONVERTED + QUANTIZED:
        raise unknown("GGUF type", type, CONVERTED + QUANTIZED)
    if windows not in ("refuse", "limit"):
        raise unknown("windows", windows, ("refuse", "limit"))
    gguf_file.library()
    return llama_cpp.converter(converter)


def missing(model: Model) -> tuple[dict[int, frozenset[str]], dict[tuple[int, str], Array]]:
    """What blocks lack (``attention``, ``mlp``), and the constants that are added in its place.

    Raises ``ExportError`` for families whose files cannot say it, and for stand-ins that are no constants.
    """
    gone: dict[int, set[str]] = {}
    constants: dict[tuple[int, str], Array] = {}
    if not hf.uneven(model):
        return {}, {}
    name = hf.stock(model.net).__name__
    if name not in FAMILIES:
        raise ExportError(
            f"form gguf cannot express this plan: parts of blocks are gone, and llama.cpp has nothing like {name} that "
            "may lack them; form hf can, or form zeroed, of which form gguf makes a file of the dense size"
        )
    for index, block in enumerate(blocks_of(model.net, model.layout)):
        for part, module in block.named_modules():
            kind = {"self_attn": "attention", "mlp": "mlp"}.get(part)
            if kind is None or not skip.is_skip(module):
                continue
            gone.setdefault(index, set()).add(kind)
            if getattr(module, "down", None) is not None:
                raise ExportError(
                    f"form gguf cannot express this plan: {index}.{part} has a map of low rank in its place, for which "
                    "llama.cpp has no room; form hf can"
                )
            bias = getattr(module, "bias", None)
            if bias is not None and bool(bias.any()):
                constants[index, kind] = bias.detach().to(model.dtype).float().cpu().numpy().astype(np.float32)
    return {index: frozenset(kinds) for index, kinds in gone.items()}, constants


def _whole(model: Model) -> Model:
    """The model with zeros in the place of its missing sublayers, and without the constants that stand in for them."""
    net = clone(model.net)
    for module in net.modules():
        if skip.is_skip(module):
            module.bias = None  # type: ignore[assignment]
    return replace(zeroed.filled(replace(model, net=net), blocks=False), plan=None, recovery=None)


def _with_tokenizer(file: File, target: Path, source: Path, tokenizer: Any) -> File:
    """The file with the tokenizer that the model has, as far as llama.cpp can be asked."""
    if tokenizer is None:
        warnings.warn(
            "this model has no tokenizer, so llama.cpp can be given token ids only", UserWarning, stacklevel=3
        )
        return file
    fields = dict(file.fields)
    if fields["tokenizer.ggml.model"].value == "llama" and not (source / "tokenizer.model").is_file():
        merged = llama_cpp.scores(read_json(source / "tokenizer.json"), fields["tokenizer.ggml.tokens"].value)
        if merged is not None:
            fields["tokenizer.ggml.scores"] = Field(merged, "ARRAY", "FLOAT32")
            file = replace(file, fields=fields)
            target = gguf_file.write(replace(file, tensors={}), target.with_name("vocabulary.gguf"))
    rule = fields.get("tokenizer.ggml.pre", Field("default", "STRING")).value
    chosen, warning = llama_cpp.splitting(target, rule, tokenizer)
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=3)
    if chosen != rule:
        file = replace(file, fields=fields | {"tokenizer.ggml.pre": Field(chosen, "STRING")})
    return file


def _tokenizer_model(model: Model, folder: Path) -> None:
    """Copy sentencepiece's ``tokenizer.model`` beside the tokenizer, from where this was loaded."""
    name = str(getattr(model.tokenizer, "name_or_path", "") or "")
    if not name or (folder / "tokenizer.model").is_file():
        return
    try:
        cached = None if Path(name).is_dir() else try_to_load_from_cache(name, "tokenizer.model")
    except ValueError:  # no name of the Hub
        cached = None
    found = Path(name) / "tokenizer.model" if Path(name).is_dir() else cached
    if isinstance(found, str | Path) and Path(found).is_file():
        shutil.copyfile(found, folder / "tokenizer.model")
