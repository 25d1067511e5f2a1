"""Stand-ins: what is put in place of a dropped unit, and where it lies in the smaller model.

A ``bias`` is a constant (D,) that is added to the stream where the unit was. That is the same as a bias of the map that
wrote to the stream last before it, so it goes there if the map has a bias (or can have one by a flag of the
configuration). Elsewhere, and for a map of low rank, ``Skip`` holds it in the dropped sublayer's place.

A map of low rank is given what the sublayer was given: the stream itself where the norms before it go with the
sublayer; their output where they stay, because another sublayer needs them or because they have no weights (OLMo's);
and for two parts that lie in the block itself (OPT's ``fc1`` and ``fc2``) the activation of that. A block's stand-in
takes the place of its first sublayer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from depthprune.discover import PROBE, given, muted, through, zeros
from depthprune.errors import PlanError
from depthprune.layout import Sublayer, blocks_of
from depthprune.model import Model
from depthprune.offload import device_of, hold, realise
from depthprune.plan import Plan, rank
from depthprune.record import forwards, record
from depthprune.shrink import Flagged, bias_flags
from depthprune.units import Unit
from depthprune.writers import Ends, Writer, ends, matrix

Replaced = list[tuple[nn.Module, Callable[..., Any]]]


@dataclass(frozen=True)
class StandIn:
    """What stands in for a dropped unit, and the names of the parameters in the smaller network that hold it.

    A bias adds ``scale * bias`` to the stream, a map of low rank ``scale * up(down(x))``. Units that were dropped one
    after the other may share one bias.
    """

    unit: Unit
    kind: str  # "bias" or "lowrank"
    rank: int  # 0 for a bias
    names: tuple[str, ...]
    scale: float


@dataclass(frozen=True)
class Place:
    """Where a stand-in goes, in the numbering of the model before the cut: a part of a block.

    ``folded``: the part is a kept map, whose own bias it is; otherwise the ``Skip`` in the place of that part holds it.
    """

    unit: Unit
    rank: int
    width: int
    block: int
    part: str
    folded: bool
    scale: float

    def names(self, stack: str, number: int) -> tuple[str, ...]:
        """The parameters that hold it once the block has another number in the stack."""
        tensors = ("down.weight", "up.weight") if self.rank else ("bias",)
        return tuple(f"{stack}.{number}.{self.part}.{tensor}" for tensor in tensors)


@dataclass(frozen=True)
class Placement:
    """The places of all stand-ins, and what they ask of the model.

    The configuration's ``flags`` give it the ``biases``, and set the ``marks`` (module, attribute) that say so.
    """

    places: tuple[Place, ...] = ()
    flags: tuple[str, ...] = ()
    biases: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    marks: tuple[tuple[str, str], ...] = ()

    @property
    def shells(self) -> frozenset[int]:
        """Blocks that are dropped whole, but stay as shells that hold their stand-in."""
        return frozenset(place.block for place in self.places if not (place.folded or place.unit.sublayer))

    def held(self, block: int) -> dict[str, Place]:
        """The stand-ins that take the place of dropped parts of a block, by part."""
        return {place.part: place for place in self.places if place.block == block and not place.folded}


def stand_ins(model: Model) -> tuple[StandIn, ...]:
    """The stand-ins of a smaller model, in the order of its plan's ``stand_in``; of a folder, with its own plan.

    Raises ``PlanError`` where the plan does not say where they are, or the network does not have them.
    """
    if model.plan is None or not model.plan.stand_in:
        return ()
    units = (model.plan.why.get("stand_ins") or {}).get("units")
    if not isinstance(units, dict):
        raise PlanError(
            "this plan does not say where its stand-ins are; use the plan.json of the folder that drop wrote"
        )
    there = {name for name, _ in model.net.named_parameters(remove_duplicate=False)}
    found = []
    for name, entry in units.items():
        for parameter in entry["names"]:
            if parameter not in there:
                raise PlanError(f"the model has no {parameter}, where its plan has the stand-in for {name}")
        kind = "lowrank" if entry["rank"] else "bias"
        found.append(StandIn(Unit.parse(name), kind, entry["rank"], tuple(entry["names"]), entry["scale"]))
    return tuple(found)


def parameters(model: Model) -> list[str]:
    """The names of all parameters that hold stand-ins, each once."""
    return list(dict.fromkeys(name for one in stand_ins(model) for name in one.names))


def planned(dense: Model, plan: Plan) -> int:
    """How many parameters are left once a plan is carried out: what there is, less what goes, plus the stand-ins.

    Biases that a flag of the configuration gives to parts that stay count in full, whether they stand in or not.
    """
    left = dense.parameters - dense.layout.freed(plan.drop)
    if not plan.stand_in:
        return left
    placement = place(dense, plan, flags=bool((plan.why.get("stand_ins") or {"flags": True}).get("flags")))
    gone = dense.layout.gone(plan.drop)
    lost = [f"{dense.layout.path}.{index}." for index, names in gone.items() if names is None]
    for index, names in gone.items():
        members = [m for name in names or () for m in dense.layout.blocks[index].sublayer(name).members]
        lost += [f"{dense.layout.path}.{index}.{member}." for member in members]
    new = sum(shape[0] for name, shape in placement.biases.items() if not name.startswith(tuple(lost)))
    return left + new + sum(one.width * max(1, 2 * one.rank) for one in placement.places if not one.folded)


def noted(plan: Plan, placement: Placement, stack: str, kept: list[int]) -> Plan:
    """The plan with a note of where its stand-ins are; ``kept`` are the old numbers of the blocks that are left."""
    if not placement.places:
        return plan
    units = {
        str(one.unit): {
            "rank": one.rank, "names": list(one.names(stack, kept.index(one.block))), "scale": one.scale,
        }
        for one in placement.places
    }  # fmt: skip
    note = {"flags": list(placement.flags), "units": units}
    return replace(plan, why={**plan.why, "stand_ins": note})


def wanted(model: Model, plan: Plan) -> dict[Unit, int]:
    """The rank of the stand-in of each dropped unit that has one, in canonical form: all sublayers are the block.

    Raises ``PlanError`` for units that the model does not have, or that stay in part, and for two stand-ins of a block.
    """
    gone, found = model.layout.gone(plan.drop), dict[Unit, int]()
    for name, form in plan.stand_in.items():
        unit = Unit.parse(name)
        model.layout.kind(unit)
        lost = gone.get(unit.block, frozenset())
        if lost is None:
            unit = unit.whole
        elif unit.sublayer not in lost:
            raise PlanError(f"the plan has a stand-in for {unit}, but it does not drop all of it")
        if found.setdefault(unit, rank(form)) != rank(form):
            raise PlanError(f"the plan has two stand-ins for block {unit}: give all its parts the same")
    return found


def place(model: Model, plan: Plan, flags: bool = True) -> Placement:
    """Where each stand-in of a plan goes; ``flags`` allows biases that the configuration has to be asked for.

    Runs the blocks around each unit on a probe, to prove that the place is as good as the unit's own.
    Raises ``PlanError`` naming the unit where there is no place.
    """
    asked = wanted(model, plan)
    if not asked:
        return Placement()
    finder = _Finder(model, model.layout.gone(plan.drop))
    places, used = [], dict[str, None]()
    for unit, size in asked.items():
        host = None if size else finder.host(unit, flags)
        if host is not None:
            found, flag = host
            if flag:
                used[flag] = None
        else:
            found = finder.own(unit, size)
        places.append(found)
    biases: dict[str, tuple[int, ...]] = {}
    marks: list[tuple[str, str]] = []
    for flag in used:
        biases |= finder.flags[flag][0]
        marks += finder.flags[flag][1]
    return Placement(tuple(places), tuple(used), biases, tuple(marks))


def equip(net: Any, placement: Placement) -> None:
    """Give a network the biases that a placement needs, all zero, and set their flags in its configuration."""
    text = net.config.get_text_config(decoder=True)
    for flag in placement.flags:
        setattr(text, flag, True)
    for name, mark in placement.marks:
        setattr(net.get_submodule(name), mark, True)
    for name, shape in placement.biases.items():
        owner = net.get_submodule(name.rpartition(".")[0])
        weight = next(p for p in (getattr(owner, "weight", None), *net.parameters()) if _floating(p))
        owner.bias = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=device_of(weight)))


@torch.no_grad()
def fill(net: Any, stack: str, kept: list[int], placement: Placement) -> None:
    """Draw the first half of each map of low rank with standard deviation 1/sqrt(D); the second stays zero."""
    device = net.get_input_embeddings().weight.device
    for one in placement.places:
        names = one.names(stack, kept.index(one.block))
        for name in names:
            realise(net, name, device)
        if one.rank:
            weight = net.get_parameter(names[0])
            seed = torch.Generator().manual_seed(sum(map(ord, str(one.unit))))
            weight.copy_(torch.randn(weight.shape, generator=seed) * one.width**-0.5)


class _Finder:
    """Finds places by running blocks on a probe: the model's blocks, their calls, and what the plan drops."""

    @torch.no_grad()
    def __init__(self, model: Model, gone: dict[int, frozenset[str] | None]) -> None:
        self.model, self.layout, self.gone = model, model.layout, gone
        self.blocks = blocks_of(model.net, model.layout)
        tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(8)).to(model.device)
        arities = [block.arity for block in model.layout.blocks]
        recording = record(model.net, self.blocks, arities, tokens, None)
        noise = torch.Generator().manual_seed(9)
        like = recording.stream
        self.calls, self.stream = recording.calls, like + torch.randn(like.shape, generator=noise).to(like)
        self.width = like.shape[-1]
        self.constant = torch.randn(self.width, generator=noise).to(like) * self.stream.float().std().to(like)
        self.times = Counter(id(p) for m in model.net.modules() for p in m.parameters(recurse=False))

    @cached_property
    def ends(self) -> list[tuple[Ends, ...]]:
        return ends(self.model)

    @cached_property
    def flags(self) -> dict[str, Flagged]:
        return dict(bias_flags(self.model.net))

    def lost(self, index: int) -> tuple[Sublayer, ...]:
        """The dropped sublayers of a block."""
        names = self.gone.get(index, frozenset())
        return tuple(s for s in self.layout.blocks[index].sublayers if names is None or s.name in names)

    def cut(self, index: int, named: str = "", constant: Tensor | None = None) -> Replaced:
        """What makes a block what the plan leaves of it, with a constant in the place of one dropped sublayer."""
        block, lost = self.blocks[index], self.lost(index)
        replaced = muted(block, lost)
        idle = self.layout.blocks[index].idle(frozenset(s.name for s in lost))
        replaced += [(block.get_submodule(name), through) for name in idle]
        for sublayer in lost:
            if sublayer.name == named and constant is not None:
                replaced.append((block.get_submodule(sublayer.members[-1]), zeros(sublayer.arity, constant)))
        return replaced

    @torch.no_grad()
    def own(self, unit: Unit, size: int) -> Place:
        """The place of a dropped sublayer, or of a block's first one. Raises ``PlanError`` where it is none."""
        block = self.layout.blocks[unit.block]
        if not block.sublayers:
            raise PlanError(
                f"{unit} cannot have a stand-in: block {unit.block} has only itself to drop ({block.reason}), and no "
                "map before it can hold one"
            )
        if size > self.width:
            raise PlanError(f"{unit} cannot have a stand-in of rank {size}: the stream is only {self.width} wide")
        sublayer = block.sublayer(unit.sublayer) if unit.sublayer else block.sublayers[0]
        return Place(unit, size, self.width, unit.block, sublayer.members[-1], False, self.scale(unit, sublayer))

    @torch.no_grad()
    def scale(self, unit: Unit, sublayer: Sublayer) -> float:
        """By what the block multiplies what a dropped sublayer's place returns before it adds that to the stream."""
        block, index = self.blocks[unit.block], unit.block
        kept = tuple(s for s in self.layout.blocks[index].sublayers if s not in self.lost(index))
        with forwards([*muted(block, kept), *self.cut(index)]):
            without = self.calls[index].run(block, self.stream)
        with forwards([*muted(block, kept), *self.cut(index, sublayer.name, self.constant)]):
            update = (self.calls[index].run(block, self.stream) - without).float()
        constant = self.constant.float().expand_as(update)
        scale = float((update * constant).sum() / constant.square().sum())
        if not scale or not _close(update, scale * constant, update, self.stream):
            raise PlanError(f"{unit} cannot have a stand-in: what takes its place is not simply added to the stream")
        return 1.0 if abs(scale - 1) < (1e-4 if self.stream.dtype == torch.float32 else 1e-2) else scale

    @torch.no_grad()
    def host(self, unit: Unit, flags: bool) -> tuple[Place, str] | None:
        """The kept map whose bias is as good as a constant in the unit's place, and the flag that gives it one."""
        where = self.before(unit)
        if where is None:
            return None
        index, sublayer = where
        writer = next((one.writer for one in self.ends[index] if one.sublayer.name == sublayer.name), None)
        if writer is None:
            return None
        module = self.blocks[index].get_submodule(writer.path)
        bias, flag = getattr(module, "bias", None), ""
        if isinstance(bias, nn.Parameter):
            if bias.shape != (self.width,) or self.times[id(bias)] > 1 or not bias.is_floating_point():
                return None
        elif bias is None and flags and matrix(module):
            name = f"{self.layout.path}.{index}.{writer.path}.bias"
            flag = next((flag for flag, (biases, _) in self.flags.items() if name in biases), "")
        if not (flag or isinstance(bias, nn.Parameter)) or not self.proven(unit, index, writer):
            return None
        return Place(unit, 0, self.width, index, writer.path, True, writer.scale), flag

    def before(self, unit: Unit) -> tuple[int, Sublayer] | None:
        """The last kept sublayer before a unit; or one after it that does not read what the unit would add."""
        sublayers = self.layout.blocks[unit.block].sublayers
        position = next((n for n, s in enumerate(sublayers) if s.name == unit.sublayer), 0)
        lost = self.lost(unit.block)
        for later in sublayers[position:] if unit.sublayer else ():
            if later not in lost and not self.reads(unit, later):
                return unit.block, later
        for earlier in reversed(sublayers[:position]):
            if earlier not in lost:
                return unit.block, earlier
        for index in reversed(range(unit.block)):
            found = self.layout.blocks[index].sublayers
            if kept := [s for s in found if s not in self.lost(index)]:
                return index, kept[-1]
            if index not in self.gone or (found and self.gone[index] is not None):
                return None  # a kept block whose sublayers are not known, or that only holds stand-ins
        return None

    def reads(self, unit: Unit, later: Sublayer) -> bool:
        """Whether a later sublayer of the same block is given something else where the unit's place is no zero."""
        block, seen = self.blocks[unit.block], list[Tensor]()
        with given(block.get_submodule(later.members[0]), seen):
            for constant in (None, self.constant):
                with forwards(self.cut(unit.block, unit.sublayer, constant)):
                    self.calls[unit.block].run(block, self.stream)
        return not torch.equal(*seen)

    def proven(self, unit: Unit, index: int, writer: Writer) -> bool:
        """Whether a change of a writer's bias does to the stream after the unit what a constant in its place does."""
        module, change = self.blocks[index].get_submodule(writer.path), self.constant
        scale = self.scale(unit, self.layout.block(unit).sublayer(unit.sublayer)) if unit.sublayer else 1.0
        nothing = self.run(unit, index, None)
        want = self.run(unit, index, change * (writer.scale / scale))
        with hold(module), _nudged(module, change):
            have = self.run(unit, index, None)
        return _close(have, want, want - nothing, self.stream)

    def run(self, unit: Unit, start: int, constant: Tensor | None) -> Tensor:
        """The stream after the unit's block, from the start of another one, as the plan leaves the blocks."""
        stream = self.stream
        for index in range(start, unit.block + 1):
            if index in self.gone and self.gone[index] is None:
                if constant is not None and index == unit.block:
                    stream = stream + constant
                continue
            with forwards(self.cut(index, unit.sublayer if index == unit.block else "", constant)):
                stream = self.calls[index].run(self.blocks[index], stream)
        return stream


def _floating(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


@contextmanager
def _nudged(module: nn.Module, change: Tensor) -> Iterator[None]:
    """Add a constant to the bias of a module, or to its output where it has none, for a moment."""
    own = module.bias
    if isinstance(own, nn.Parameter):
        module.bias = nn.Parameter(own + change.to(own), requires_grad=False)
        try:
            yield
        finally:
            module.bias = own
    else:
        hook = module.register_forward_hook(lambda _, given, output: output + change)
        try:
            yield
        finally:
            hook.remove()


def _close(have: Tensor, want: Tensor, effect: Tensor, stream: Tensor) -> bool:
    """Whether two streams agree, measured by the effect in question and the rounding of the stream."""
    exact = stream.dtype in (torch.float32, torch.float64)
    rounding = 8 * torch.finfo(stream.dtype).eps * (want.float().norm() + stream.float().norm())
    return bool((have.float() - want.float()).norm() <= (1e-3 if exact else 5e-2) * effect.float().norm() + rounding)
