"""Filling stand-ins: what was put in place of dropped units, at zero, learns to do what the units did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthprune.dist import total, world
from depthprune.errors import DepthpruneError, OptionError
from depthprune.offload import device_of, numbers
from depthprune.recover.normal import Normal
from depthprune.recover.pair import Pair, batches, pair, steps
from depthprune.recover.repair import Repair
from depthprune.recover.train import full
from depthprune.standin import StandIn, stand_ins
from depthprune.units import Unit
from depthprune.writers import bias_of, ends, set_bias, set_weight

CHUNK = 4096  # tokens of one step of ``mse``


@torch.no_grad()
def mean(repair: Repair) -> dict[str, Any]:
    """Set every bias to the mean update of its unit over the tokens of the text, in the dense model: no training.

    ``b_u = mean_t (s_after_u(t) - s_before_u(t))``; units that share a bias add up, and a map that had a bias keeps it.
    Raises ``OptionError`` where the cut has no stand-ins, or low-rank maps, which have no such value.
    Source: A deeper look at depth pruning of LLMs, the emulated update.
    """
    ins = _ins(repair)
    if any(one.rank for one in ins):
        raise OptionError("mean fills biases; a low-rank stand-in is filled by lstsq, mse, lm or distill")
    place, both = _places(repair), _pair(repair)
    sums: dict[tuple[str, ...], Tensor] = {}
    try:
        for done, one in enumerate(sorted(ins, key=lambda one: place(one.unit))):
            first, last = place(one.unit)
            both.dense.until(first)
            before = _sum(both)
            both.dense.until(last)
            value = (_sum(both) - before) / one.scale
            if not bool(value.isfinite().all()):
                raise DepthpruneError(f"the update of {one.unit} is not finite (NaN or infinite) on this text")
            sums[one.names] = sums.get(one.names, torch.zeros_like(value)) + value
            _show(repair, "mean", done + 1, len(ins))
    finally:
        both.close()
    for one in ins:
        _fill(repair, one, (sums[one.names],))
    return {"filled": [str(one.unit) for one in ins]}


def _sum(both: Pair) -> Tensor:
    """The mean of the dense stream (D,) over all real tokens."""
    streams = (both.dense.stream(batch)[both.dense.masks[batch]] for batch, _ in batches(both))
    parts = [(stream.sum(0, dtype=torch.float64), len(stream)) for stream in streams]
    count = torch.tensor([sum(length for _, length in parts)], dtype=torch.float64, device=parts[0][0].device)
    found: Tensor = total(torch.stack([part for part, _ in parts]).sum(0)) / total(count)
    return found


@torch.no_grad()
def lstsq(repair: Repair) -> dict[str, Any]:
    """Fill stand-ins by least squares, in the order of execution: the best map of its rank, in closed form.

    With x what the stand-in is given in the cut model, c the stream after it at zero, s* the dense one after the unit:
    ``min sum |s* - c - B A x|^2 / mean(s*^2) + ridge |B A|^2`` over maps of rank r. With M the solution of full rank
    and U the r first eigenvectors of ``M (sum x x^T + ridge) M^T``, that is ``B A = U U^T M``
    (reduced-rank regression). A bias becomes the weighted mean of s* - c. The ridge is chosen on rows held out.
    """
    records: list[dict[str, Any]] = []
    for one, found in _positions(repair, "lstsq"):
        normal: Normal | None = None
        for batch, held in batches(found.both):
            missing, x = found.after_unit(batch) - found.after(batch), found.given(batch)
            weight = found.both.weight(batch)
            normal = normal or Normal(missing.shape[1], x.shape[1], missing.device)
            normal.add(held, x * weight, missing * weight)
        assert normal is not None
        fit = normal.solve(f"the update of {one.unit}", rank=one.rank)
        if fit.map is None:
            records.append({"unit": str(one.unit), "kept": "no ridge removes error on the rows held out"})
            continue
        if one.rank:
            u, size, v = torch.linalg.svd(fit.map, full_matrices=False)
            root = size[: one.rank].sqrt()
            _fill(repair, one, (root[:, None] * v[: one.rank], u[:, : one.rank] * root / one.scale))
        else:
            _fill(repair, one, (fit.map[:, 0] / one.scale,))
        records.append({"unit": str(one.unit), "ridge": fit.ridge, "gain": round(fit.gain, 5)})
    return {"maps": records}


def mse(repair: Repair, *, epochs: int = 4, rate: float = 1e-3) -> dict[str, Any]:
    """Train every stand-in to its unit's update in the dense model, by squared error, block by block.

    ``mean |B A x - (s_after - s_before)|^2`` with x what it is given in the cut model; Adam, chunks of 4,096 tokens in
    random order; the epoch that is best on rows held out is kept.
    Source: A deeper look at depth pruning of LLMs, low-rank adapters trained by MSE.
    """
    if epochs < 1 or rate <= 0:
        raise OptionError(f"mse:epochs={epochs},rate={rate}: epochs must be at least 1 and the rate above 0")
    if world() > 1:
        raise OptionError("mse trains in one process; under torchrun fill stand-ins by mean, lstsq, lm or distill")
    records: list[dict[str, Any]] = []
    for one, found in _positions(repair, "mse"):
        x: dict[int, list[Tensor]] = {0: [], 1: []}
        y: dict[int, list[Tensor]] = {0: [], 1: []}
        for batch, held in batches(found.both):
            x[held].append(found.given(batch))
            y[held].append(found.after_unit(batch) - found.before_unit(batch))
        weights = [numbers(repair.model.net.get_parameter(name)).float().clone() for name in one.names]
        weights = [torch.zeros_like(w) if one.rank == 0 else w for w in weights]
        kept, gain = _descend(one, [w.requires_grad_(True) for w in weights], x, y, epochs, rate, repair.seed)
        if kept:
            _fill(repair, one, tuple(kept))
            records.append({"unit": str(one.unit), "gain": round(gain, 5)})
        else:
            records.append({"unit": str(one.unit), "kept": "no epoch removes error on the rows held out"})
    return {"maps": records, "epochs": epochs}


def lm(repair: Repair, *, tokens: str = "2M", rate: float = 1e-3, batch: int = 16) -> dict[str, Any]:
    """Train the stand-ins alone by the loss of the language model; all else stays. As ``full:only=stand-ins``."""
    return full(repair, tokens=tokens, rate=rate, batch=batch, only="stand-ins")


def _descend(
    one: StandIn,
    weights: list[Tensor],
    x: dict[int, list[Tensor]],
    y: dict[int, list[Tensor]],
    epochs: int,
    rate: float,
    seed: int,
) -> tuple[list[Tensor], float]:
    """The weights of the best epoch, and the share of the held-out error that they remove; none if none does."""
    (x0, y0), (x1, y1) = ((torch.cat(x[held]), torch.cat(y[held])) for held in (0, 1))
    optimizer, order = torch.optim.Adam(weights, rate), torch.Generator().manual_seed(seed)
    start = best = float(y1.square().mean())
    kept: list[Tensor] = []
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.randperm(len(x0), generator=order).split(CHUNK):  # type: ignore[no-untyped-call]
                some = chosen.to(x0.device)
                error = (_made(one, weights, x0[some]) - y0[some]).square().mean()
                optimizer.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            now = float((_made(one, weights, x1) - y1).detach().square().mean())
            if now < best:
                best, kept = now, [weight.detach().clone() for weight in weights]
    return kept, 1 - best / max(start, 1e-30)


def _made(one: StandIn, weights: list[Tensor], x: Tensor) -> Tensor:
    return one.scale * (x @ weights[0].T @ weights[1].T if one.rank else x * weights[0])


def _ins(repair: Repair) -> tuple[StandIn, ...]:
    ins = stand_ins(repair.model)
    if not ins:
        raise OptionError("this cut has no stand-ins to fill: make it with `drop --stand-in bias` or `lowrank:16`")
    return ins


def _pair(repair: Repair) -> Pair:
    return pair(repair.teacher, repair.model, repair.data, repair.held, repair.memory)


def _places(repair: Repair) -> Callable[[Unit], tuple[int, int]]:
    """Where a unit begins and ends, in steps of the dense model."""
    order = [(step.block, step.name) for step in steps(repair.teacher, repair.model)]

    def place(unit: Unit) -> tuple[int, int]:
        own = [number for number, (block, _) in enumerate(order) if block == unit.block]
        own = [number for number in own if unit.sublayer in ("", order[number][1])]
        return own[0], own[-1] + 1

    return place


@dataclass(frozen=True, eq=False)
class _Found:
    """Both models where a stand-in is: the dense side after its unit, the cut side before what runs the stand-in.

    Tensors are (N, D) in float32, of the real tokens of a batch.
    """

    both: Pair
    part: str  # the module that holds it, in its block
    idle: bool  # whether the sublayer that comes next is not what runs it
    folded: bool
    before: list[Any]

    def _flat(self, batch: int, tensor: Tensor) -> Tensor:
        return self.both.real(batch, tensor).float()

    def after_unit(self, batch: int) -> Tensor:
        """The dense stream after the unit."""
        return self._flat(batch, self.both.dense.stream(batch))

    def before_unit(self, batch: int) -> Tensor:
        """The dense stream before the unit."""
        return self._flat(batch, self.both.store.get(self.before[batch]))

    def after(self, batch: int) -> Tensor:
        """The cut stream after the stand-in."""
        return self._flat(batch, self.both.cut.ahead(batch, idle=self.idle)[0])

    def given(self, batch: int) -> Tensor:
        """What the stand-in is given; for a bias, ones (N, 1)."""
        if self.folded:
            return self._flat(batch, torch.ones_like(self.both.cut.masks[batch], dtype=torch.float32))
        seen = self.both.cut.ahead(batch, idle=self.idle)[1]
        return self._flat(batch, next(x for path, _, x, _ in reversed(seen) if path == self.part))


@torch.no_grad()
def _positions(repair: Repair, what: str) -> Iterator[tuple[StandIn, _Found]]:
    """Every stand-in in the order of execution, at zero effect, with both models where it is."""
    ins, place, both = _ins(repair), _places(repair), _pair(repair)
    cut, dense = both.cut, repair.teacher.layout
    ends_of = ends(repair.model)
    ordered = sorted(ins, key=lambda one: place(one.unit))
    until = {one.names: place(one.unit)[1] for one in ordered}  # units that share a bias: where the last one ends
    try:
        for done, one in enumerate(ordered):
            if one.names in [other.names for other in ordered[:done]]:
                continue
            number, part = _part(repair, one)
            cut.reach(number)
            hosts = [index for index, own in enumerate(ends_of[number]) if own.writer and own.writer.path == part]
            if hosts:
                last = hosts[0]
            else:  # a Skip: it runs with the kept sublayer before it, or with none
                names = [s.name for s in dense.blocks[one.unit.block].sublayers]
                kept = [s.name for s in repair.model.layout.blocks[number].sublayers]
                start = names.index(one.unit.sublayer) if one.unit.sublayer else 0
                last = sum(name in kept for name in names[:start]) - 1
            while cut.at == number and cut.done < last:
                cut.advance()
            both.dense.until(place(one.unit)[0])
            before = [both.store.put(both.dense.stream(batch)) for batch, _ in batches(both)]
            both.dense.until(until[one.names])
            _empty(repair, one)
            idle = last < 0 and bool(repair.model.layout.blocks[number].sublayers)
            yield one, _Found(both, part, idle, one.rank == 0, before)
            for handle in before:
                both.store.drop(handle)
            _show(repair, what, done + 1, len(ordered))
    finally:
        both.close()


def _part(repair: Repair, one: StandIn) -> tuple[int, str]:
    """The block of the cut model that holds a stand-in, and the module in it."""
    number, _, rest = one.names[0][len(repair.model.layout.path) + 1 :].partition(".")
    return int(number), rest.rpartition(".")[0] if one.rank == 0 else rest.rpartition(".")[0].rpartition(".")[0]


def _own(repair: Repair, one: StandIn) -> Tensor | None:
    """The bias that a map has in the dense model, to which a stand-in is added."""
    number, part = _part(repair, one)
    old = next((step.block for step in steps(repair.teacher, repair.model) if step.at == number), None)
    if old is None or one.rank:
        return None
    try:
        return bias_of(repair.teacher.net.get_submodule(f"{repair.model.layout.path}.{old}.{part}"))
    except AttributeError:
        return None


def _empty(repair: Repair, one: StandIn) -> None:
    """Put a stand-in back to zero effect: a bias to what it is in the dense model, the second half of a map to zero."""
    old = repair.model.net.get_parameter(one.names[-1])
    nothing = torch.zeros(old.shape, dtype=old.dtype, device=device_of(old))
    if one.rank:
        set_weight(repair.model.net.get_submodule(one.names[-1].rpartition(".")[0]), nothing)
    else:
        _fill(repair, one, (nothing,))


def _fill(repair: Repair, one: StandIn, values: tuple[Tensor, ...]) -> None:
    """Give a stand-in its values: (bias,) or (down, up)."""
    modules = [repair.model.net.get_submodule(name.rpartition(".")[0]) for name in one.names]
    if one.rank:
        for module, value in zip(modules, values, strict=True):
            set_weight(module, value)
    else:
        own = _own(repair, one)
        set_bias(modules[0], values[0] if own is None else values[0].double() + own.double())


def _show(repair: Repair, what: str, done: int, count: int) -> None:
    if repair.show is not None:
        repair.show(what, float(done), float(count))
