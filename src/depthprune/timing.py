"""How long each unit takes: what a search needs to weigh damage against time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from depthprune.data import Data
from depthprune.discover import muted
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.record import forwards, record
from depthprune.units import Unit

LEAST = 1e-6  # milliseconds: no unit is free, so that nothing is divided by zero


@torch.no_grad()
def unit_milliseconds(
    model: Model, data: Data, units: Sequence[Unit], *, repeats: int = 9, clock: Callable[[], float] = time.perf_counter
) -> dict[Unit, float]:
    """Measure the milliseconds that each unit takes in a forward over one sequence.

    A block is timed by itself, a sublayer as the time of its block with it less that without it, in turn; medians over
    ``repeats``. Units alike (same kind, same sizes) are measured once.
    """
    layout, blocks = model.layout, blocks_of(model.net, model.layout)
    tokens, mask = data.tokens[:1].to(model.device), data.mask[:1].to(model.device)
    recording = record(model.net, blocks, [block.arity for block in layout.blocks], tokens, mask)

    def seconds(index: int, replaced: list[tuple[Any, Callable[..., Any]]]) -> float:
        with forwards(replaced):
            start = clock()
            recording.calls[index].run(blocks[index], recording.stream)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            return clock() - start

    known: dict[tuple[Any, ...], float] = {}
    found = {}
    for unit in units:
        block = layout.block(unit)
        alike = (type(blocks[unit.block]), unit.sublayer, layout.freed(frozenset((unit,))), block.parameters)
        if alike not in known:
            without = muted(blocks[unit.block], (block.sublayer(unit.sublayer),)) if unit.sublayer else []
            seconds(unit.block, [])
            gaps = []
            for _ in range(repeats):
                whole = seconds(unit.block, [])
                gaps.append(whole - (seconds(unit.block, without) if without else 0.0))
            known[alike] = max(LEAST, 1000 * median(gaps))
        found[unit] = known[alike]
    return found
