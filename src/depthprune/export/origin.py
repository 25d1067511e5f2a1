"""Which block of the dense model each block of a folder is, told by a few numbers of each of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from depthprune.export.contents import AHEAD, Contents, split
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.offload import hold

SAMPLE = 256  # numbers of a tensor that are compared: the start of its first row
SAME = 0.02  # distance relative to the dense numbers, which leaves room for another 16-bit type
NEAR = 0.5  # mean distance up to which a block may have been trained on; of unrelated weights it is above 1
FAR = 2.0  # a distance counts as this at the most


@dataclass(frozen=True)
class Origin:
    """Which dense block a block is (None: no one), the tensors that differ from it, and the sublayers that it lacks."""

    block: int | None
    changed: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    compared: int = 0  # tensors


@dataclass(frozen=True, eq=False)
class Dense:
    """Some numbers of each tensor of a dense block, by its name in checkpoints, and whose sublayer each tensor is."""

    samples: Mapping[str, Tensor]
    parts: Mapping[str, frozenset[str]]


def origins(contents: Contents, dense: Model) -> dict[int, Origin]:
    """By number, where each block of a folder comes from.

    A block is the dense block with which most of its tensors agree; failing that, the nearest one if it is near.
    """
    theirs = _dense(dense)
    found = {}
    for number, names in contents.blocks.items():
        if any(name.startswith(AHEAD) for name in names):
            continue
        full = {rest: name for rest, name in names.items() if contents.tensors[name].bytes}  # empty ones mark a cut
        if full:
            found[number] = _origin(_samples(contents, full), frozenset(full), theirs)
    return found


def _origin(mine: Mapping[str, Tensor], names: frozenset[str], theirs: list[Dense]) -> Origin:
    apart = {}
    for index, other in enumerate(theirs):
        both = {name: distance(mine[name], other.samples[name]) for name in mine if name in other.samples}
        if known := {name: value for name, value in both.items() if value is not None}:
            apart[index] = known
    if not apart:
        return Origin(None)
    mean = {index: sum(min(value, FAR) for value in known.values()) / len(known) for index, known in apart.items()}
    agree = {index: sum(value <= SAME for value in known.values()) / len(known) for index, known in apart.items()}
    best = max(apart, key=lambda index: (agree[index], -mean[index]))
    if agree[best] < 0.5:
        best = min(apart, key=lambda index: mean[index])
        if mean[best] > NEAR:
            return Origin(None, compared=len(apart[best]))
    changed = tuple(name for name, value in apart[best].items() if value > SAME)
    lacks = tuple(sublayer for sublayer, part in theirs[best].parts.items() if part and not part & names)
    return Origin(best, changed, lacks, len(apart[best]))


def distance(mine: Tensor, other: Tensor) -> float | None:
    """How far numbers are from those of the dense model, relative to these; None where nothing can be said.

    Numbers that are all zero say nothing: they stand for something dropped. Matrices may have been padded.
    """
    length = min(mine.numel(), other.numel())
    mine, other = mine[:length], other[:length]
    if not mine.any():
        return None
    size, gap = float(other.norm()), float((mine - other).norm())
    return math.inf if size == 0 or not math.isfinite(gap) else gap / size


def _dense(model: Model) -> list[Dense]:
    """Samples of every dense block, one block at a time."""
    found: list[Dense] = []
    for block, module in zip(model.layout.blocks, blocks_of(model.net, model.layout), strict=True):
        prefix = f"{model.layout.path}.{block.index}."
        owner = {member: sublayer.name for sublayer in block.sublayers for member in sublayer.members}
        samples: dict[str, Tensor] = {}
        parts: dict[str, frozenset[str]] = {}
        with hold(module):
            state = module.state_dict()
            whose = {name: next((o for m, o in owner.items() if name.startswith(f"{m}.")), "") for name in state}
            for part, names in groupby(sorted(state, key=whose.__getitem__), key=whose.__getitem__):
                own = {prefix + name: state[name] for name in names}
                written = revert_weight_conversion(model.net, dict(own)) | own
                inside = {place[2]: tensor for name, tensor in written.items() if (place := split(name)) is not None}
                samples |= {name: _sample(tensor) for name, tensor in inside.items()}
                parts |= {part: frozenset(inside)} if part else {}
        found.append(Dense(samples, parts))
    return found


def _sample(tensor: Tensor) -> Tensor:
    return tensor[(slice(0, 1),) * (tensor.ndim - 1)].detach().flatten()[:SAMPLE].float().cpu()


def _samples(contents: Contents, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Samples of the tensors of one block of a folder; tensors of files that are damaged are left out."""
    found: dict[str, Tensor] = {}
    by_file: dict[Any, list[str]] = {}
    for rest, name in names.items():
        by_file.setdefault(contents.tensors[name].file, []).append(rest)
    for file, rests in by_file.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for rest in rests:
                    part = opened.get_slice(names[rest])
                    rows = len(part.get_shape()) - 1
                    tensor = part[(slice(0, 1),) * rows] if rows > 0 else opened.get_tensor(names[rest])
                    if tensor.is_floating_point() and tensor.element_size() > 1:  # 8 bits come with a scale apart
                        found[rest] = tensor.flatten()[:SAMPLE].float()
        except SafetensorError:
            continue
    return found
