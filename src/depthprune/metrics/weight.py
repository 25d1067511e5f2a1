"""Data-free importance: the size of a unit's weights; and which tensors of a unit count as its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from depthprune.errors import OptionError
from depthprune.layout import Block, Layout, blocks_of
from depthprune.offload import hold
from depthprune.scores import Scores
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.oracle import ModelOracle

TENSORS = ("matrices", "weights")
PIECE = 1 << 22  # elements of a tensor that are worked on at a time, in float32

Parts = Mapping[int, Mapping[str, float]]  # block index -> name of a tensor in the block -> what it contributes


def magnitude(
    oracle: ModelOracle, units: Sequence[Unit], *, power: float = 1.0, tensors: str = "matrices", plus: bool = False
) -> Scores:
    """The size of a unit's weights: ``sum_k sum_ij |W_ij|^power`` over its tensors k. Needs no data.

    ``tensors`` says which count (see ``tensors_of``); ``plus`` keeps the first four and the last two blocks (see
    ``assemble``). ``detail`` holds the sum of every tensor. Float32 powers, float64 sums.
    Raises ``OptionError`` for a ``power`` that is not positive, or other ``tensors``.
    Source: Shortened LLaMA, "Mag" and "Mag+" (there power 1).
    """
    if not (power > 0 and math.isfinite(power)):
        raise OptionError(f"magnitude needs a power above 0, not {power:g}")
    layout, modules = oracle.model.layout, blocks_of(oracle.model.net, oracle.model.layout)
    progress = oracle.progress("measuring weights")
    indices = sorted({layout.block(unit).index for unit in units})
    parts = {}
    for done, index in enumerate(indices, start=1):
        with hold(modules[index]):
            parts[index] = {name: _size(tensor, power) for name, tensor in tensors_of(modules[index], tensors).items()}
        if progress is not None:
            progress(float(done), float(len(indices)))
    return assemble("magnitude", layout, units, parts, plus=plus)


def _size(tensor: Tensor, power: float) -> float:
    """``sum |w|^power`` in float64, a piece at a time."""
    pieces = torch.split(tensor.detach().reshape(-1), PIECE)
    return math.fsum(piece.float().abs().pow(power).double().sum().item() for piece in pieces)


def tensors_of(block: nn.Module, tensors: str) -> dict[str, Tensor]:
    """The tensors of a block that count as weights, by their names in the block.

    ``matrices`` (the paper): all with two or more dimensions. ``weights`` (its code): those, and all that have "weight"
    in their names, which adds the norms. Biases count in neither, whatever their shape.
    Raises ``OptionError`` for another choice.
    """
    if tensors not in TENSORS:
        raise OptionError(f"unknown tensors={tensors!r}. Available: {', '.join(TENSORS)}")
    return {
        name: tensor
        for name, tensor in block.named_parameters()
        if "bias" not in name.rpartition(".")[2] and (tensor.dim() >= 2 or (tensors == "weights" and "weight" in name))
    }


def belongs(name: str, block: Block, unit: Unit) -> bool:
    """Whether a tensor of a block goes with a unit: it lies in the unit, or in a norm that serves the unit alone."""
    if not unit.sublayer:
        return True
    homes = {*block.sublayer(unit.sublayer).members}
    homes |= {norm.name for norm in block.serves if norm.served == {unit.sublayer}}
    return name.partition(".")[0] in homes


def assemble(
    metric: str,
    layout: Layout,
    units: Sequence[Unit],
    parts: Parts,
    *,
    plus: bool,
    data: Mapping[str, Any] | None = None,
) -> Scores:
    """The scores of units from what each tensor contributes: the sum over the tensors that belong to the unit.

    With ``plus``, units of blocks 0 to 3 and of the last two must stay: their score is infinite (Shortened LLaMA's
    "+"). A sum that overflowed is not a number, so that nobody takes it for "must stay".
    """
    detail = {
        unit: {name: part for name, part in parts[unit.block].items() if belongs(name, layout.block(unit), unit)}
        for unit in units
    }
    values = {unit: sum(found.values()) for unit, found in detail.items()}
    values = {unit: value if math.isfinite(value) else math.nan for unit, value in values.items()}
    if plus:
        kept = {*range(4), len(layout.blocks) - 2, len(layout.blocks) - 1}
        values = {unit: math.inf if unit.block in kept else value for unit, value in values.items()}
    return Scores(metric, values, data=data or {}, detail=detail)
