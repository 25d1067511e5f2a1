"""Baselines: what any metric worth its name must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from depthprune.scores import Scores
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle


def random(oracle: ModelOracle, units: Sequence[Unit], *, seed: int = -1) -> Scores:
    """Scores drawn evenly from [0, 1), under the data's seed or the one given.

    Each unit has its own generator: its score depends on its name and the seed, not on which other units are asked for.
    """
    chosen = oracle.data.seed if seed == -1 else seed
    return Scores("random", {unit: Random(f"{chosen} {unit}").random() for unit in units})


def last(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
    """How far a unit is from the end: the deepest goes first, the final block never.

    A block scores the number of blocks after it; a sublayer, in addition, the share of its block's sublayers that run
    after it. Units of the final block are infinite: the paper found it vital, whatever else can go.
    Source: Gromov et al., section 4 (the "simple" strategy: the deepest blocks but the last).
    """
    layout = oracle.model.layout
    final = len(layout.blocks) - 1
    values = {}
    for unit in units:
        names = [sublayer.name for sublayer in layout.block(unit).sublayers]
        later = len(names) - 1 - names.index(unit.sublayer) if unit.sublayer else 0
        values[unit] = math.inf if unit.block == final else final - unit.block + later / max(1, len(names))
    return Scores("last", values)
