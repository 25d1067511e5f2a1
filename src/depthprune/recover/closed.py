"""Recovery in closed form: least squares on the streams of the dense and the cut model. No gradients, no new weights.

``refit`` fits every map that reads or writes the stream after the first cut; ``linear`` only the writer before each
cut, by a square map; ``scale`` only the size of the stream. What is fitted must remove error on rows held out, map by
map; a map that does not stays as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from depthprune.errors import OptionError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.record import head, record
from depthprune.recover.inner import fit_inner
from depthprune.recover.normal import Fit, Normal
from depthprune.recover.pair import Pair, Step, batches, pair, steps
from depthprune.recover.repair import Repair
from depthprune.writers import (
    Ends,
    Seen,
    Writer,
    bias_of,
    ends,
    mapped,
    matrix,
    same,
    set_bias,
    set_weight,
    watched,
    weight_of,
)

WORTH = 5e-3  # the share of the held-out error that a fit must have removed for the next, dearer one to be made
Record = dict[str, Any]


def refit(repair: Repair, *, readers: bool = True, inner: int = 8, norms: bool = True, sweeps: int = 1) -> Record:
    """Fit again, in closed form, every map that writes to the stream or reads it after the first cut.

    Dense stream s and cut stream c, from the same text, go through the sublayers side by side. At each kept sublayer
    with something cut before it or right after it:

        readers (x = its input in the cut model, x* in the dense one, W* = the dense model's map):
            D = argmin sum |W* x* - W x - D x|^2 + ridge |D|^2                                 W_read <- W_read + D
        writer (a = its input in the cut model, y = W a; s* = the dense stream just before the next kept sublayer):
            D = argmin sum |s* - c - y - D a|^2 / mean(s*^2) + ridge |D|^2                     W_write <- W_write + D

        inner maps V on which y depends linearly (``up_proj``, ``v_proj``):
            E = argmin sum |s* - c - y(V + E)|^2 / mean(s*^2), and the writer once more                    V <- V + E

    so a writer before a cut takes over what it can of the units that follow. The inner maps are solved by at most
    ``inner`` steps of conjugate gradients, which stop where rows held out gain no more. Biases of writers and readers,
    where there are any, are fitted with them; a norm that writes (Gemma 2, OLMo 2) is fitted channel by channel, and
    so, with ``norms``, is the last norm of the model. Padding does not count. The ridge of each map is the one that
    removes most squared error on rows held out; maps that remove none stay. Sublayers without a single writer (mixtures
    of experts) keep their weights, and the record says so. ``sweeps`` goes over all of it again.

    Costs about three forwards a sweep and one sum of outer products per map; memory does not grow with the text.
    """
    if sweeps < 1:
        raise OptionError(f"refit:sweeps must be at least 1, not {sweeps}")
    if inner < 0:
        raise OptionError(f"refit:inner must be at least 0, not {inner}")
    found: list[Record] = []
    for sweep in range(sweeps):
        made = _sweep(repair, _Refit(readers, inner), "refit" if sweeps == 1 else f"refit, sweep {sweep + 1}", norms)
        found += [{**record, "sweep": sweep + 1} if sweeps > 1 else record for record in made]
    return {"maps": found}


def linear(repair: Repair) -> Record:
    """Fuse a square map into the writer before each cut, by least squares.

    With y (D,) the writer's update in the cut model, c the stream before it and s* the dense stream after the cut:
    ``T = argmin sum |T y - (s* - c)|^2``, a ridge towards the identity, ``W <- T W`` and ``b <- T b``. A cut with
    nothing before it is left alone. Source: ReplaceMe, eq. for the linear transform, here for any number of cuts.
    """
    return {"maps": _sweep(repair, _Linear(), "linear", False)}


class _Refit:
    """Which maps ``refit`` fits, and on what."""

    def __init__(self, readers: bool, inner: int) -> None:
        self.readers, self.inner = readers, inner

    def wants(self, apart: bool, before_cut: bool) -> bool:
        return apart or before_cut

    def features(self, block: nn.Module, writer: Writer, seen: list[Seen]) -> Tensor:
        _, module, given, _ = next(item for item in reversed(seen) if item[0] == writer.path)
        if writer.diagonal:
            return writer.scale * _basis(module, given)
        return writer.scale * (_with_one(given) if bias_of(module) is not None else given)

    def apply(self, module: nn.Module, writer: Writer, fit: Fit) -> None:
        _add(module, fit)


class _Linear(_Refit):
    """The same for ``linear``: the features are the update itself."""

    def __init__(self) -> None:
        super().__init__(readers=False, inner=0)

    def wants(self, apart: bool, before_cut: bool) -> bool:
        return before_cut

    def features(self, block: nn.Module, writer: Writer, seen: list[Seen]) -> Tensor:
        _, module, given, _ = next(item for item in reversed(seen) if item[0] == writer.path)
        # What it made is made again: Falcon's code adds another sublayer's update to that very tensor.
        return writer.scale * (_basis if writer.diagonal else mapped)(module, given)

    def apply(self, module: nn.Module, writer: Writer, fit: Fit) -> None:
        if writer.diagonal:
            return super().apply(module, writer, fit)
        assert fit.map is not None
        set_weight(module, weight_of(module).double() + fit.map @ weight_of(module).double())
        if (bias := bias_of(module)) is not None:
            set_bias(module, bias.double() + fit.map @ bias.double())


@torch.no_grad()
def _sweep(repair: Repair, way: _Refit, what: str, norms: bool) -> list[Record]:
    """Go through all sublayers once, fitting what is to be fitted on the way."""
    plan = steps(repair.teacher, repair.model)
    if all(step.at is not None for step in plan):
        return []
    kept = [number for number, step in enumerate(plan) if step.at is not None]
    found = ends(repair.model)
    both = pair(repair.teacher, repair.model, repair.data, repair.held, repair.memory)
    records: list[Record] = []
    try:
        apart = False  # whether the two streams differ by now
        for count, number in enumerate(kept):
            following = kept[count + 1] if count + 1 < len(kept) else len(plan)
            both.dense.until(number)
            both.cut.reach(plan[number].at)
            apart = apart or number > count
            own = _ends_of(found, plan[number])
            wanted = own is not None and way.wants(apart, following > number + 1)
            if own is not None and wanted and apart and way.readers:
                records += _fit_readers(both, plan[number], own)
            both.dense.until(following)
            if own is not None and wanted:
                records += _fit_writer(both, plan[number], own, way)
                if way.inner and records[-1].get("gain", 0.0) >= WORTH:
                    inner = [fit_inner(both, own, path, _unit(plan[number]), way.inner) for path in own.inner]
                    records += inner
                    if any(record.get("gain", 0.0) >= WORTH for record in inner):
                        records += _fit_writer(both, plan[number], own, way)
            elif own is None and (apart or following > number + 1):
                records.append({"unit": str(plan[number].block), "kept": "its sublayers cannot be told apart"})
            both.cut.advance()
            if repair.show is not None:
                repair.show(what, float(count + 1), float(len(kept)))
        both.cut.reach(len(repair.model.layout.blocks))
        if norms and apart:
            records += _fit_last_norm(both, repair)
    finally:
        both.close()
    return records


def _ends_of(found: list[tuple[Ends, ...]], step: Step) -> Ends | None:
    assert step.at is not None
    return next((one for one in found[step.at] if one.sublayer.name == step.name), None)


def _unit(step: Step) -> str:
    return f"{step.block}.{step.name}"


def _fit_readers(both: Pair, step: Step, own: Ends) -> list[Record]:
    """Fit every linear map that is given the sublayer's input to what the dense one makes of the dense input."""
    normals: dict[str, Normal] = {}
    for batch, held in batches(both):
        x, target = (both.real(batch, side.given(batch)) for side in (both.cut, both.dense))
        for path in own.readers:
            mine, dense = (side.block.get_submodule(path) for side in (both.cut, both.dense))
            residual = mapped(dense, target).float() - mapped(mine, x).float()
            features = _with_one(x) if bias_of(mine) is not None else x
            if path not in normals:
                normals[path] = Normal(residual.shape[1], features.shape[1], x.device)
            normals[path].add(held, features, residual)
    records = []
    for path, normal in normals.items():
        fit, module = normal.solve(f"the input of {_unit(step)}"), both.cut.block.get_submodule(path)
        _add(module, fit)
        records.append({**_said(step, "reader", fit), "path": path})
    return records


def _add(module: nn.Module, fit: Fit) -> None:
    """Add a fitted map to a weight and, from its last column, to the bias."""
    if fit.map is not None:
        inputs = weight_of(module).shape[-1]
        set_weight(module, weight_of(module).double() + fit.map[..., :inputs])
        if (bias := bias_of(module)) is not None and fit.map.dim() == 2:
            set_bias(module, bias.double() + fit.map[:, inputs])


def _fit_writer(both: Pair, step: Step, own: Ends, way: _Refit) -> list[Record]:
    if own.writer is None:
        return [{"unit": _unit(step), "kept": own.reason}]
    normal: Normal | None = None
    for batch, held in batches(both):
        after, seen = both.cut.ahead(batch)
        residual = both.missing(batch, after)
        features = both.real(batch, way.features(both.cut.block, own.writer, seen)).float() * both.weight(batch)
        normal = normal or Normal(residual.shape[1], features.shape[1], residual.device, diagonal=own.writer.diagonal)
        normal.add(held, features, residual)
    assert normal is not None
    fit = normal.solve(f"the update of {_unit(step)}")
    if fit.map is not None:
        way.apply(both.cut.block.get_submodule(own.writer.path), own.writer, fit)
    return [_said(step, "writer", fit)]


def _said(step: Step, role: str, fit: Fit) -> Record:
    record: Record = {"unit": _unit(step), "map": role}
    if fit.map is None:
        return {**record, "kept": "no ridge removes error on the rows held out"}
    return {**record, "ridge": fit.ridge, "gain": round(fit.gain, 5)}


def _fit_last_norm(both: Pair, repair: Repair) -> list[Record]:
    """Fit the norm after the last block, channel by channel, to what the dense one gives."""
    path = last_norm(repair.model)
    if path is None:
        return []
    norm, dense = (model.net.get_submodule(path) for model in (repair.model, repair.teacher))
    normal: Normal | None = None
    for batch, held in batches(both):
        stream = both.real(batch, both.cut.stream(batch))
        target = dense(both.real(batch, both.dense.stream(batch))).float()
        normal = normal or Normal(target.shape[1], target.shape[1], target.device, diagonal=True)
        normal.add(held, _basis(norm, stream).float(), target - norm(stream).float())
    assert normal is not None
    fit = normal.solve("the last norm")
    if fit.map is not None:
        set_weight(norm, weight_of(norm).double() + fit.map)
    return [{**_said(Step(0, "", 0), "norm", fit), "unit": path}]


@torch.no_grad()
def last_norm(model: Model) -> str | None:
    """The path of the norm that takes the stream after the last block; None where there is none with a weight."""
    modules = blocks_of(model.net, model.layout)
    arities = [block.arity for block in model.layout.blocks]
    entry = record(model.net, modules, arities, torch.zeros((1, 3), dtype=torch.long, device=model.device), None).stream
    stream = torch.randn(entry.shape, generator=torch.Generator().manual_seed(7)).to(entry)
    with watched(model.net) as seen:
        head(model.net, modules, arities, stream)
    for path, module, given, made in seen:
        weight = getattr(module, "weight", None)
        if path.startswith(model.layout.path + ".") or not isinstance(weight, nn.Parameter) or matrix(module):
            continue
        if same(given, stream) and weight.shape == stream.shape[-1:] and torch.equal(module(stream), made):
            return path
    return None


def _basis(norm: nn.Module, given: Tensor) -> Tensor:
    """What a norm gives per unit of its weight: ``f(w + 1) - f(w)``, which is right for ``w x`` and ``(1 + w) x``."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    more: Tensor = functional_call(norm, {"weight": weight + 1}, (given,)) - norm(given)
    return more


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[..., :1])], -1)
