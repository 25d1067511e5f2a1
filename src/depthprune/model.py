"""A model: network, tokenizer, layout and reference. A handle with no algorithms."""

from __future__ import annotations

import copy
import hashlib
import logging
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from depthprune import dequantize as plain
from depthprune import hub
from depthprune.discover import discover, find_stack
from depthprune.errors import CheckpointError, OptionError, unknown
from depthprune.layout import Layout
from depthprune.offload import Folder, adopt, numbers, places, unwritten
from depthprune.plan import Plan, Reference
from depthprune.sizes import budgets

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What transformers raises where a checkpoint is absent, its configuration odd, or a package that it needs missing.
_REFUSALS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its tokenizer, what was found in it, and what it is.

    ``net`` is a transformers model in eval mode; ``dtype`` is that of the checkpoint, in which it is saved again,
    whatever it computes in; ``plan`` is set once units were dropped, ``recovery`` once weights were recovered.
    """

    net: Any
    tokenizer: Any
    layout: Layout
    reference: Reference
    dtype: torch.dtype
    plan: Plan | None = None
    recovery: Mapping[str, Any] | None = None

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so where tokens go."""
        device: torch.device = self.net.get_input_embeddings().weight.device
        return device

    @property
    def vocabulary(self) -> int:
        """How many token ids the model can look up."""
        return int(self.net.get_input_embeddings().weight.shape[0])

    @property
    def positions(self) -> int | None:
        """How many positions the model has, where its configuration limits them."""
        limit = getattr(self.net.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def parameters(self) -> int:
        """Parameters of the whole network."""
        return self.layout.parameters + self.layout.outside

    @property
    def bytes(self) -> int:
        """Bytes of the weights as they are saved."""
        return self.parameters * torch.empty((), dtype=self.dtype).element_size()


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    place: str = "whole",
    dequantize: bool = True,
) -> Model:
    """Load a model from a folder or the Hub, find its blocks and prove which sublayers can be dropped.

    ``device`` defaults to the GPU if there is one; ``dtype`` to the checkpoint's own on a GPU, float32 on a CPU;
    ``tokenizer`` to the model's folder. ``place`` is where weights are: ``whole`` on the device; ``auto`` there as far
    as there is room, the next blocks in the CPU's memory and the rest on disk (``auto:cuda=10GB,cpu=20GB`` says how
    much), from where each comes to the device when it is used. ``dequantize`` reads weights quantized by
    compressed-tensors as what they stand for, so that they can be dropped and recovered; without it they stay as they
    are.
    Raises ``CheckpointError`` where weights are missing, truncated or mismatched, ``LayoutError`` where no blocks are
    found, ``OptionError`` for a device, dtype or place that there is not.
    """
    source, allowed = str(source), budgets(place)
    device = where(device)
    wanted = _dtype(dtype) or (torch.float32 if device.startswith("cpu") else "auto")
    away = _find(source)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    options |= {"local_files_only": True} if away else {}
    with _translated(source, away):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        reading = plain.reading(source, config) if dequantize else {}
        auto = getattr(transformers, auto_name(config.to_dict()))
        stack, spread = "", {"": device} if device != "cpu" else None
        if allowed is not None and getattr(config, "quantization_config", None):
            raise OptionError("quantized weights cannot wait in memory or on disk; use --place whole")
        if allowed is not None:
            stack, spread = _spread(auto, config, wanted, device, allowed, trust_remote_code)
        waits, folder = spread is not None and len(spread) > 1, Folder()
        net, info = auto.from_pretrained(
            source,
            dtype=wanted,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            device_map=spread,
            offload_folder=str(folder.path) if waits else None,
            **reading,
            **options,
        )
        if reading:
            plain.plain(net)
    for key in ("missing_keys", "mismatched_keys"):
        if info.get(key):
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[key])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            fault = "has no" if key == "missing_keys" else "has another shape than its config.json says of"
            rest = ": its weights are incomplete" if key == "missing_keys" else ""
            raise CheckpointError(f"the checkpoint {source} {fault} {names[0]}{more}{rest}")
    if waits:
        adopt(net, stack, torch.device(device), folder)
    model = wrap(net.eval(), _tokenizer(tokenizer or source, options), source, revision, config.dtype)
    unwritten(net)
    return model


def wrap(net: nn.Module, tokenizer: Any, id: str, revision: str | None = None, dtype: Any = None) -> Model:
    """Make a ``Model`` of a network that is loaded already. Raises ``LayoutError`` where no blocks are found."""
    saved = dtype if isinstance(dtype, torch.dtype) else next(net.parameters()).dtype
    layout = discover(net, torch.empty((), dtype=saved).element_size())
    return Model(net, tokenizer, layout, Reference(id, revision, len(layout.blocks), fingerprint(net)), saved)


def fingerprint(net: nn.Module) -> str:
    """A digest of all names, shapes and a sample of each weight's values, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(net.named_parameters()):
        flat = numbers(parameter).flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).to("cpu", torch.float32)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def where(device: str | None) -> str:
    """The device by that name, by default the GPU if there is one. Raises ``OptionError`` where there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "cpu" if accelerator is None or accelerator.type != "cuda" else "cuda"
    count = 0 if accelerator is None else torch.accelerator.device_count()
    kind = "" if accelerator is None else accelerator.type
    known = ["cpu", *([kind] if kind else []), *(f"{kind}:{index}" for index in range(count))]
    if device not in known:
        raise OptionError(f"no device {device!r} that torch can use on this machine. Available: {', '.join(known)}")
    return device


def _spread(
    auto: Any, config: Any, dtype: Any, device: str, allowed: Mapping[str, int], trust_remote_code: bool
) -> tuple[str, dict[str, Any] | None]:
    """The path of the stack and where each part of a model goes, from its configuration alone."""
    kind = config.dtype or torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        net = auto.from_config(copy.deepcopy(config), dtype=kind, trust_remote_code=trust_remote_code)
    stack = find_stack(net)
    found = places(net, stack, torch.device(device), allowed)
    return stack, None if found == {"": "cpu"} else found


def _find(source: str) -> str:
    """Refuse what cannot be a model; say why the Hub cannot be asked, if it has to be and cannot."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{source} is no model: this folder has no config.json")
        return ""
    if source.startswith((".", "/", "~")) or path.exists() or source.count("/") > 1:
        raise CheckpointError(f"no such model: {source} is {'no folder' if path.exists() else 'not there'}")
    return hub.away()


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None or name == "auto":
        return None
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    found: torch.dtype = getattr(torch, name)
    return found


def auto_name(config: Mapping[str, Any]) -> str:
    """The Auto class that loads a model with this configuration and its head."""
    if config.get("is_encoder_decoder"):
        return "AutoModelForSeq2SeqLM"
    masked = str((config.get("architectures") or [""])[0]).endswith("ForMaskedLM")
    return "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"


def _tokenizer(source: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except _REFUSALS as error:
        raise CheckpointError(
            f"cannot load a tokenizer from {source}; name another with --tokenizer ({_line(error, 120)})"
        ) from None


@contextmanager
def _translated(source: str, away: str = "") -> Iterator[None]:
    """Turn the many ways in which a checkpoint can be broken, or absent, into one line."""
    progress = transformers.utils.logging.is_progress_bar_enabled()
    told = logging.getLogger("accelerate.big_modeling")  # warns of weights that are not in memory, as they should
    level = told.level
    told.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SafetensorError as error:
        raise CheckpointError(f"the weights of {source} are damaged: {_line(error)}") from None
    except _REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if away and isinstance(error, OSError):
            there = f"no folder {source!r} here, and no such model in the Hub's cache"
            raise CheckpointError(f"no such model: there is {there} ({away})") from None
        text = _line(error)
        what = "the weights do not match the configuration of" if "size mismatch" in str(error) else "cannot load"
        raise CheckpointError(f"{what} {source}: {text}") from None
    finally:
        told.setLevel(level)
        if progress:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _line(error: Exception, longest: int = 300) -> str:
    return textwrap.shorten(str(error), longest, placeholder=" …")
