"""How a model with missing sublayers is built again from its configuration.

This file imports only torch and transformers, because its text is also what a saved folder carries as its modelling
file: there it makes ``from_pretrained(..., trust_remote_code=True)`` work; ``import depthprune`` does the same without.

The configuration says what is missing twice: as ``per_layer_config: {"3": {"skip": ["attention"]}}``, the form that
transformers is adopting, and as ``depthprune``, which adds what is needed to build it today:

    {"version": 1, "block": "LlamaDecoderLayer", "skip": {"3": {"self_attn": 2, "input_layernorm": -1}},
     "kinds": {"3": ["attention"]}, "no_cache": [3], "tombstone": "3.input_layernorm.weight"}

A number is what the part returns: -1 its input (a norm), 0 zeros, n a tuple of n that starts with zeros. One
dropped tensor is kept as an empty *tombstone*, so that a loader that knows nothing of this fails on its shape instead
of filling the missing weights with random numbers.
"""

from typing import Any

import torch
from torch import nn
from transformers import cache_utils


class Skip(nn.Module):
    """Stands where a sublayer or a norm was dropped; holds no weights."""

    def __init__(self, arity: int, tombstone: str = "") -> None:
        super().__init__()
        self.arity = arity
        if tombstone:
            *path, name = tombstone.split(".")
            holder: nn.Module = self
            for part in path:
                holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_buffer(name, torch.empty(0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input (for a norm), or zeros in its shape (for a sublayer)."""
        stream = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if self.arity < 0:
            return stream
        zeros = torch.zeros_like(stream)
        return zeros if self.arity == 0 else (zeros, *[None] * (self.arity - 1))


def skip_sublayers(net: nn.Module) -> None:
    """Replace the sublayers that ``net.config.depthprune`` names by ``Skip``; doing it twice changes nothing."""
    config: Any = net.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    spec = getattr(config, "depthprune", None)
    if not spec or not spec.get("skip"):
        return
    for stack in net.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) and type(stack[0]).__name__ == spec["block"]:
            for index, parts in spec["skip"].items():
                for name, arity in parts.items():
                    parent, _, child = f"{index}.{name}".rpartition(".")
                    buried = spec.get("tombstone", "")
                    own = buried[len(index) + len(name) + 2 :] if buried.startswith(f"{index}.{name}.") else ""
                    if not isinstance(getattr(stack.get_submodule(parent), child), Skip):
                        setattr(stack.get_submodule(parent), child, Skip(arity, own))
            cache_slots(config, list(stack), set(spec.get("no_cache", ())))


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
