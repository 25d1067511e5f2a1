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
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from depthprune.errors import LayoutError, PlanError
from depthprune.layout import PROBE, Layout, blocks_of, discover, muted
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.record import answer, close, forwards, inputs
from depthprune.shrink import adopt, prove, shrink
from depthprune.skip import Skip, cache_slots, skip_sublayers
from depthprune.units import Unit, parse

_INDEX_NAMES = ("layer_idx", "layer_index", "layer_id", "block_idx")
# What model code raises when a configuration or a missing part does not suit it.
_REFUSALS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)


@contextmanager
def without(model: Model, units: Iterable[Unit | str]) -> Iterator[Model]:
    """Use a model as if units were dropped; when the block ends it is whole again.

    Forwards, cached decoding and ``generate`` all behave as those of ``drop`` with the same units.
    Raises ``PlanError`` for units that the model does not have.
    """
    gone = model.layout.gone(parse(tuple(units)))
    blocks = blocks_of(model.net, model.layout)
    config = vars(model.net.config.get_text_config(decoder=True))
    before = {key: config[key] for key in ("kv_sharing_modes",) if key in config}
    slots = [
        (module, module.layer_idx) for block in blocks for module in block.modules() if hasattr(module, "layer_idx")
    ]
    try:
        cache_slots(model.net.config.get_text_config(decoder=True), blocks, model.layout.cacheless(gone))
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
    Raises ``PlanError`` where the plan does not fit, ``LayoutError`` where the result is not what the plan means.
    """
    plan.fits(model.reference)
    if not plan.drop:
        return model
    gone = model.layout.gone(plan.drop)
    if not model.layout.viable(plan.drop):
        raise PlanError("this plan drops every block, or every attention: no model would be left; keep at least one")
    shells = not all(layout_block.sublayers for layout_block in model.layout.blocks)
    reason = ""
    for keep_shells in (False, True):
        if keep_shells and shells:
            break
        net, reason = _cut(model, gone, keep_shells)
        if not reason:
            net.eval()
            return replace(model, net=net, layout=discover(net, model.layout.element_size), plan=plan)
    raise LayoutError(f"{plan.describe()} cannot be dropped from {type(model.net).__name__}: {reason}")


def _cut(model: Model, gone: dict[int, frozenset[str] | None], shells: bool) -> tuple[nn.Module, str]:
    """A network without the units, and why it is not right (empty if it is proven)."""
    layout, net = model.layout, clone(model.net)
    text = net.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    blocks = blocks_of(net, layout)
    taken = set() if shells else {index for index, names in gone.items() if names is None}
    kept = [index for index in range(len(blocks)) if index not in taken]
    if taken:
        try:
            new = shrink(net.config, kept, len(blocks))
        except _REFUSALS as error:
            return net, f"its configuration cannot be shortened ({' '.join(str(error).split())})"
        adopt(net.config, new)
        parent, _, name = layout.path.rpartition(".")
        setattr(net.get_submodule(parent), name, nn.ModuleList([blocks[index] for index in kept]))
        for number, index in enumerate(kept):
            renumber(blocks[index], index, number)
        try:
            reason = prove(net, net.config)
        except _REFUSALS as error:
            reason = f"no model can be built from its shortened configuration ({' '.join(str(error).split())})"
        if reason:
            return net, reason
    spec = _skips(layout, blocks, gone, kept)
    if spec["skip"]:
        lost = layout.cacheless(gone)
        spec["no_cache"] = [number for number, index in enumerate(kept) if index in lost]
        text.depthprune = spec
        text.per_layer_config = _per_layer(layout, gone, kept)
        skip_sublayers(net)
    return net, _differs(model, net, gone)


def _skips(
    layout: Layout, blocks: list[nn.Module], gone: dict[int, frozenset[str] | None], kept: list[int]
) -> dict[str, Any]:
    """What the configuration has to say about missing sublayers, in the numbering of the kept blocks."""
    spec: dict[str, Any] = {"version": 1, "block": type(blocks[0]).__name__, "skip": {}, "tombstone": ""}
    for number, index in enumerate(kept):
        if index not in gone:
            continue
        block = layout.blocks[index]
        chosen = gone[index]
        names = frozenset(s.name for s in block.sublayers) if chosen is None else chosen
        parts = dict.fromkeys(block.idle(names), -1)
        parts |= {member: s.arity for s in block.sublayers if s.name in names for member in s.members}
        spec["skip"][str(number)] = parts
        if not spec["tombstone"]:
            part = next(iter(parts))
            spec["tombstone"] = f"{number}.{part}.{next(iter(blocks[index].get_submodule(part).state_dict()))}"
    return spec


def _per_layer(layout: Layout, gone: dict[int, frozenset[str] | None], kept: list[int]) -> dict[int, dict[str, Any]]:
    """The same in transformers' own words: ``{3: {"skip": ["attention"]}}``."""
    result = {}
    for number, index in enumerate(kept):
        if index in gone:
            names, block = gone[index], layout.blocks[index]
            kinds = {s.kind for s in block.sublayers if names is None or s.name in names}
            result[number] = {"skip": sorted(kinds)}
    return result


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
    device = next(net.parameters()).device
    tokens = torch.randint(model.vocabulary, PROBE, generator=torch.Generator().manual_seed(2)).to(device)
    try:
        with forwards(mutes(blocks_of(model.net, model.layout), model.layout, gone)):
            want = model.net(**inputs(tokens, None), use_cache=False)[0]
        have = net(**inputs(tokens, None), use_cache=False)[0]
        net(**inputs(tokens, None), use_cache=True)  # some hand a state from block to block
    except _REFUSALS as error:
        return f"without those units it does not run ({type(error).__name__}: {' '.join(str(error).split())})"
    if not close(have, want):
        gap = (want - have).abs().max().item()
        return f"without those units it computes something else (logits differ by {gap:.2g})"
    return ""


__all__ = ["Skip", "clone", "drop", "mutes", "without"]
