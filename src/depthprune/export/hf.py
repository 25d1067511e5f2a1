"""Writing a pruned model as a Hugging Face folder.

Whole-block plans become a plain checkpoint of the same architecture. Uneven plans (some attention or MLP gone) become a
folder with ``per_layer_config`` skips in its configuration and a small modelling file, so that
``from_pretrained(..., trust_remote_code=True)`` builds it anywhere, and ``import depthprune`` does without.
"""

from __future__ import annotations

import copy
import inspect
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from depthprune import skip
from depthprune.discover import PROBE, REFUSALS
from depthprune.errors import ExportError
from depthprune.files import new_folder, place, write_json
from depthprune.layout import blocks_of
from depthprune.model import Model, auto_name
from depthprune.offload import hold, offloaded
from depthprune.record import close
from depthprune.surgery import unmark

MODELLING = "modeling_depthprune"
ARCHITECTURE = "DepthpruneForCausalLM"


def uneven(model: Model) -> bool:
    """Whether a model misses sublayers, so that its blocks are not all alike."""
    return bool(getattr(model.net.config.get_text_config(decoder=True), "depthprune", None))


def write(model: Model, path: str | Path) -> Path:
    """Write a model as a folder that ``from_pretrained`` loads, in the checkpoint's own dtype.

    Dropped weights are really gone. The folder appears whole or not at all.
    Raises ``OptionError`` where the place holds files already, ``ExportError`` where the disk has no room or
    transformers cannot save the model.
    """
    path = place(path, folder=True)
    room(model, path)
    net, config = model.net, model.net.config
    if config.model_type == "nemotron-nas":
        raise ExportError("form hf cannot hold what is DeciLM already: export the folder that it was made from")
    changed = ("dtype", "auto_map", "architectures")
    before = {name: vars(config)[name] for name in changed if name in vars(config)}
    try:
        with filled(path) as folder:
            if uneven(model):
                config.auto_map = _modelling(net, folder)
            with _quiet():
                if offloaded(net):
                    _block_by_block(model, folder)
                else:
                    net.save_pretrained(folder, state_dict=_state(net, model.dtype))
            if uneven(model) and _plain_head(model):
                config.architectures = [ARCHITECTURE]  # which vLLM knows once depthprune is installed, and only then
            config.dtype = model.dtype  # where transformers has put the type that the network computes in
            config.save_pretrained(folder)
            companions(model, folder)
    finally:
        for name in changed:
            vars(config).pop(name, None)
        vars(config).update(before)
    return path


@contextmanager
def filled(path: Path) -> Iterator[Path]:
    """``new_folder`` for weights: also turns what safetensors says of a full disk into one line."""
    try:
        with new_folder(path) as folder:
            yield folder
    except SafetensorError as error:
        raise ExportError(f"cannot write the weights to {path}: {error}") from None


def companions(model: Model, folder: Path) -> None:
    """Write what lies beside the weights: the tokenizer, the plan, and what was recovered."""
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    if model.plan is not None:
        model.plan.save(folder / "plan.json")
    if model.recovery is not None:
        write_json(folder / "recovery.json", model.recovery)
    for file in folder.iterdir():  # safetensors makes files that only their owner can read
        if file.is_file():
            file.chmod((folder / "config.json").stat().st_mode)


def whole_config(model: Model) -> Any:
    """The configuration of the stock architecture, without what it says of missing sublayers."""
    config = copy.deepcopy(model.net.config)
    unmark(config.get_text_config(decoder=True))
    vars(config).pop("auto_map", None)
    return config


@torch.no_grad()
def _plain_head(model: Model) -> bool:
    """Whether logits are made of the last stream as vLLM's Transformers backend makes them; Granite's are not."""
    net, text = model.net, model.net.config.get_text_config(decoder=True)
    if auto_name(net.config.to_dict()) != "AutoModelForCausalLM":
        return False
    tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(5)).to(model.device)
    try:
        want = net(tokens, use_cache=False).logits
        have = net.get_output_embeddings()(net.base_model(tokens, use_cache=False).last_hidden_state)
    except REFUSALS:
        return False
    have, bound = have * getattr(text, "logit_scale", 1.0), getattr(text, "final_logit_softcapping", None)
    return close(torch.tanh(have / bound) * bound if bound else have, want)


def plain(model: Model, path: str | Path) -> Path:
    """Write a model as a plain checkpoint of its architecture, for loaders that run no code of others.

    Raises ``ExportError`` where the model misses sublayers, which a plain checkpoint cannot say.
    """
    if uneven(model):
        spec = model.net.config.get_text_config(decoder=True).depthprune
        where = ", ".join(sorted(spec["skip"], key=int)[:6])
        what = f"parts of blocks {where} are gone, not whole blocks"
        if held := {name.partition(".")[0] for name in spec.get("stand_in", {})}:
            what += f" (of {', '.join(sorted(held, key=int)[:6])} their stand-ins are left)"
        raise ExportError(f"form plain cannot express this plan: {what}; form hf can")
    return write(model, path)


def room(model: Model, path: Path) -> None:
    """Raise ``ExportError`` where the disk has no room for a model."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < model.bytes * 1.02 + (1 << 20):
        raise ExportError(f"no room for {path}: it takes {model.bytes:,} bytes and {free:,} are free")


def _state(net: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict in another floating-point type, with tied weights still tied."""
    cast: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    state = {}
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if tensor.numel() == 0 or key not in cast:
                cast[key] = tensor.to(dtype)
            state[name] = cast[key]
        else:
            state[name] = tensor
    return state


def _block_by_block(model: Model, folder: Path) -> None:
    """Write a model whose weights wait elsewhere: one file for what is outside of the blocks, one for each block."""
    net, stack = model.net, f"{model.layout.path}."
    outside = {name: tensor for name, tensor in _state(net, model.dtype).items() if not name.startswith(stack)}
    net.save_pretrained(folder, state_dict=outside, max_shard_size="1000TB")
    files = [folder / "model.safetensors"]
    for index, block in enumerate(blocks_of(net, model.layout)):
        file = folder / f"block-{index}.safetensors"
        with hold(block):
            files += [file] * _written(net, block, f"{stack}{index}.", model.dtype, file)
    places: dict[str, str] = {}
    for number, file in enumerate(files, start=1):
        named = file.rename(folder / f"model-{number:05}-of-{len(files):05}.safetensors")
        with safe_open(named, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), named.name)
    metadata = {"total_size": model.bytes}
    write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": places})


def _written(net: Any, block: Any, prefix: str, dtype: torch.dtype, file: Path) -> bool:
    """Write the weights of a block as the family's checkpoints have them; a block without any is not written."""
    state = {prefix + name: tensor for name, tensor in _state(block, dtype).items()}
    ready = {name: tensor.cpu().contiguous() for name, tensor in revert_weight_conversion(net, state).items()}
    if ready:
        save_file(ready, file, {"format": "pt"})
    return bool(ready)


def _modelling(net: Any, folder: Path) -> dict[str, str]:
    """Write the modelling file of an uneven model, and say which of its classes is for which Auto class."""
    classes = {
        auto_name(net.config.to_dict() | {"architectures": [type(net).__name__]}): stock(net),
        "AutoModel": stock(net.base_model),
    }
    pairs = [(kind.__module__, kind.__name__) for kind in dict.fromkeys(classes.values())]
    (folder / f"{MODELLING}.py").write_text(_text(pairs), encoding="utf-8")
    return {name: f"{MODELLING}.{kind.__name__}" for name, kind in classes.items()}


def _text(pairs: Iterable[tuple[str, str]]) -> str:
    """The modelling file for classes of transformers, by module and name."""
    lines = [inspect.getsource(skip).rstrip(), ""]
    for module, name in pairs:
        lines += [
            "",
            f"from {module} import {name} as Stock{name}  # noqa: E402",
            "",
            "",
            f"class {name}(Stock{name}):",
            '    """The stock architecture without the sublayers that its configuration skips."""',
            "",
            "    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:",
            "        super().__init__(config, *args, **kwargs)",
            "        skip_sublayers(self)",
            "",
            "    @classmethod",
            "    def is_custom_code(cls) -> bool:",
            '        """Convert and initialise weights as for the stock class; hence its name, too."""',
            "        return False",
        ]
    return "\n".join(lines) + "\n"


def code(text: str) -> dict[str, str]:
    """The modelling file that depthprune writes for the classes that one names, by its name."""
    named = re.findall(r"^from (transformers\.models\.[\w.]+) import (\w+) as Stock\w+ ", text, re.MULTILINE)
    return {f"{MODELLING}.py": _text(named)}


def stock(net: Any) -> Any:
    """The class of transformers behind a model, which may be of a class that came with a checkpoint."""
    for kind in type(net).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return kind
    raise ExportError(f"form hf needs a class of transformers to build on, and {type(net).__name__} has none")


class _quiet:
    """No progress bars from transformers for a moment."""

    def __enter__(self) -> None:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
