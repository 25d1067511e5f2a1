"""Writing a pruned model with quantized weights, through the libraries that are kept well.

The folder is that of form ``hf`` in all but its weights: configuration, tokenizer, plan and modelling file are those
of an unquantized one; the configuration has a ``quantization_config`` besides, and ``quantization.json`` says how the
numbers came about. Quantized are the linear layers of the blocks; embeddings, head, norms and stand-ins stay.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from depthprune.data import Data, Mixture, check_vocabulary
from depthprune.errors import ExportError, OptionError, unknown
from depthprune.export import hf
from depthprune.export.ways import LLM_COMPRESSOR, NEEDS, TORCHAO, WAYS, Way
from depthprune.files import place, read_json, write_json, write_text
from depthprune.layout import blocks_of
from depthprune.model import Model, auto_name
from depthprune.offload import offloaded
from depthprune.record import inputs
from depthprune.skip import is_skip

GROUPS = (128, 64, 32)  # sizes that the kernels of vLLM know, the smallest file first
BATCH = 8  # rows of calibration that run together
PROBE = (2, 32)


@dataclass(frozen=True)
class Layers:
    """The linear layers of a network by name: those to quantize, with the width of what they read, and the others."""

    quantized: Mapping[str, int]
    kept: tuple[str, ...]


def quantize(model: Model, path: str | Path, how: str, data: Data | Mixture | None = None, *, group: int = 0) -> Path:
    """Write a model as a folder with quantized weights that ``from_pretrained`` loads; most ways also serve in vLLM.

    ``w4a16`` rounds weights to 4 bits, with one scale for each ``group`` of a row; ``gptq``, ``awq`` and ``autoround``
    do so with regard to ``data``, of which they need some. ``w8a16`` rounds to 8 bits, with one scale for each row;
    ``w8a8`` and ``fp8`` round the activations too. These seven are llm-compressor's. ``int8`` is torchao's rounding of
    weights to 8 bits; ``nf4`` and ``int8-bnb`` are those of bitsandbytes. ``group`` is, unless set, the largest of 128,
    64 and 32 that divides the width of every layer. The model stays as it is.
    Raises ``OptionError`` for a way that does not exist, a missing library or missing data and a group that does not
    fit, ``ExportError`` where the model cannot be quantized.
    """
    way = _way(how)
    path = place(path, folder=True)
    library = _library(how, way)
    if way.needs_data and data is None:
        raise OptionError(f"--quantize {how} goes by what the layers are given on a text: name one with --data")
    _suits(model, how)
    layers = linear_layers(model.net, model.layout.path)
    size = group_size(how, way, layers, group)
    rows = [] if data is None or not way.needs_data else batches(data, model)
    with hf.filled(path) as folder:
        dense = hf.write(model, folder / "dense")
        with silence():
            if way.library == LLM_COMPRESSOR:
                net = _fresh(model, dense)
                mappings = awq_mappings(net, model, layers) if way.method == "awq" else []
                _compress(library, net, model, way, layers, size, rows, mappings)
            else:
                net = _fresh(model, dense, quantization_config=_loading(way, layers.kept))
            net.save_pretrained(folder / "packed")  # before it is run: on a CPU, bitsandbytes then saves something else
            del net
            _join(dense, folder / "packed", folder)
            error = _error(model, _fresh(model, folder))
        if not math.isfinite(error):
            raise ExportError(f"--quantize {how} leaves a model whose predictions are no numbers; choose another way")
        record = {
            "how": how,
            "weights": f"{way.kind}{way.weights}",
            "activations": way.activations,
            "group": size or None,
            "method": way.method,
            "layers": len(layers.quantized),
            "kept": list(layers.kept),
            "logit_error": error,
            "data": None if data is None or not way.needs_data else data.describe(),
            "made_by": {name: _version(name) for name in (way.library, "torch", "transformers")},
        }
        write_json(folder / "quantization.json", record)
    return path


def _way(how: str) -> Way:
    """The way of that name. Raises ``OptionError`` where there is none."""
    if how not in WAYS:
        raise unknown("quantization", how, WAYS)
    return WAYS[how]


def _library(how: str, way: Way) -> ModuleType:
    """The library that a way needs. Raises ``OptionError`` where it is not installed, or does not go with the rest."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # llm-compressor writes its log to what is stdout now
            found = importlib.import_module(way.library)
            if way.library == LLM_COMPRESSOR:
                importlib.import_module("llmcompressor.entrypoints")
        return found
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == way.library:
            raise OptionError(f"--quantize {how} needs {NEEDS[way.library]}") from None
        reason = str(error)
    except ImportError as error:
        reason = str(error)
    reason = " ".join(reason.split())[:200]
    raise OptionError(f"--quantize {how} needs {way.library}, which cannot be imported here ({reason})")


def _suits(model: Model, how: str) -> None:
    """Refuse models that are not whole in memory, or quantized already."""
    if getattr(model.net.config, "quantization_config", None):
        raise ExportError(
            f"--quantize {how} needs weights that are not quantized yet: name the model they were made from"
        )
    if offloaded(model.net):
        raise ExportError(f"--quantize {how} needs the smaller model whole in memory: load it with --place whole")


def linear_layers(net: nn.Module, stack: str, least: float = 0.9) -> Layers:
    """The linear layers of a network: those of its blocks are quantized, those outside and in stand-ins are kept.

    Raises ``ExportError`` where less than ``least`` of the blocks' parameters are in linear layers, as with experts
    that are kept as one tensor.
    """
    quantized: dict[str, int] = {}
    kept: list[str] = []
    skips = tuple(f"{name}." for name, module in net.named_modules() if is_skip(module))
    held, other, inside = 0, dict[str, int](), 0
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            if name.startswith(f"{stack}.") and not name.startswith(skips):
                quantized[name] = module.in_features
                inside += module.weight.numel()
            else:
                kept.append(name)
    for name, parameter in net.named_parameters():
        if not name.startswith(f"{stack}.") or name.startswith(skips):
            continue
        held += parameter.numel()
        if name.removesuffix(".weight") not in quantized:
            other[name] = parameter.numel()
    if inside < least * held or not quantized:
        largest = max(other, key=lambda name: other[name], default="")
        raise ExportError(
            f"only {inside / max(held, 1):.0%} of the blocks' parameters are in linear layers, which is what can be "
            f"quantized; {largest} is not"
        )
    return Layers(quantized, tuple(kept))


def group_size(how: str, way: Way, layers: Layers, group: int = 0) -> int:
    """How many weights share a scale: the size asked for, or the largest that divides the width of every layer.

    0 for ways that have one scale for each row. Raises ``OptionError`` for a size that does not fit.
    """
    if not way.grouped:
        if group:
            raise OptionError(f"--quantize {how} has one scale for each row of weights and takes no group")
        return 0
    for size in (group,) if group else GROUPS:
        if size > 0 and all(width % size == 0 for width in layers.quantized.values()):
            return size
    tried = group or GROUPS[-1]
    name, width = next(((n, w) for n, w in layers.quantized.items() if tried < 1 or w % tried), ("", 0))
    fits = [size for size in GROUPS if all(w % size == 0 for w in layers.quantized.values())]
    advice = f"fitting sizes: {', '.join(map(str, fits))}" if fits else "w8a16 and w8a8 need no groups"
    raise OptionError(f"groups of {tried} do not divide {name}, which reads {width} numbers; {advice}")


def batches(data: Data | Mixture, model: Model, rows: int = BATCH) -> list[dict[str, Tensor]]:
    """The rows of a text as the calibration reads them: several together where there is no padding, else one by one.

    Raises ``DataError`` for tokens that the model does not have.
    """
    check_vocabulary(data, model.vocabulary)
    found: list[dict[str, Tensor]] = []
    for part in data.parts if isinstance(data, Mixture) else (data,):
        right = part.right_only()
        if right.packed:
            found += [{"input_ids": piece} for piece in torch.split(right.tokens, rows)]
        else:
            found += [{"input_ids": row[real][None]} for row, real in zip(right.tokens, right.mask, strict=True)]
    return found


def awq_mappings(net: nn.Module, model: Model, layers: Layers) -> list[tuple[str, list[str]]]:
    """For every block, which module can take over a scale from which layers that read it, by full name.

    llm-compressor knows the pairs by family and finds them by patterns over the whole model, which do not see that a
    sublayer is gone; so they are resolved here, block by block, among the modules that are there. Where a stand-in may
    read a norm, that norm keeps its scale. Raises ``OptionError`` for families that llm-compressor does not know.
    """
    transform = "llmcompressor.modifiers.transform.awq"
    patterns = importlib.import_module(f"{transform}.mappings").AWQ_MAPPING_REGISTRY
    dynamic = importlib.import_module(f"{transform}.dynamic_mappings")
    kind = type(net).__name__
    if kind not in patterns and kind not in dynamic.AWQ_DYNAMIC_MAPPING_REGISTRY:
        raise OptionError(f"--quantize awq does not know {kind}; --quantize gptq needs to know no family")
    wanted = [(one.smooth_layer, one.balance_layers) for one in dynamic.get_layer_mappings_from_model(net)]
    names = [f"{model.layout.path}.{index}" for index in range(len(model.layout.blocks))]
    blocks = zip(names, blocks_of(net, model.layout), strict=True)
    return [pair for name, block in blocks for pair in pairs(name, block, wanted, layers)]


def pairs(
    prefix: str, block: nn.Module, wanted: Sequence[tuple[str, Sequence[str]]], layers: Layers
) -> list[tuple[str, list[str]]]:
    """Resolve patterns of (module that takes over a scale, layers that read it) among the modules of one block."""
    skips = [name for name, module in block.named_modules() if is_skip(module)]
    lowrank = any(isinstance(getattr(block.get_submodule(name), "down", None), nn.Module) for name in skips)
    gone = tuple(f"{name}." for name in skips)
    there = [
        f"{prefix}.{name}" for name, _ in block.named_modules() if name and not f"{name}.".startswith(gone or "\0")
    ]
    found = []
    for smooth, balance in wanted:
        before = [name for name in there if _matches(smooth, name)]
        after = [name for name in there if name in layers.quantized and any(_matches(one, name) for one in balance)]
        if len(before) == 1 and after and (before[0] in layers.quantized or not lowrank):
            found.append((before[0], after))
    return found


def _matches(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _fresh(model: Model, folder: Path, **options: Any) -> Any:
    """The network that a folder holds, as its own: what is done to it does not touch the model."""
    auto = getattr(transformers, auto_name(read_json(folder / "config.json")))
    device = str(model.device)
    if device != "cpu":
        options |= {"device_map": {"": device}}
    return auto.from_pretrained(folder, dtype="auto", **options).eval()


def _compress(
    library: ModuleType,
    net: Any,
    model: Model,
    way: Way,
    layers: Layers,
    size: int,
    rows: list[dict[str, Tensor]],
    mappings: list[tuple[str, list[str]]],
) -> None:
    """Let llm-compressor quantize a network in place."""
    schemes = importlib.import_module("compressed_tensors.quantization")
    modifiers = importlib.import_module("llmcompressor.modifiers.quantization")
    weights = {"num_bits": way.weights, "type": way.kind, "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    activations = {"num_bits": way.activations, "type": way.kind, "symmetric": True, "dynamic": True}
    scheme = schemes.QuantizationScheme(
        targets=["Linear"],
        weights=schemes.QuantizationArgs(**weights),
        input_activations=None if way.activations == 16 else schemes.QuantizationArgs(**activations, strategy="token"),
    )
    groups = {"config_groups": {"group_0": scheme}, "ignore": list(layers.kept)}
    recipe: list[Any]
    if way.method == "autoround":
        autoround = importlib.import_module("llmcompressor.modifiers.autoround")
        recipe = [autoround.AutoRoundModifier(**groups, batch_size=BATCH, enable_torch_compile=False)]
    else:
        kind = modifiers.GPTQModifier if way.method == "gptq" else modifiers.QuantizationModifier
        recipe = [kind(**groups)]
    if way.method == "awq":
        transform = importlib.import_module("llmcompressor.modifiers.transform.awq")
        pairs = [transform.AWQMapping(smooth, balance) for smooth, balance in mappings]
        recipe.insert(0, transform.AWQModifier(mappings=pairs))
    given: dict[str, Any] = {}
    if rows:
        targets = list(dict.fromkeys(type(block).__name__ for block in blocks_of(net, model.layout)))
        given = {"dataset": DataLoader(rows, batch_size=None), "sequential_targets": targets}  # type: ignore[arg-type]
        given |= {"processor": model.tokenizer or object(), "num_calibration_samples": len(rows)}
    with _pinned():
        library.oneshot(model=net, recipe=recipe, **given)


@contextlib.contextmanager
def _pinned() -> Iterator[None]:
    """Where there is no accelerator, keep llm-compressor's cache from pinning memory for one, which torch refuses."""
    cache = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
    original = getattr(cache, "pin_memory", None)
    if original is None or torch.accelerator.is_available():
        yield
        return
    cache.pin_memory = lambda *_, **__: None
    try:
        yield
    finally:
        cache.pin_memory = original


def _loading(way: Way, kept: Sequence[str]) -> Any:
    """The configuration by which transformers quantizes a model while it loads it."""
    if way.library == TORCHAO:
        quantization = importlib.import_module("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=list(kept))
    options: dict[str, Any] = {"load_in_8bit": True}
    if way.weights == 4:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = transformers.BitsAndBytesConfig
    return config(llm_int8_skip_modules=list(kept), **options)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _error(model: Model, net: Any) -> float:
    """How far the logits are from those of the model on random tokens, relative to their spread."""
    tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(5))
    want = model.net(**inputs(tokens.to(model.device), None), use_cache=False).logits.float().cpu()
    have = net(**inputs(tokens.to(net.device), None), use_cache=False).logits.float().cpu()
    return float((have - want).norm() / (want - want.mean(-1, keepdim=True)).norm())


def _join(dense: Path, packed: Path, folder: Path) -> None:
    """Make one folder of two: all of the first but its weights, the weights of the second and how to read them."""
    config = read_json(dense / "config.json")
    config["quantization_config"] = read_json(packed / "config.json")["quantization_config"]
    mode = (dense / "config.json").stat().st_mode
    for file in (*dense.iterdir(), *packed.iterdir()):
        if (file.parent == packed) == (".safetensors" in file.suffixes):
            file.rename(folder / file.name).chmod(mode)
    for left in (dense, packed):
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def _version(library: str) -> str:
    return str(importlib.import_module(library).__version__)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No bars, log lines or warnings from the libraries for a moment; what fails is raised all the same."""
    spoken, before = [], logging.root.manager.disable
    with contextlib.suppress(ImportError):
        spoken = [importlib.import_module("loguru").logger]
    for logger in spoken:
        logger.disable("llmcompressor")
        logger.disable("compressed_tensors")
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(before)
        for logger in spoken:
            logger.enable("llmcompressor")
            logger.enable("compressed_tensors")
