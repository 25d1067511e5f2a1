"""What the sweeps run on: the plans that each family gets, and the families that are rightly refused, with reasons.

Nothing is left out silently: a refusal listed here must really happen, and one that is not listed fails the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from depthprune.data import Data, digest
from depthprune.layout import Layout
from depthprune.model import Model, wrap
from depthprune.plan import Plan
from depthprune.units import Unit
from families import tiny

PLANS = ("block", "blocks", "attention", "mlp", "mixed", "mixer")


def model(name: str) -> Model:
    """A fresh tiny model of a family."""
    return wrap(tiny(name), None, name)


def plans(layout: Layout) -> dict[str, tuple[Unit, ...]]:
    """One plan of each sort that the layout has units for; the attention of block 0 is always among them."""
    blocks, attention, mlp = layout.units("block"), layout.units("attention"), layout.units("mlp")
    found = {"block": blocks[1:2], "blocks": (blocks[0], blocks[2]), "mixer": layout.units("mixer")[:1]}
    if attention:
        found["attention"] = attention[: max(1, min(2, len(attention) - 1))]
    if mlp:
        found["mlp"] = (mlp[0], mlp[-1])
    if attention and mlp:
        found["mixed"] = (blocks[2], *(unit for unit in (attention[0], mlp[-1]) if unit.block != 2))
    return {sort: found[sort] for sort in PLANS if found.get(sort)}


def plan(subject: Model, units: Sequence[Unit]) -> Plan:
    """A plan for these units of this model."""
    return Plan(subject.reference, tuple(units))


def text(*, padded: bool = False, rows: int = 3, length: int = 20, seed: int = 0) -> Data:
    """Random tokens; ``padded`` leaves the second row 13 tokens and the last 2."""
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[1, 13:] = False
        mask[-1, 2:] = False
        tokens = tokens * mask
    return Data(tokens, mask, "random", digest(tokens, mask), seed, ())
