"""Leave-one-out metrics: what one unit's removal does to the dense model's predictions.

All of them come from the engine, with paired standard errors over the calibration sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from depthprune.scores import Scores
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle


def loss(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """``mean NLL without the unit - mean NLL of the dense model``, in nats per token; of a task, of the right answer.

    Sources: Shortened LLaMA (perplexity, one-shot), SLEB (its Metric2), A deeper look at depth pruning ("Shapley" over
    leave-one-out networks, which ranks alike).
    """
    return _leave_one_out(oracle, units, "loss")


def kl(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """``mean KL(p || q)`` of the dense model's prediction p and that without the unit q, in nats per token."""
    return _leave_one_out(oracle, units, "kl")


def js(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """``mean JS(p, q)``, the Jensen-Shannon divergence of the predictions, in nats per token (BlockPruner, table 4)."""
    return _leave_one_out(oracle, units, "js")


def logit_distance(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """``mean |z - z'|_2`` of the logits with and without the unit (A deeper look at depth pruning)."""
    return _leave_one_out(oracle, units, "logit_distance")


def error(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """The rise of the share of wrong answers: a question is answered by the choice of the lowest summed loss.

    Needs a task with choices. Source: A deeper look at depth pruning (0/1 loss of the answer letter).
    """
    return _leave_one_out(oracle, units, "error")


def _leave_one_out(oracle: ModelOracle, units: Sequence[Unit], measure: str) -> Scores:
    losses = oracle.losses([frozenset(), *(frozenset((unit,)) for unit in units)], measure=measure)
    measured = {unit: losses.difference(row, 0) for row, unit in enumerate(units, start=1)}
    return Scores(
        measure,
        {unit: rise if math.isfinite(rise) else math.inf for unit, (rise, _) in measured.items()},
        {unit: error for unit, (_, error) in measured.items() if error == error},
        oracle.data.describe(),
        float(losses.mean()[0]),
    )
