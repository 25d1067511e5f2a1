"""What is measured of a thinner model at a position: the loss, or how far its prediction is from the dense model's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _loss(logits: Tensor, wanted: Tensor, dense: Tensor) -> Tensor:
    """``-log p(wanted)``, in nats."""
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")


def _kl(logits: Tensor, wanted: Tensor, dense: Tensor) -> Tensor:
    """``KL(p || q) = sum p (log p - log q)`` of the dense model's p and the variant's q, in nats."""
    p, q = dense.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _js(logits: Tensor, wanted: Tensor, dense: Tensor) -> Tensor:
    """``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, in nats: at most log 2."""
    p, q = dense.log_softmax(-1), logits.log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2


def _logit_distance(logits: Tensor, wanted: Tensor, dense: Tensor) -> Tensor:
    """``|z - z_dense|_2`` of the logits."""
    distance: Tensor = torch.linalg.vector_norm(logits - dense, dim=-1)
    return distance


# What can be measured of a variant at a position: from logits (P, V) in float32, the wanted tokens (P,), and the dense
# model's logits (P, V).
MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "loss": _loss,
    "kl": _kl,
    "js": _js,
    "logit_distance": _logit_distance,
}
