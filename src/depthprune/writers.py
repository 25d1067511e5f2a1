"""Writers and readers: the last map of a sublayer, which writes to the stream, and the first ones, which read it.

Found by running: the writer is the last weighted module whose output is, up to a constant factor, all that the sublayer
adds to the stream; the readers are the linear maps that are given the sublayer's own input. No name is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from depthprune.discover import PROBE, muted, silent
from depthprune.layout import Block, Sublayer, blocks_of
from depthprune.model import Model
from depthprune.offload import hold, numbers, swap
from depthprune.record import Call, Recording, close, forwards, record


@dataclass(frozen=True)
class Writer:
    """The module of a block whose output times ``scale`` is what its sublayer adds to the stream.

    ``path`` is its name in the block. ``diagonal``: it is a norm, so its weight acts on each channel alone.
    """

    path: str
    scale: float
    diagonal: bool


@dataclass(frozen=True)
class Ends:
    """Both ends of a sublayer: its writer (or the reason why there is none) and the paths of its readers.

    ``inner`` are the linear maps between them on which the writer's output depends linearly, as ``mlp.up_proj`` and
    ``self_attn.v_proj``: with weight and bias zero it is the writer's bias, and what two weights add to that adds up.
    """

    sublayer: Sublayer
    writer: Writer | None
    readers: tuple[str, ...]
    inner: tuple[str, ...] = ()
    reason: str = ""


def matrix(module: nn.Module) -> bool:
    """Whether a module is a plain linear map: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point()


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear map as (outputs, inputs), whichever way it is stored; of a norm as it is."""
    assert isinstance(module.weight, Tensor)
    weight = numbers(module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def mapped(module: nn.Module, features: Tensor) -> Tensor:
    """What a linear map makes of its input: ``W x + b``."""
    made, bias = features @ weight_of(module).T, bias_of(module)
    return made if bias is None else made + bias


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear map or a norm, if it has one."""
    bias = getattr(module, "bias", None)
    return numbers(bias) if isinstance(bias, Tensor) else None


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a linear map or a norm another weight, as (outputs, inputs); other networks that share the old keep it."""
    swap(module, "weight", weight.T if isinstance(module, Conv1D) else weight)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Give a linear map or a norm another bias; other networks that share the old keep it."""
    swap(module, "bias", bias)


@torch.no_grad()
def ends(model: Model) -> list[tuple[Ends, ...]]:
    """The ends of every sublayer, block by block. Runs each block once per sublayer on a probe of 2 x 6 tokens."""
    modules = blocks_of(model.net, model.layout)
    tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(5)).to(model.device)
    recording = record(model.net, modules, [block.arity for block in model.layout.blocks], tokens, None)
    times = Counter(id(p) for module in model.net.modules() for p in module.parameters(recurse=False))
    shared = {id(module) for module in model.net.modules() if times[id(getattr(module, "weight", None))] > 1}
    found = []
    for module, block in zip(modules, model.layout.blocks, strict=True):
        with hold(module):
            found.append(tuple(_ends(module, block, sublayer, recording, shared) for sublayer in block.sublayers))
    return found


def _ends(block: nn.Module, layout: Block, sublayer: Sublayer, recording: Recording, shared: set[int]) -> Ends:
    others = [*silent(block), *muted(block, tuple(s for s in layout.sublayers if s.name != sublayer.name))]
    noise = torch.randn(recording.stream.shape, generator=torch.Generator().manual_seed(6))
    stream = recording.stream + noise.to(recording.stream)
    with forwards(others), watched(block) as seen:
        after = recording.calls[layout.index].run(block, stream)
    update, weighted = (after - stream).float(), []
    still_there = [one for one in seen if all(one[1] is not module for module, _ in others)]
    for path, module, given, output in still_there:
        own = isinstance(getattr(module, "weight", None), nn.Parameter) and id(module) not in shared
        if own and (not matrix(module) or _plain(module, given, output)):
            weighted.append((path, module, given, output))
    entry = next((given for path, _, given, _ in seen if path == sublayer.members[0]), None)
    rounding = 4 * torch.finfo(after.dtype).eps * after.float().abs().max()
    found: Writer | None = None
    for path, module, _, output in reversed(weighted):
        if output.numel() != update.numel() or not (matrix(module) or module.weight.shape == stream.shape[-1:]):
            continue
        flat = output.float().reshape(update.shape)
        scale = float((flat * update).sum() / flat.square().sum().clamp_min(1e-30))
        if scale and (update - scale * flat).abs().max() <= 1e-3 * update.abs().max() + rounding:
            found = Writer(path, 1.0 if abs(scale - 1) < 1e-3 else scale, not matrix(module))
            break
    readers = tuple(
        path
        for path, module, given, _ in weighted
        if matrix(module) and entry is not None and same(given, entry) and (found is None or path != found.path)
    )
    if found is None:
        odd = "" if bool(update.isfinite().all()) else ", as what it gives is not finite (NaN or infinite)"
        return Ends(sublayer, None, readers, reason=f"no single map of it writes to the stream{odd}")
    tried = [path for path, m, _, _ in weighted if matrix(m) and path != found.path and not found.diagonal]
    inner = []
    for path in dict.fromkeys(tried):
        weight, made = weight_of(block.get_submodule(path)), []
        other = weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(10)).to(weight)
        for tried_one in (0 * weight, weight, other, weight + other):  # not just 2 * weight: ReLU and norms would pass
            with forwards([*others, with_weight(block, path, tried_one)]):
                made.append(written(recording.calls[layout.index], block, stream, found).float())
        step, two = made[1] - made[0], made[3] - made[0]
        bias = bias_of(block.get_submodule(found.path))
        still = bool((made[0] - (0.0 if bias is None else bias.float())).abs().max() <= rounding)
        if still and step.any() and (two - step - (made[2] - made[0])).abs().max() <= 1e-3 * two.abs().max() + rounding:
            inner.append(path)
    return Ends(sublayer, found, readers, tuple(inner))


def with_weight(block: nn.Module, path: str, weight: Tensor) -> tuple[nn.Module, Any]:
    """A replacement ``forward`` that makes a linear map use another weight (outputs, inputs), and no bias."""
    return block.get_submodule(path), lambda x: x @ weight.to(x.dtype).T


def written(call: Call, block: nn.Module, stream: Tensor, writer: Writer) -> Tensor:
    """What a writer gives when its block is called on a stream."""
    made: list[Tensor] = []
    hook = block.get_submodule(writer.path).register_forward_hook(lambda _, __, output: made.append(output.clone()))
    try:
        call.run(block, stream)
    finally:
        hook.remove()
    return made[-1]


def _plain(module: nn.Module, given: Tensor, made: Tensor) -> bool:
    """Whether a linear map did what its weight and bias say, and nothing else."""
    if given.shape[-1] != weight_of(module).shape[1]:
        return False
    want = mapped(module, given)
    return want.shape == made.shape and close(made, want)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


Seen = tuple[str, nn.Module, Tensor, Tensor]  # path, module, its input, its output


@contextmanager
def watched(block: nn.Module) -> Iterator[list[Seen]]:
    """Note the first input and the output of every module of a block, in the order in which they finish."""
    seen: list[Seen] = []

    def watch(path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            made = output[0] if isinstance(output, (tuple, list)) and output else output
            if given is not None and isinstance(made, Tensor):
                seen.append((path, module, given, made))

        return note

    hooks = [m.register_forward_hook(watch(path), with_kwargs=True) for path, m in block.named_modules() if path]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
