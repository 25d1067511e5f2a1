"""Models larger than memory: blocks wait in the CPU's memory or on disk, and come to the device while they are used.

transformers and accelerate load them. From then on a weight that waits is a parameter on the meta device that knows
where its numbers are (``Stored``); so modules, shapes and ties are those of a model in memory, and networks that share
a weight share the parameter. ``hold`` puts the numbers in their places; a block holds itself while its forward runs.
A weight that is replaced while it is held waits in a file of its own afterwards, so other networks keep the old one.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from depthprune.errors import DepthpruneError, OptionError

SHARE = 0.4  # of what is free: recovery also needs room for changed weights, streams and sums


class Folder:
    """A temporary folder that goes when nobody refers to it any more, or when the program ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="depthprune-"))
        weakref.finalize(self, shutil.rmtree, self.path, True)


@dataclass(frozen=True, eq=False)
class Stored:
    """Where the numbers of a weight wait: ``source[key]``; ``device`` is where they are computed with."""

    source: Mapping[str, Tensor]
    key: str
    device: torch.device
    folder: Folder | None = None
    version: int = 0  # of the parameter, which counts how often it was written to

    def read(self) -> Tensor:
        """The numbers, on the device."""
        return self.source[self.key].to(self.device)


def stored(weight: object) -> Stored | None:
    """Where a weight waits; None for what is in memory."""
    found = getattr(weight, "stored", None)
    return found if isinstance(found, Stored) else None


def numbers(weight: Tensor) -> Tensor:
    """The numbers of a weight, wherever they are, without a graph."""
    place = stored(weight)
    return weight.detach() if place is None else place.read()


def device_of(weight: Tensor) -> torch.device:
    """The device on which a weight is computed with."""
    place = stored(weight)
    return weight.device if place is None else place.device


def offloaded(net: nn.Module) -> bool:
    """Whether some weights of a network wait elsewhere."""
    return any(stored(parameter) for parameter in net.parameters())


def swap(module: nn.Module, name: str, weight: Tensor) -> None:
    """Give a module another weight; it waits where the old one did. Other networks that share the old keep it."""
    old = getattr(module, name)
    new = nn.Parameter(weight.to(device_of(old), old.dtype).contiguous(), requires_grad=old.requires_grad)
    setattr(module, name, _away(new, old))


def realise(net: nn.Module, name: str, device: torch.device) -> None:
    """Make a new parameter zeros in memory if it was made like a weight that waits, and so has no numbers."""
    made, (path, _, last) = net.get_parameter(name), name.rpartition(".")
    if made.is_meta and stored(made) is None:
        zeros = torch.zeros(made.shape, dtype=made.dtype, device=device)
        setattr(net.get_submodule(path), last, nn.Parameter(zeros, requires_grad=made.requires_grad))


@contextmanager
def hold(module: nn.Module) -> Iterator[None]:
    """Keep the weights of a module where they are computed with, for a while; nothing happens to those in memory.

    Within, ``module.weight`` has its numbers, and may be replaced (never written in place): what was replaced lasts.
    May be nested. Raises ``DepthpruneError`` where the disk has no room for what was replaced.
    """
    taken: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
    known: dict[int, nn.Parameter] = {}  # shared weights stay shared
    try:
        for part in module.modules():
            for name, waiting in part._parameters.items():
                place = stored(waiting)
                if waiting is not None and place is not None:
                    if id(waiting) not in known:
                        known[id(waiting)] = nn.Parameter(place.read(), requires_grad=waiting.requires_grad)
                    part._parameters[name] = known[id(waiting)]
                    taken.append((part, name, waiting, known[id(waiting)]))
        yield
    finally:
        known.clear()
        while taken:
            part, name, waiting, held = taken.pop()
            now = part._parameters.get(name)
            if now is held:
                part._parameters[name] = waiting
            elif now is not None and not now.is_meta:
                part._parameters[name] = _away(now, waiting)


def _away(weight: nn.Parameter, old: Tensor) -> nn.Parameter:
    """A parameter that waits in a file if the one that it replaces waited anywhere; else as it is."""
    place = stored(old)
    if place is None:
        return weight
    folder = Folder()
    file = folder.path / "weight.safetensors"
    try:
        save_file({"weight": weight.detach().cpu().contiguous()}, file)
    except (OSError, SafetensorError) as error:
        raise DepthpruneError(f"no room for a changed weight in {folder.path}: {error}") from None
    index = {"weight": {"safetensors_file": str(file), "weight_name": "weight"}}
    source = OffloadedWeightsLoader(index=index, device=str(place.device))
    waiting = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    waiting.stored = Stored(source, "weight", place.device, folder, waiting._version)  # type: ignore[attr-defined]
    return waiting


def unwritten(net: nn.Module) -> None:
    """Refuse models whose code has written to weights that wait, as that is lost. Raises ``OptionError``."""
    for name, weight in net.named_parameters():
        place = stored(weight)
        if place is not None and place.version != weight._version:
            raise OptionError(f"{type(net).__name__} cannot be offloaded: it writes to {name}; use --place whole")


def _run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with hold(block):
        return type(block).forward(block, *args, **kwargs)


def adopt(net: nn.Module, stack: str, device: torch.device, folder: Folder) -> None:
    """Take over a network that accelerate has loaded with some blocks offloaded: its hooks go, ``hold`` takes over.

    Raises ``OptionError`` where a weight is neither in memory nor known to wait anywhere.
    """
    for module in net.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if isinstance(one, AlignDevicesHook) and one.offload:
                assert one.weights_map is not None
                for name, weight in module._parameters.items():
                    if weight is not None and weight.is_meta:
                        weight.stored = Stored(  # type: ignore[attr-defined]
                            one.weights_map, name, device, folder, weight._version
                        )
                one.offload = False  # else the hook would bring the weights back as it goes
        if hook is not None:
            remove_hook_from_module(module)
            vars(module).pop("forward", None)
    vars(net).pop("hf_device_map", None)
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_meta and not stored(tensor):
            raise OptionError(f"{type(net).__name__} cannot be offloaded: {name} was left out; use --place whole")
    for block in net.get_submodule(stack).children():
        if offloaded(block):
            forward = functools.partial(_run, block)  # a partial, so that a copy of the block runs the copy
            block.forward = functools.update_wrapper(forward, type(block).forward)


def places(net: nn.Module, stack: str, device: torch.device, allowed: Mapping[str, int]) -> dict[str, Any]:
    """The device map of a network that was built on the meta device: what is outside of its blocks is on the device.

    So are its first blocks, as many as ``allowed[device.type]`` bytes have room for; the next are in the CPU's memory,
    the rest on disk. What is not in ``allowed`` is 40 % of what is free.
    Raises ``OptionError`` where there is not even room for the outside, or where blocks share weights.
    """
    kinds = dict.fromkeys((device.type, "cpu"))
    for kind in allowed:
        if kind not in kinds:
            raise OptionError(f"--place {kind}=…: this model is computed on {device.type}; name {' or '.join(kinds)}")
    room = {kind: allowed[kind] if kind in allowed else int(SHARE * _free(torch.device(kind))) for kind in kinds}
    blocks = dict(net.get_submodule(stack).named_children())
    outside = _bytes(net) - sum(_bytes(block) for block in blocks.values())
    room[device.type] -= outside
    if room[device.type] < 0:
        raise OptionError(
            f"--place auto: embeddings, norms and head take {outside:,} bytes, which have to fit on {device.type}; "
            f"allow more with --place auto:{device.type}=SIZE"
        )
    here: Any = device.type if device.type == "cpu" else device.index or 0
    found = all_on_disk(net, stack, here)
    for name, block in blocks.items():
        kind = next((kind for kind in kinds if room[kind] >= _bytes(block)), "disk")
        if kind == "disk":
            kinds = {}  # blocks after one on disk are there, too
        else:
            room[kind] -= _bytes(block)
            found[f"{stack}.{name}"] = here if kind == device.type else kind
    if set(found.values()) == {here}:
        return {"": here}
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    others = (module for module in net.modules() if id(module) not in inside)
    times = Counter(id(weight) for block in blocks.values() for weight in block.parameters())
    if max(times.values()) > 1 or any(id(p) in times for other in others for p in other.parameters(recurse=False)):
        raise OptionError(f"{type(net).__name__} cannot be offloaded: its blocks share weights; use --place whole")
    return found


def all_on_disk(net: nn.Module, stack: str, here: Any) -> dict[str, Any]:
    """The device map that has all blocks on disk, and every module and parameter outside of them ``here``."""
    found: dict[str, Any] = {}
    path = ""
    for part in (*stack.split("."), ""):
        module = net.get_submodule(path)
        inside = f"{path}." if path else ""
        if path == stack:
            return found | {f"{inside}{name}": "disk" for name, _ in module.named_children()}
        found |= {f"{inside}{name}": here for name, _ in module.named_children() if name != part}
        found |= {f"{inside}{name}": here for name, _ in module.named_parameters(recurse=False)}
        found |= {f"{inside}{name}": here for name, _ in module.named_buffers(recurse=False)}
        path = inside + part
    raise AssertionError(stack)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
