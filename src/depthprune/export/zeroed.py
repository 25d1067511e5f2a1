"""Writing a pruned model in the shape of the dense one, with zeros where something was dropped.

It loads wherever the dense model does, and computes what the pruned one computes. It saves nothing: neither time nor
memory nor disk. It is for tools that know the dense architecture only, and for comparing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from depthprune import skip
from depthprune.errors import ExportError
from depthprune.export import hf
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.offload import offloaded
from depthprune.plan import Plan


def write(model: Model, path: str | Path, *, dense: str = "") -> Path:
    """Write a folder of the dense architecture in which everything dropped is there again, as zeros.

    ``dense`` is the folder or the name of the dense model, whose configuration is read; by default the one that the
    plan names. Where only parts of blocks are gone it is not needed.
    Raises ``ExportError`` where the dense configuration cannot be read, or the plan's stand-ins have no place in it.
    """
    made = filled(model, dense)
    if made.plan is not None:
        made = replace(made, plan=replace(made.plan, why={**made.plan.why, "form": "zeroed"}))
    return hf.write(made, path)


def filled(model: Model, dense: str = "", *, blocks: bool = True) -> Model:
    """A model of the stock architecture with zeros in the place of everything dropped; it shares all weights left.

    Without ``blocks`` whole blocks that are gone stay gone. Raises as ``write`` does.
    """
    if offloaded(model.net):
        raise ExportError("form zeroed needs the whole model in memory: load it with --place whole")
    config, places = _shape(model, dense) if blocks else (None, None)
    if config is None:
        config = hf.whole_config(model)
    kept = places or list(range(len(model.layout.blocks)))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: Any = hf.stock(model.net)(config)
    have = dict(_moved(model, kept))
    want = {**dict(net.named_parameters(remove_duplicate=False)), **_saved_buffers(net)}
    if extra := sorted(have.keys() - want.keys()):
        raise ExportError(
            f"form zeroed has no place for {extra[0]}: a stand-in that the dense architecture cannot hold; form hf can"
        )
    like = next(iter(have.values()))
    for name, tensor in want.items():
        value = have.get(name)
        if value is not None and value.shape != tensor.shape:
            raise ExportError(
                f"form zeroed: {name} is {tuple(value.shape)}, and the dense model's {tuple(tensor.shape)}"
            )
        _put(net, name, torch.zeros(tensor.shape, dtype=like.dtype) if value is None else value)
    net.tie_weights()
    return replace(model, net=net.eval())


def _shape(model: Model, dense: str) -> tuple[Any, list[int] | None]:
    """The configuration of the dense model, and where each block that is left was; None where no block is gone."""
    left, total = len(model.layout.blocks), model.plan.model.blocks if model.plan else None
    if model.plan is None or total in (None, left):
        return None, None
    gone = whole(model.plan, model)
    kept = [index for index in range(total or 0) if index not in gone]
    if len(kept) != left:
        raise ExportError(f"form zeroed cannot tell which of {total} blocks the {left} that are left were")
    source = dense or model.plan.model.id
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=None if dense else model.plan.model.revision)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:160]
        raise ExportError(f"form zeroed needs the dense model's configuration: zeroed:dense=FOLDER ({line})") from None
    text = hf.whole_config(model).get_text_config(decoder=True)
    there = config.get_text_config(decoder=True)
    for flag, value in vars(text).items():  # biases that stand-ins were given
        if value is True and "bias" in flag and vars(there).get(flag) is False:
            setattr(there, flag, True)
    return config, kept


def whole(plan: Plan, model: Model) -> set[int]:
    """The numbers, in the dense model, of the blocks of which a plan leaves nothing."""
    parts: dict[int, set[str]] = {}
    gone = {unit.block for unit in plan.drop if not unit.sublayer}
    for unit in plan.drop:
        parts.setdefault(unit.block, set()).add(unit.sublayer)
    cut = (getattr(model.net.config.get_text_config(decoder=True), "depthprune", None) or {}).get("skip", {})
    intact = [block for block in model.layout.blocks if str(block.index) not in cut]
    every = {frozenset(sublayer.name for sublayer in block.sublayers) for block in intact}
    return gone | {index for index, names in parts.items() if frozenset(names) in every}


def _moved(model: Model, kept: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that are left, under the names that they have in the dense model."""
    stack = f"{model.layout.path}."
    tombs = {
        f"{stack}{index}.{name}."
        for index, block in enumerate(blocks_of(model.net, model.layout))
        for name, module in block.named_modules()
        if skip.is_skip(module)
    }
    state = {**dict(model.net.named_parameters(remove_duplicate=False)), **_saved_buffers(model.net)}
    for name, tensor in state.items():
        if name.startswith(tuple(tombs)) and not tensor.numel():
            continue
        if name.startswith(stack):
            index, _, rest = name.removeprefix(stack).partition(".")
            name = f"{stack}{kept[int(index)]}.{rest}"
        yield name, tensor.detach()


def _saved_buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that checkpoints hold."""
    saved = net.state_dict().keys()
    return {name: buffer for name, buffer in net.named_buffers(remove_duplicate=False) if name in saved}


def _put(net: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = net.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
