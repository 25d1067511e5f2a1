"""How a model with missing sublayers is built again from its configuration.

This file imports only torch and transformers, because its text is also what a saved folder carries as its modelling
file: there it makes ``from_pretrained(..., trust_remote_code=True)`` work; ``import depthprune`` does the same without.

The configuration says what is missing twice: as ``per_layer_config: {"3": {"skip": ["attention"]}}``, the form that
transformers is adopting, and as ``depthprune``, which adds what is needed to build it today:

    {"version": 1, "block": "LlamaDecoderLayer", "skip": {"3": {"self_attn": 2, "input_layernorm": -1}},
     "kinds": {"3": ["attention"]}, "no_cache": [3], "tombstone": "3.input_layernorm.weight"}

A number is what the part returns: -1 its input (a norm), 0 zeros, n a tuple of n that starts with zeros. One
dropped tensor is kept as an empty *tombstone*, so that a loader that knows nothing of this fails on its shape instead
of filling the missing weights with random numbers. Version 2 may also say which parts have a *stand-in*, to be added
to their zeros: ``"stand_in": {"3.self_attn": {"rank": 0, "width": 64}}`` is a bias, a rank above 0 a low-rank map.
"""

from typing import Any

import torch
from torch import nn
from transformers import cache_utils

VERSION = 2  # the latest way of saying what is missing that this file can read


class Skip(nn.Module):
    """Stands where a sublayer or a norm was dropped; holds no weights, or those of a stand-in, at zero effect.

    ``rank`` and ``width``: no stand-in (None), a ``bias`` (D,) to add (0), or a map ``up(down(x))`` of the input, with
    ``down.weight`` (R, D) and ``up.weight`` (D, R). Weights have the type and the place of the tensor ``like``.
    """

    def __init__(
        self, arity: int, tombstone: str = "", rank: int | None = None, width: int = 0, like: Any = None
    ) -> None:
        super().__init__()
        self.arity = arity
        like = torch.empty(0) if like is None else like
        self.bias = nn.Parameter(torch.zeros(width, dtype=like.dtype, device=like.device)) if rank == 0 else None
        self.down = _zero(width, rank, like) if rank else None
        self.up = _zero(rank, width, like) if rank else None
        if tombstone:
            *path, name = tombstone.split(".")
            holder: nn.Module = self
            for part in path:
                holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_buffer(name, torch.empty(0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input (for a norm), or zeros in its shape plus the stand-in (for a sublayer)."""
        stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if self.arity < 0:
            return stream
        update = torch.zeros_like(stream)
        if self.bias is not None:
            update = update + self.bias.to(stream)
        elif self.down is not None and self.up is not None:
            update = self.up(self.down(stream.to(self.down.weight.dtype))).to(stream)
        return update if self.arity == 0 else (update, *[None] * (self.arity - 1))


def _zero(inputs: int, outputs: int, like: torch.Tensor) -> nn.Linear:
    """A linear map to zero, which draws no random numbers."""
    made = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=like.dtype).to_empty(device=like.device)
    with torch.no_grad():
        made.weight.zero_()
    return made


def is_skip(module: nn.Module) -> bool:
    """Whether a module is a ``Skip``, of this file or of its copy in a saved folder."""
    return type(module).__name__ == "Skip" and isinstance(getattr(module, "arity", None), int)


def skip_sublayers(net: nn.Module) -> None:
    """Replace the sublayers that ``net.config.depthprune`` names by ``Skip``; doing it twice changes nothing.

    Raises ``ValueError`` for a configuration of a later version, which may ask for what this file does not know.
    """
    config: Any = net.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    spec = getattr(config, "depthprune", None)
    if not spec or not spec.get("skip"):
        return
    if spec.get("version", 1) > VERSION:
        raise ValueError(
            f"what is missing is written in version {spec['version']}, later than {VERSION}: update depthprune"
        )
    for stack in net.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) and type(stack[0]).__name__ == spec["block"]:
            for index, parts in spec["skip"].items():
                for name, arity in parts.items():
                    parent, _, child = f"{index}.{name}".rpartition(".")
                    buried = spec.get("tombstone", "")
                    own = buried[len(index) + len(name) + 2 :] if buried.startswith(f"{index}.{name}.") else ""
                    part = getattr(stack.get_submodule(parent), child)
                    if not isinstance(part, Skip):
                        stand_in = spec.get("stand_in", {}).get(f"{index}.{name}", {})
                        skip = Skip(arity, own, **stand_in, like=_like(part) if stand_in else None)
                        weight = getattr(part, "weight", None)
                        if isinstance(weight, torch.Tensor) and not hasattr(skip, "weight"):
                            skip.__dict__["weight"] = torch.empty(0, dtype=weight.dtype)  # some ask for its type
                        setattr(stack.get_submodule(parent), child, skip)
            cache_slots(config, list(stack), set(spec.get("no_cache", ())))


def _like(part: nn.Module) -> Any:
    """A weight that says in which type and where a part computes: its first matrix of floating-point numbers."""
    floating = [p for p in part.parameters() if p.is_floating_point()]
    return next((p for p in floating if p.ndim > 1), floating[0] if floating else None)


def cache_slots(config: Any, blocks: list[nn.Module], without: set[int]) -> None:
    """Give blocks without attention no slot in the KV cache, so that positions are counted where keys are written.

    Where transformers knows empty slots, the configuration marks them. Older releases: the remaining attentions are
    numbered one after the other if all slots are of one kind; mixed kinds keep their numbers.
    """
    if not without or isinstance(getattr(type(config), "kv_sharing_modes", None), property):
        return
    if hasattr(cache_utils, "DummyLayer"):
        config.kv_sharing_modes = ["reuse" if index in without else None for index in range(len(blocks))]
    elif len(set(getattr(config, "layer_types", None) or ("all",))) == 1:
        slot = 0
        for index, block in enumerate(blocks):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = slot  # type: ignore[assignment]
            slot += index not in without
