"""One-pass metrics: how much a unit changes the stream.

With x and y the stream (D,) before and after a unit at one token, residual included, each metric is a distance d(x, y);
the score of a unit is its mean over all real tokens (or over the last token of each sequence). All metrics of all units
come from one walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Update:
    """The sizes of one unit's update ``d = y - x`` at every token (N,): all that the metrics need.

    The cosine follows from sizes alone, ``1 - cos(x, y) = (|d|^2 - (|x| - |y|)^2) / (2 |x| |y|)``, and stays exact
    where the update is small and ``x . y`` would lose its digits.
    """

    x1: Tensor
    x2: Tensor
    y2: Tensor
    d1: Tensor
    d2: Tensor


def _cosine(update: Update) -> Tensor:
    """Block influence: ``1 - cos(x, y)`` (ShortGPT, eq. 1; A deeper look at depth pruning; LLM-Drop)."""
    product = update.x2 * update.y2
    apart = (update.d2 - (update.x2 - update.y2)) * (update.d2 + (update.x2 - update.y2))
    return torch.where(product > 0, apart / (2 * product), torch.where(product == 0, 1.0, product))


def _angular(update: Update) -> Tensor:
    """Angular distance: ``arccos(cos(x, y)) / pi`` (Gromov et al., eq. 3; there at the last token)."""
    return (_cosine(update) / 2).clamp(0, 1).sqrt().arcsin() * 2 / math.pi


def _l1(update: Update) -> Tensor:
    """Update norm ``|y - x|_1`` (A deeper look at depth pruning)."""
    return update.d1


def _l2(update: Update) -> Tensor:
    """Update norm ``|y - x|_2`` (A deeper look at depth pruning)."""
    return update.d2


def _relative_l1(update: Update) -> Tensor:
    """Relative update norm ``|y - x|_1 / |x|_1`` (A deeper look at depth pruning)."""
    return update.d1 / update.x1


def _relative_l2(update: Update) -> Tensor:
    """Relative update norm ``|y - x|_2 / |x|_2`` (A deeper look at depth pruning)."""
    return update.d2 / update.x2


DISTANCES: dict[str, Callable[[Update], Tensor]] = {
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
        sizes = [_sizes(stream) for stream in streams]
        pairs = {Unit("", seen.block.index): (0, len(streams) - 1)}
        for position, sublayer in enumerate(seen.block.sublayers):
            pairs[Unit("", seen.block.index, sublayer.name)] = (position, position + 1)
        for unit, (x, y) in pairs.items():
            update = Update(*sizes[x], sizes[y][1], *_sizes(streams[y] - streams[x]))
            for name in metrics:
                total = DISTANCES[name](update).sum(dtype=torch.float64)
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
            x, y = queue.pop(0), seen.streams[-1][chosen].float()
            update = Update(*_sizes(x), _sizes(y)[1], *_sizes(y - x))
            sums[first] = sums.get(first, 0) + DISTANCES[metric](update).sum(dtype=torch.float64)
    count = data.sequences if tokens == "last" else data.tokens_total
    return {first: (total / count).item() for first, total in sums.items()}


def _sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    """``|x|_1`` and ``|x|_2`` at every token (N,)."""
    return torch.linalg.vector_norm(x, 1, dim=-1), torch.linalg.vector_norm(x, dim=-1)


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
