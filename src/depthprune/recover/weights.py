"""Weights while they are trained: their own storage, a copy to go back to, and the way into the model at the end.

A cut model shares its weights with the model that the user holds. So training works on a second set of modules, with
its own float32 copy of every weight that is trained; the model itself gets new weights only when all is done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn


def own(net: nn.Module, trained: Collection[str], device: torch.device, *, wide: bool) -> None:
    """Give a cloned network parameters of its own: those named are float32 copies that take gradients, the rest frozen.

    Ties between parameters stay. Frozen ones share their storage with the original, as far as they are on ``device``
    and keep their type; with ``wide`` they become float32. Buffers are copied.
    """
    named = {id(parameter) for name, parameter in net.named_parameters() if name in trained}
    fresh: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in fresh:
                train = id(old) in named
                dtype = torch.float32 if old.is_floating_point() and (train or wide) else old.dtype
                value = old.detach().to(device, dtype, copy=train)
                fresh[id(old)] = nn.Parameter(value, requires_grad=train)
            module._parameters[name] = fresh[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                half = buffer.dtype in (torch.bfloat16, torch.float16)
                dtype = torch.float32 if wide and half else buffer.dtype
                module._buffers[name] = buffer.detach().to(device, dtype, copy=True)


def install(net: nn.Module, values: Mapping[str, Tensor]) -> dict[tuple[nn.Module, str], nn.Parameter]:
    """Put new parameters in the place of those named, in their type and on their device; nothing is written in place.

    Returns what was there, for ``reinstall``.
    """
    known = dict(net.named_parameters())
    fresh = {
        id(known[name]): nn.Parameter(
            value.detach().to(known[name].device, known[name].dtype, copy=True),
            requires_grad=known[name].requires_grad,
        )
        for name, value in values.items()
    }
    before: dict[tuple[nn.Module, str], nn.Parameter] = {}
    for module in net.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) in fresh:
                before[module, name] = old
                module._parameters[name] = fresh[id(old)]
    return before


def reinstall(before: Mapping[tuple[nn.Module, str], nn.Parameter]) -> None:
    """Put parameters back where ``install`` found them."""
    for (module, name), parameter in before.items():
        module._parameters[name] = parameter


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name, each once."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def snapshot(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the trained parameters on the CPU; sharded ones are gathered, so every process has to ask."""
    copies: dict[str, Tensor] = {}
    for name, parameter in trained(net).items():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        copies[plain(name)] = whole.to("cpu", copy=True)
    return copies


@torch.no_grad()
def restore(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the trained parameters of the same names."""
    for name, parameter in trained(net).items():
        parameter.copy_(values[plain(name)])


def plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in ("module.", "_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.removeprefix(wrapper) if wrapper == "module." else name.replace(wrapper, "")
    return name
