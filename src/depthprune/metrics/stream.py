"""One-pass metrics: how much a unit changes the stream.

With x and y the stream (D,) before and after a unit at one token, residual included, each metric is a distance d(x, y);
the score of a unit is its mean over all real tokens (or over the last token of each sequence). All metrics of all units
come from one walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from depthprune.data import Data
from depthprune.errors import OptionError
from depthprune.model import Model
from depthprune.scores import Scores
from depthprune.units import Unit
from depthprune.walk import Progress, walk

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Block influence: ``1 - cos(x, y)`` (ShortGPT, eq. 1; A deeper look at depth pruning; LLM-Drop)."""
    similarity: Tensor = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    return 1 - similarity


def _angular(x: Tensor, y: Tensor) -> Tensor:
    """Angular distance: ``arccos(cos(x, y)) / pi`` (Gromov et al., eq. 3; there at the last token)."""
    similarity = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    return similarity.clamp(-1, 1).arccos() / math.pi


def _l1(x: Tensor, y: Tensor) -> Tensor:
    """Update norm ``|y - x|_1`` (A deeper look at depth pruning)."""
    return (y - x).abs().sum(-1)


def _l2(x: Tensor, y: Tensor) -> Tensor:
    """Update norm ``|y - x|_2`` (A deeper look at depth pruning)."""
    norm: Tensor = torch.linalg.vector_norm(y - x, dim=-1)
    return norm


def _relative_l1(x: Tensor, y: Tensor) -> Tensor:
    """Relative update norm ``|y - x|_1 / |x|_1`` (A deeper look at depth pruning)."""
    return _l1(x, y) / x.abs().sum(-1)


def _relative_l2(x: Tensor, y: Tensor) -> Tensor:
    """Relative update norm ``|y - x|_2 / |x|_2`` (A deeper look at depth pruning)."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return _l2(x, y) / size


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "angular": _angular,
    "l1": _l1,
    "l2": _l2,
    "relative_l1": _relative_l1,
    "relative_l2": _relative_l2,
}
WHICH = ("all", "last")


def stream_scores(
    model: Model,
    data: Data,
    metrics: Sequence[str] = tuple(DISTANCES),
    *,
    tokens: str = "all",
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """The scores of every block and every sublayer under several one-pass metrics, from one walk.

    ``tokens`` is ``all`` or ``last`` (the last real token of each sequence).
    Raises ``OptionError`` for another value.
    """
    if tokens not in WHICH:
        raise OptionError(f"unknown tokens={tokens!r} for {', '.join(metrics)}. Available: {', '.join(WHICH)}")
    sums: dict[str, dict[Unit, Tensor]] = {name: {} for name in metrics}
    for seen in walk(model, data, progress=progress):
        chosen = last_token(seen.mask) if tokens == "last" else seen.mask
        everything = bool(chosen.all())
        streams = [stream.float().flatten(0, 1) if everything else stream[chosen].float() for stream in seen.streams]
        pairs = {Unit("", seen.block.index): (streams[0], streams[-1])}
        for position, sublayer in enumerate(seen.block.sublayers):
            pairs[Unit("", seen.block.index, sublayer.name)] = (streams[position], streams[position + 1])
        for name in metrics:
            for unit, (x, y) in pairs.items():
                total = DISTANCES[name](x, y).sum(dtype=torch.float64)
                sums[name][unit] = sums[name].get(unit, 0) + total
    count = data.sequences if tokens == "last" else data.tokens_total
    order = (*model.layout.units("block"), *(u for u in model.layout.units("any") if u.sublayer))
    return {
        name: Scores(name, {unit: (values[unit] / count).item() for unit in order}, data=data.describe())
        for name, values in sums.items()
    }


def spans(model: Model, data: Data, metric: str, length: int, *, tokens: str = "all") -> dict[int, float]:
    """The distance over ``length`` consecutive blocks, by the index of the first: ``d(x before it, x after the last)``.

    Source: Gromov et al., section 3 (there angular, last token).
    """
    sums: dict[int, Tensor] = {}
    before: dict[int, list[Tensor]] = {}  # per batch, the streams before the last ``length`` blocks
    for seen in walk(model, data):
        chosen = last_token(seen.mask) if tokens == "last" else seen.mask
        queue = before.setdefault(seen.rows.start, [])
        queue.append(seen.streams[0][chosen].float())
        if len(queue) == length:
            first = seen.block.index - length + 1
            total = DISTANCES[metric](queue.pop(0), seen.streams[-1][chosen].float()).sum(dtype=torch.float64)
            sums[first] = sums.get(first, 0) + total
    count = data.sequences if tokens == "last" else data.tokens_total
    return {first: (total / count).item() for first, total in sums.items()}


def last_token(mask: Tensor) -> Tensor:
    """The mask (B, T) with only the last real token of each sequence left."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * (positions + 1)).argmax(1)
    return positions == last[:, None]


def _metric(name: str) -> Callable[..., Scores]:
    def metric(oracle: ModelOracle, units: Sequence[Unit], *, tokens: str = "all") -> Scores:
        whole = oracle.streams(tokens)[name]
        return replace(whole, values={unit: whole.values[unit] for unit in units})

    metric.__name__ = name
    metric.__doc__ = DISTANCES[name].__doc__
    return metric


cosine = _metric("cosine")
angular = _metric("angular")
l1 = _metric("l1")
l2 = _metric("l2")
relative_l1 = _metric("relative_l1")
relative_l2 = _metric("relative_l2")
