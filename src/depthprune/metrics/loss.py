"""The leave-one-out metric: how much the loss rises when one unit is dropped from the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from depthprune.scores import Scores
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle


def loss(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """``mean NLL without the unit - mean NLL of the dense model``, in nats per token, with paired standard errors.

    Sources: Shortened LLaMA (perplexity, one-shot), SLEB (its Metric2).
    """
    losses = oracle.losses([frozenset(), *(frozenset((unit,)) for unit in units)])
    measured = {unit: losses.difference(row, 0) for row, unit in enumerate(units, start=1)}
    return Scores(
        "loss",
        {unit: rise if math.isfinite(rise) else math.inf for unit, (rise, _) in measured.items()},
        {unit: error for unit, (_, error) in measured.items() if error == error},
        oracle.data.describe(),
        float(losses.mean()[0]),
    )
