"""The plainest way to compute what depthprune computes: swap modules in a fresh model, run it, take the cross entropy.

Nothing here uses depthprune's engine, recordings or surgery; that is what makes it a reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthprune.units import Unit


class Zero(nn.Module):
    """Stands for a part that is gone: answers zeros (``keep`` False) or its input, in the shape of the part's answers.

    Whatever else the model's code asks of it (its attention type, say) comes from the part.
    """

    def __init__(self, part: nn.Module, answers: int, keep: bool) -> None:
        super().__init__()
        self.__dict__["part"] = part
        self.answers, self.keep = answers, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["part"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        out = stream if self.keep else torch.zeros_like(stream)
        return (out, *[None] * (self.answers - 1)) if self.answers else out


def stack_of(net: nn.Module) -> nn.ModuleList:
    """The blocks: the first module list of four or six, whichever way they are named."""
    return next(
        m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) in (4, 6) and len(m[0]._modules) > 1
    )


@torch.no_grad()
def lengths(net: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
    """How many things each module returns: 0 for a bare tensor."""
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        seen[module] = len(output) if isinstance(output, (tuple, list)) else 0

    hooks = [module.register_forward_hook(note) for module in modules]
    net(input_ids=torch.arange(3, 9)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@contextmanager
def removed(net: nn.Module, units: Iterable[Unit]) -> Iterator[nn.Module]:
    """A network with parts swapped for ``Zero``, and back again."""
    blocks = stack_of(net)
    units = set(units)
    whole = {unit.block for unit in units if not unit.sublayer}
    places: list[tuple[nn.Module, str]] = [(blocks, str(index)) for index in whole]
    for unit in units:
        if unit.block not in whole:
            places += [(blocks[unit.block], name) for name in unit.sublayer.split("+") if name]
    parts = [owner.get_submodule(name) for owner, name in places]
    answers = lengths(net, parts)
    for (owner, name), part in zip(places, parts, strict=True):
        owner._modules[name] = Zero(part, answers[part], owner is blocks)
    yield net
    for (owner, name), part in zip(places, parts, strict=True):
        owner._modules[name] = part


@torch.no_grad()
def logits(net: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits of a plain forward."""
    extra = {} if mask is None or bool(mask.all()) else {"attention_mask": mask.long()}
    result: Tensor = net(input_ids=tokens, **extra, use_cache=False).logits
    return result


def loss(net: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Per sequence, the summed cross entropy of each real token that follows a real one (N,)."""
    each = F.cross_entropy(logits(net, tokens, mask)[:, :-1].transpose(1, 2).double(), tokens[:, 1:], reduction="none")
    return (each * (mask[:, 1:] & mask[:, :-1])).sum(1)
