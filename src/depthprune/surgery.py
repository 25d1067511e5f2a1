"""Dropping: for good (``drop``), or for a moment (``without``).

The two are independent on purpose: ``without`` mutes parts of the live network, ``drop`` builds a network without them;
each is the proof of the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from depthprune.discover import PROBE, REFUSALS, discover, muted
from depthprune.errors import LayoutError, PlanError
from depthprune.layout import Layout, blocks_of
from depthprune.model import Model, fingerprint
from depthprune.plan import Plan, Reference
from depthprune.record import answer, close, forwards, inputs
from depthprune.shrink import adopt, prove, shrink
from depthprune.skip import VERSION, Skip, cache_slots, skip_sublayers
from depthprune.standin import Placement, equip, fill, noted, place
from depthprune.units import Unit, parse

_OWN = ("bias", "down", "up")  # what a ``Skip`` calls its own weights
_INDEX_NAMES = ("layer_idx", "layer_index", "layer_id", "block_idx")


@contextmanager
def without(model: Model, units: Iterable[Unit | str]) -> Iterator[Model]:
    """Use a model as if units were dropped; when the block ends it is whole again.

    Forwards, cached decoding and ``generate`` all behave as those of ``drop`` with the same units.
    Raises ``PlanError`` for units that the model does not have.
    """
    gone = model.layout.gone(parse(units))
    blocks = blocks_of(model.net, model.layout)
    text = model.net.config.get_text_config(decoder=True)
    config = vars(text)
    before = {key: config[key] for key in ("kv_sharing_modes",) if key in config}
    slots = [
        (module, module.layer_idx) for block in blocks for module in block.modules() if hasattr(module, "layer_idx")
    ]
    try:
        already = (getattr(text, "depthprune", None) or {}).get("no_cache", ())
        cache_slots(text, blocks, {*already, *model.layout.cacheless(gone)})
        with forwards(mutes(blocks, model.layout, gone)):
            yield model
    finally:
        config.pop("kv_sharing_modes", None)
        config.update(before)
        for module, slot in slots:
            module.layer_idx = slot


def mutes(
    blocks: list[nn.Module], layout: Layout, gone: dict[int, frozenset[str] | None]
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The replacement forwards that mute dropped units: bypassed blocks, sublayers that return zeros."""
    replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
    for index, names in gone.items():
        block, found = blocks[index], layout.blocks[index]
        if names is None:
            replaced.append((block, _bypass(found.arity)))
        else:
            replaced += muted(block, tuple(found.sublayer(name) for name in sorted(names)))
    return replaced


def _bypass(arity: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), arity)

    return forward


def drop(model: Model, plan: Plan) -> Model:
    """Make the smaller model that a plan describes; the model handed in stays whole and shares its weights.

    Whole blocks are taken out of the stack and the configuration is shrunk; sublayers are replaced by ``Skip``. If the
    family's configuration cannot express the removal of those blocks, they stay as empty shells that cost nothing.
    The plan's stand-ins are put in place at zero effect; the new model's plan notes where they are (``standin.py``).
    Raises ``PlanError`` where the plan does not fit, ``LayoutError`` where the result is not what the plan means.
    """
    plan.fits(model.reference)
    prunable(model)
    if not plan.drop:
        return model
    own, said = model.reference, plan.model  # a plan that was written by hand says less
    known = replace(said, blocks=said.blocks or own.blocks, fingerprint=said.fingerprint or own.fingerprint)
    plan = replace(plan, model=known)
    gone = model.layout.gone(plan.drop)
    if not model.layout.viable(plan.drop):
        raise PlanError("this plan drops every block, or every attention: no model would be left; keep at least one")
    whole = frozenset(index for index, names in gone.items() if names is None)
    able = all(block.sublayers for block in model.layout.blocks)
    for flags in (True, False):
        placement = place(model, plan, flags)
        for shells in dict.fromkeys((placement.shells, whole)):
            if shells != placement.shells and not able:
                break
            net, reason = _cut(model, gone, shells, placement)
            if not reason:
                net.eval()
                layout = discover(net, model.layout.element_size)
                own = Reference(model.reference.id, model.reference.revision, len(layout.blocks), fingerprint(net))
                kept = [index for index in range(len(model.layout.blocks)) if index not in whole - shells]
                plan = noted(plan, placement, layout.path, kept)
                return replace(model, recovery=None, net=net, layout=layout, reference=own, plan=plan)
        if not placement.flags:
            break
    raise LayoutError(f"{plan.describe()} cannot be dropped from {type(model.net).__name__}: {reason}")


def prunable(model: Model) -> None:
    """Raise ``LayoutError`` for a model of form nemotron-nas, whose configuration says otherwise what is missing."""
    if isinstance(getattr(type(model.net.config), "depthprune", None), property):
        raise LayoutError(f"{model.reference.id} is DeciLM: prune the folder of form hf that it was made from")


def _cut(
    model: Model, gone: dict[int, frozenset[str] | None], shells: frozenset[int], placement: Placement
) -> tuple[nn.Module, str]:
    """A network without the units, and why it is not right (empty if it is proven)."""
    layout, net = model.layout, clone(model.net)
    equip(net, placement)
    text = net.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    blocks = blocks_of(net, layout)
    taken = {index for index, names in gone.items() if names is None} - shells
    kept = [index for index in range(len(blocks)) if index not in taken]
    before = unmark(text)
    if taken:
        if before["skip"] and int(before["tombstone"].partition(".")[0]) in taken:
            return net, "the block with its tombstone cannot go"
        try:
            adopt(net.config, shrink(net.config, kept, len(blocks)))
        except REFUSALS as error:
            return net, f"its configuration cannot be shortened ({' '.join(str(error).split())})"
        parent, _, name = layout.path.rpartition(".")
        setattr(net.get_submodule(parent), name, nn.ModuleList([blocks[index] for index in kept]))
        for number, index in enumerate(kept):
            renumber(blocks[index], index, number)
    if taken or placement.flags:
        _mark(text, _moved(before, kept))
        try:
            reason = prove(net, net.config)
        except REFUSALS as error:
            reason = f"no model can be built from its shortened configuration ({' '.join(str(error).split())})"
        if reason:
            return net, reason
    _mark(text, _joined(_moved(before, kept), _skips(layout, blocks, gone, kept, placement)))
    skip_sublayers(net)
    fill(net, layout.path, kept, placement)
    return net, _differs(model, net, gone)


Spec = dict[str, Any]  # what a configuration says about missing sublayers; see ``skip.py``


def _skips(
    layout: Layout,
    blocks: list[nn.Module],
    gone: dict[int, frozenset[str] | None],
    kept: list[int],
    placement: Placement,
) -> Spec:
    """What the configuration has to say about missing sublayers, in the numbering of the kept blocks.

    The parts with a stand-in are not among ``kinds``: what transformers itself puts there could not hold it.
    """
    spec: Spec = {"version": 1, "block": type(blocks[0]).__name__, "skip": {}, "kinds": {}, "stand_in": {}}
    lost = layout.cacheless(gone)
    spec["no_cache"] = [number for number, index in enumerate(kept) if index in lost]
    buried: dict[str, str] = {}
    for number, index in enumerate(kept):
        if index not in gone:
            continue
        block, held = layout.blocks[index], placement.held(index)
        chosen = gone[index]
        names = frozenset(s.name for s in block.sublayers) if chosen is None else chosen
        dropped = [s for s in block.sublayers if s.name in names]
        parts = dict.fromkeys(block.idle(names), -1)
        for s in dropped:
            mapped = s.members[-1] in held and held[s.members[-1]].rank
            parts |= dict.fromkeys(s.members[:-1], -1 if mapped else s.arity) | {s.members[-1]: s.arity}
        spec["skip"][str(number)] = parts
        if kinds := sorted({s.kind for s in dropped if s.members[-1] not in held}):
            spec["kinds"][str(number)] = kinds
        for part, one in held.items():
            spec["stand_in"][f"{number}.{part}"] = {"rank": one.rank, "width": one.width}
        for part in (*held, *parts):
            tensors = (t for t in blocks[index].get_submodule(part).state_dict() if t.split(".")[0] not in _OWN)
            buried.setdefault("held" if part in held else "", next((f"{number}.{part}.{t}" for t in tensors), ""))
    return spec | {"tombstone": buried.get("held") or buried.get("", "")}


def _moved(spec: Spec, kept: list[int]) -> Spec:
    """What an earlier cut said, in the numbering of the blocks that are kept."""
    place = {str(index): str(number) for number, index in enumerate(kept)}
    block, _, tensor = spec["tombstone"].partition(".")
    return spec | {
        "skip": {place[index]: parts for index, parts in spec["skip"].items() if index in place},
        "kinds": {place[index]: kinds for index, kinds in spec["kinds"].items() if index in place},
        "stand_in": {
            f"{place[name.partition('.')[0]]}.{name.partition('.')[2]}": form
            for name, form in spec["stand_in"].items()
            if name.partition(".")[0] in place
        },
        "no_cache": [kept.index(index) for index in spec["no_cache"] if index in kept],
        "tombstone": f"{place[block]}.{tensor}" if tensor else "",
    }


def _joined(before: Spec, now: Spec) -> Spec:
    """An earlier cut and this one, as one."""
    return now | {
        "skip": {i: before["skip"].get(i, {}) | now["skip"].get(i, {}) for i in {**before["skip"], **now["skip"]}},
        "kinds": {
            i: sorted({*before["kinds"].get(i, ()), *now["kinds"].get(i, ())})
            for i in {**before["kinds"], **now["kinds"]}
        },
        "stand_in": before["stand_in"] | now["stand_in"],
        "no_cache": sorted({*before["no_cache"], *now["no_cache"]}),
        "tombstone": before["tombstone"] or now["tombstone"],
    }


def unmark(text: Any) -> Spec:
    """Take from a configuration what an earlier cut said, so that it is that of a whole model again."""
    nothing = {"skip": {}, "kinds": {}, "stand_in": {}, "no_cache": [], "tombstone": ""}
    spec: Spec = nothing | (vars(text).pop("depthprune", None) or {})
    if spec["skip"]:
        if isinstance(getattr(type(text), "per_layer_config", None), property):
            text.per_layer_config = None
        for name in ("per_layer_config", "kv_sharing_modes"):
            vars(text).pop(name, None)
    return spec


def _mark(text: Any, spec: Spec) -> None:
    """Say in a configuration what is missing: for ourselves, and in transformers' own words."""
    if spec["skip"]:
        plain = {key: value for key, value in spec.items() if key != "stand_in"}
        text.depthprune = spec | {"version": VERSION} if spec["stand_in"] else plain
        if not spec["kinds"]:
            return
        text.per_layer_config = {int(index): {"skip": kinds} for index, kinds in spec["kinds"].items()}


def renumber(block: nn.Module, old: int, new: int) -> None:
    """Give a block that moved its new number, wherever it or a part of it keeps one."""
    for module in block.modules():
        for name in _INDEX_NAMES:
            if vars(module).get(name) == old and not isinstance(vars(module)[name], bool):
                setattr(module, name, new)


def clone(net: nn.Module) -> nn.Module:
    """A network with its own modules and configuration that shares every weight with the original."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    for module in net.modules():  # a state that a forward left behind may hang on a graph, which cannot be copied
        states = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo |= {id(state): state.detach() for state in states}
    return copy.deepcopy(net, memo)


@torch.no_grad()
def _differs(model: Model, net: nn.Module, gone: dict[int, frozenset[str] | None]) -> str:
    """Compare the cut network with the muted original on a probe; say by how much they differ, if they do."""
    tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(2)).to(model.device)
    try:
        with forwards(mutes(blocks_of(model.net, model.layout), model.layout, gone)):
            want = model.net(**inputs(tokens, None), use_cache=False)[0]
        have = net(**inputs(tokens, None), use_cache=False)[0]
        net(**inputs(tokens, None), use_cache=True)  # some hand a state from block to block
    except REFUSALS as error:
        return f"without those units it does not run ({type(error).__name__}: {' '.join(str(error).split())})"
    if not close(have, want):
        gap = (want - have).abs().max().item()
        return f"without those units it computes something else (logits differ by {gap:.2g})"
    return ""


__all__ = ["Skip", "clone", "drop", "mutes", "without"]
