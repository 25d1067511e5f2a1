"""Least squares for a map inside a sublayer, on which the update depends linearly: conjugate gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from depthprune.dist import total
from depthprune.recover.pair import Pair, batches
from depthprune.writers import Ends, bias_of, set_weight, weight_of

LEAST = 2e-3  # the share of the held-out error that a step must remove for another to be made
TOKENS = 3 << 17  # to fit on at most: forwards and backwards cost more than sums, and early stopping needs fewer rows
DAMPING = 1e-2  # of the preconditioner, times the mean of its diagonal


@torch.no_grad()
def fit_inner(both: Pair, own: Ends, path: str, unit: str, most: int) -> dict[str, Any]:
    """Add to an inner map's weight (outputs, inputs) the E that removes most of what is missing in the stream.

    ``E = argmin sum |r - J E|^2 / mean(s*^2)`` with r = s* - c - y and J the linear dependence of the update y on the
    weight: J E is one forward of the sublayer with E for the weight, its transpose one backward. Solved by conjugate
    gradients on the normal equations, preconditioned by the inverse of the inputs' second moments; it stops where the
    error on rows held out falls by less than 0.2 % in a step, so the number of steps is the regularisation. What does
    not lower the held-out error when it is measured again is not kept.
    """
    writer = own.writer
    assert writer is not None
    module, writing = (both.cut.block.get_submodule(name) for name in (path, writer.path))
    weight, bias = weight_of(module).float(), bias_of(writing)
    put, get = both.store.put, both.store.get
    wide: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}

    def update(batch: int, given: Tensor) -> Tensor:
        """The weighted update (N, D) of real tokens with this weight, without biases."""
        made = both.cut.writes(batch, writer, path, given)
        made = writer.scale * (made if bias is None else made - bias).float()
        return both.real(batch, made) * both.weight(batch)

    def missing(batch: int) -> tuple[Tensor, Tensor]:
        """The weighted residual (N, D) of real tokens, and the map's inputs (N, K)."""
        after, seen = both.cut.ahead(batch)
        x = next(given for name, _, given, _ in reversed(seen) if name == path)
        return both.missing(batch, after), both.real(batch, x).float()

    def back() -> Tensor:
        """J^T r over the rows to fit on."""
        found = torch.zeros_like(weight)
        for batch, held in used:
            if not held:
                leaf = torch.zeros_like(weight).requires_grad_(True)
                with torch.enable_grad():
                    made = update(batch, leaf)
                    found += torch.autograd.grad(made, leaf, get(residuals[batch]))[0]
        return total(found)

    used = [(batch, held) for batch, held in batches(both) if held or batch * both.tokens < TOKENS]
    residuals, sums = {}, torch.zeros(2, **wide)
    moments = torch.zeros((weight.shape[1],) * 2, **wide)
    for batch, held in used:
        residual, x = missing(batch)
        residuals[batch] = put(residual)
        sums[held] += residual.square().sum(dtype=torch.float64)
        moments += 0 if held else x.T @ x
    moments = total(moments)
    moments += torch.diag((DAMPING * moments.diagonal().mean()).expand(len(moments)))
    factor, info = torch.linalg.cholesky_ex(moments)
    record: dict[str, Any] = {"unit": unit, "map": "inner", "path": path}
    if int(info):
        return {**record, "kept": "its inputs are all alike or not finite"}
    start = best = last = float(total(sums)[1])
    found = step = torch.zeros_like(weight)
    direction, slope, steps = torch.zeros_like(weight), 1.0, 0
    while steps < most:
        gradient = back()
        softened = torch.cholesky_solve(gradient.double().T, factor).T.float()
        before, slope = slope, float((gradient * softened).sum(dtype=torch.float64))
        direction = softened + (slope / before) * direction
        moved, bend = {}, torch.zeros(1, **wide)
        for batch, held in used:
            change = update(batch, direction)
            moved[batch] = put(change)
            bend += 0 if held else change.square().sum(dtype=torch.float64)
        curve = float(total(bend))
        if not curve > 0 or not math.isfinite(slope / curve):
            break
        length = slope / curve
        step, steps, now = step + length * direction, steps + 1, torch.zeros(1, **wide)
        for batch, held in used:
            residual = get(residuals[batch]) - length * get(moved[batch])
            for handle in (residuals[batch], moved[batch]):
                both.store.drop(handle)
            residuals[batch] = put(residual)
            now += residual.square().sum(dtype=torch.float64) if held else 0
        error = float(total(now))
        if error < best:
            best, found = error, step
        if not error < last * (1 - LEAST):
            break
        last = error
    for handle in residuals.values():
        both.store.drop(handle)
    record["steps"] = steps
    if not best < start:
        return {**record, "kept": "no step removes error on the rows held out"}
    old = weight_of(module)
    set_weight(module, weight + found)
    now = torch.zeros(1, **wide)
    for batch, held in used:
        now += missing(batch)[0].square().sum(dtype=torch.float64) if held else 0
    error = float(total(now))
    if not error < start:
        set_weight(module, old)
        return {**record, "kept": "in this type of numbers it removes no error on the rows held out"}
    return {**record, "gain": round(1 - error / start, 5)}
