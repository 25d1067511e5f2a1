"""The walk: the stream before and after every unit, in one pass over the blocks.

The only loop over blocks besides the engine. All batches go through a block before the next one is touched, so each
weight is read once per walk. The stream after a sublayer is the block's output with the later sublayers muted: exact,
and no norm has to be known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthprune.data import Data
from depthprune.discover import muted
from depthprune.layout import Block, blocks_of
from depthprune.model import Model
from depthprune.offload import hold
from depthprune.record import TOKENS, Call, forwards, once, record, slices

Progress = Callable[[float, float], None]


@dataclass(frozen=True, eq=False)
class Seen:
    """One block on one batch: the streams (B, T, D) before it, after each of its sublayers, and so after it.

    ``streams`` has one more entry than the block has sublayers (two for a block without); ``mask`` (B, T) says which
    tokens are real; ``rows`` which sequences these are.
    """

    block: Block
    rows: slice
    streams: tuple[Tensor, ...]
    mask: Tensor


@torch.no_grad()
def walk(
    model: Model, data: Data, *, tokens_per_call: int | None = None, progress: Progress | None = None
) -> Iterator[Seen]:
    """Visit every block with every batch, in that order. Costs about one plain forward without the head."""
    layout, modules = model.layout, blocks_of(model.net, model.layout)
    arities = [block.arity for block in layout.blocks]
    batches = slices(data.sequences, max(1, (tokens_per_call or TOKENS.get(model.device.type, 4096)) // data.length))
    masks = [data.mask[rows].to(model.device) for rows in batches]
    recordings = [
        record(model.net, modules, arities, data.tokens[rows].to(model.device), mask)
        for rows, mask in zip(batches, masks, strict=True)
    ]
    streams = [recording.stream for recording in recordings]
    total = float(len(modules) * len(batches))
    for index, (block, module) in enumerate(zip(layout.blocks, modules, strict=True)):
        with hold(module):
            for number, (rows, mask) in enumerate(zip(batches, masks, strict=True)):
                seen = _through(block, module, recordings[number].calls[index], streams[number])
                streams[number] = seen[-1]
                yield Seen(block, rows, seen, mask)
                if progress is not None:
                    progress(float(index * len(batches) + number + 1), total)


def _through(block: Block, module: torch.nn.Module, call: Call, stream: Tensor) -> tuple[Tensor, ...]:
    """The streams around each sublayer of a block. Earlier sublayers are computed once and replayed."""
    kept: dict[Hashable, Any] = {}
    seen = [stream]
    for last in range(1, max(1, len(block.sublayers)) + 1):
        earlier = [s.name for s in block.sublayers[:last] if len(s.members) == 1]
        replayed = [(module.get_submodule(name), once(module.get_submodule(name), name, kept)) for name in earlier]
        with forwards([*replayed, *muted(module, block.sublayers[last:])]):
            seen.append(call.run(module, stream))
    return tuple(seen)
