"""Losses and scores: what was measured about units. No torch.

A score is the damage expected from dropping a unit: low goes first, always.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depthprune.units import Unit

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of several variants on the same sequences.

    ``nll`` (variants, sequences) is the summed negative log-likelihood in nats; ``tokens`` (sequences,) the number of
    predicted tokens in each.
    """

    nll: Array
    tokens: Array

    @classmethod
    def empty(cls, variants: int, tokens: Array) -> Losses:
        """Losses to be filled in, all infinite."""
        return cls(np.full((variants, len(tokens)), math.inf), tokens)

    @classmethod
    def join(cls, *several: Losses) -> Losses:
        """Losses of more variants on the same sequences, one below the other."""
        assert all(np.array_equal(several[0].tokens, other.tokens) for other in several)
        return cls(np.concatenate([losses.nll for losses in several]), several[0].tokens)

    def mean(self) -> Array:
        """Nats per token of each variant (variants,)."""
        result: Array = self.nll.sum(1) / self.tokens.sum()
        return result

    def difference(self, variant: int, base: int) -> tuple[float, float]:
        """How much larger one variant's loss is than another's on the same sequences, and its paired standard error."""
        return paired(self.nll[variant], self.nll[base], self.tokens)


def paired(nll: Array, base: Array, tokens: Array) -> tuple[float, float]:
    """The difference of two mean losses over the same sequences, in nats per token, and its standard error.

    With d_s the difference of the summed losses of sequence s and n_s its tokens, the difference is
    ``r = sum d_s / sum n_s`` and the standard error that of a ratio: ``sqrt(S/(S-1) * sum (d_s - r n_s)^2) / sum n_s``.
    """
    d, count, total = nll - base, len(tokens), float(tokens.sum())
    ratio = float(d.sum()) / total
    if count < 2 or not math.isfinite(ratio):
        return ratio, math.nan
    return ratio, math.sqrt(count / (count - 1) * float(((d - ratio * tokens) ** 2).sum())) / total


@dataclass(frozen=True)
class Scores:
    """One score per unit (low goes first), with standard errors where the metric has them, and where they come from."""

    metric: str
    values: Mapping[Unit, float]
    errors: Mapping[Unit, float] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    dense: float | None = None  # the dense model's loss, for metrics on losses
    detail: Mapping[Unit, Mapping[str, float]] = field(default_factory=dict)  # what the score is made of, by tensor

    def ranked(self) -> tuple[Unit, ...]:
        """The units in the order in which they should go: lowest score first, ties in execution order."""
        order = {unit: position for position, unit in enumerate(self.values)}
        return tuple(sorted(self.values, key=lambda unit: (self.values[unit], order[unit])))

    def to_json(self) -> dict[str, Any]:
        """The scores as plain values for ``scores.json``."""
        units: dict[str, dict[str, Any]] = {str(unit): {"score": value} for unit, value in self.values.items()}
        for unit, error in self.errors.items():
            units[str(unit)]["se"] = error
        for unit, parts in self.detail.items():
            units[str(unit)]["tensors"] = dict(parts)
        result: dict[str, Any] = {"data": dict(self.data), "units": units}
        if self.dense is not None:
            result["dense"] = {"loss": self.dense}
        return result
