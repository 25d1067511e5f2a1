"""A model: network, tokenizer, layout and reference. A handle with no algorithms."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from depthprune.errors import CheckpointError, LayoutError, OptionError
from depthprune.layout import Layout, discover
from depthprune.plan import Plan, Reference


@dataclass(frozen=True, eq=False)
class Model:
    """A network with its tokenizer, what was found in it, and what it is.

    ``net`` is a transformers model in eval mode; ``dtype`` is that of the checkpoint, in which it is saved again,
    whatever it computes in; ``plan`` is set once units were dropped.
    """

    net: Any
    tokenizer: Any
    layout: Layout
    reference: Reference
    dtype: torch.dtype
    plan: Plan | None = None

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so where tokens go."""
        device: torch.device = self.net.get_input_embeddings().weight.device
        return device

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
) -> Model:
    """Load a model from a folder or the Hub, find its blocks and prove which sublayers can be dropped.

    ``device`` defaults to the GPU if there is one; ``dtype`` to the checkpoint's own on a GPU, float32 on a CPU;
    ``tokenizer`` to the model's folder.
    Raises ``CheckpointError`` where weights are missing, truncated or mismatched, ``LayoutError`` where no blocks are
    found.
    """
    source = str(source)
    if _looks_local(source) and not Path(source).is_dir():
        raise CheckpointError(f"no such model: {source} is not a folder")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _translated(source):
        config = transformers.AutoConfig.from_pretrained(source, **options)
        wanted = _dtype(dtype) or (torch.float32 if device.startswith("cpu") else "auto")
        net, info = _auto_class(config).from_pretrained(
            source,
            dtype=wanted,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            device_map=device if device != "cpu" else None,
            **options,
        )
    for key in ("missing_keys", "mismatched_keys"):
        if info.get(key):
            names = sorted(str(name) for name in info[key])
            raise CheckpointError(f"{source} lacks {len(names)} of its weights ({key.split('_')[0]}: {names[0]}, …)")
    return wrap(net.eval(), _tokenizer(tokenizer or source, options), source, revision, config.dtype)


def wrap(net: nn.Module, tokenizer: Any, id: str, revision: str | None = None, dtype: Any = None) -> Model:
    """Make a ``Model`` of a network that is loaded already. Raises ``LayoutError`` where no blocks are found."""
    saved = dtype if isinstance(dtype, torch.dtype) else next(net.parameters()).dtype
    layout = discover(net, torch.empty((), dtype=saved).element_size())
    return Model(net, tokenizer, layout, Reference(id, revision, len(layout.blocks), fingerprint(net)), saved)


def fingerprint(net: nn.Module) -> str:
    """A digest of all names, shapes and a sample of each weight's values, the same in any floating-point type."""
    digest = hashlib.sha256()
    for name, parameter in sorted(net.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).to("cpu", torch.float32)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or Path(source).exists() or source.count("/") > 1


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None or name == "auto":
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise OptionError(f"unknown dtype {name!r}. Available: auto, float32, bfloat16, float16")
    return found


def _auto_class(config: Any) -> Any:
    architecture = (config.architectures or [""])[0]
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return (
        transformers.AutoModelForMaskedLM if architecture.endswith("ForMaskedLM") else transformers.AutoModelForCausalLM
    )


def _tokenizer(source: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot load the tokenizer of {source}: {_line(error)}; name one with --tokenizer"
        ) from None


@contextmanager
def _translated(source: str) -> Iterator[None]:
    """Turn the many ways in which a checkpoint can be broken into one line."""
    progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except SafetensorError as error:
        raise CheckpointError(f"the weights of {source} are damaged: {_line(error)}") from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, LayoutError):
            raise
        text = _line(error)
        what = "the weights do not match the configuration of" if "size mismatch" in str(error) else "cannot load"
        raise CheckpointError(f"{what} {source}: {text}") from None
    finally:
        if progress:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
