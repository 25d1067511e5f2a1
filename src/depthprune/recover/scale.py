"""Magnitude compensation: what comes before a cut is made as large as the dense stream is after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from depthprune.discover import muted
from depthprune.dist import total
from depthprune.errors import LayoutError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.offload import hold
from depthprune.record import Recording, close, forwards, record
from depthprune.recover.closed import last_norm
from depthprune.recover.pair import Side, pair, steps
from depthprune.recover.repair import Repair
from depthprune.writers import bias_of, ends, matrix, set_bias, set_weight, weight_of, written


@torch.no_grad()
def scale(repair: Repair) -> dict[str, Any]:
    """Multiply all that is written to the stream before a cut by the factor by which the cut units made it grow.

    For every run of cut units, with the dense stream s before and t after it,

        alpha = mean over tokens of |t| / |s|            (L2 norms)

    and the embeddings and all writers before the run are multiplied by alpha, which is the stream times alpha, as every
    reader normalises it. Tied embeddings also are the head: the last norm is divided by what they were multiplied by,
    so logits keep their size.

    Raises ``LayoutError`` where the stream cannot be scaled by its writers: some have no single map, the embeddings are
    not all there is in it before the first block, a sublayer reads it as it is (OLMo 2's, which have no norm before
    them), or the head is tied and no last norm can undo it.
    Source: Prune&Comp, magnitude compensation, fused offline.
    """
    model, teacher = repair.model, repair.teacher
    plan = steps(teacher, model)
    before = _norms(repair)
    runs: list[tuple[int, float]] = []  # the step after a run, and its factor
    number = 0
    while number < len(plan):
        if plan[number].at is None:
            first = number
            while number < len(plan) and plan[number].at is None:
                number += 1
            grown = before[number] / before[first]
            ratio = total(grown.sum()) / total(torch.full_like(grown[:1], len(grown)))[0]
            if not bool(ratio.isfinite()):
                raise LayoutError("scale: streams are not finite (NaN or infinite) on this text")
            runs.append((number, float(ratio)))
        number += 1
    if not runs:
        return {"factors": []}
    found = ends(model)
    outer = 1.0
    for _, factor in runs:
        outer *= factor
    embeddings = _embeddings(model)
    names = [] if model.net.get_output_embeddings() is None else [model.net.get_output_embeddings()]
    tied = any(head.weight is embedding.weight for head in names for embedding in embeddings)
    norm = last_norm(model)
    if tied and norm is None:
        raise LayoutError("scale: the embeddings are also the head, and no last norm can undo the factor in it")
    start = _entry(model)
    noise = torch.randn(start.stream.shape, generator=torch.Generator().manual_seed(10)).to(start.stream)
    memo: dict[int, nn.Parameter] = {}
    for embedding in embeddings:
        old = embedding.weight
        memo.setdefault(id(old), nn.Parameter((old.double() * outer).to(old), requires_grad=old.requires_grad))
        embedding.weight = memo[id(old)]
    for head in names:
        head.weight = memo.get(id(head.weight), head.weight)
    if not close(_entry(model).stream, outer * start.stream):
        raise LayoutError("scale: the stream before the first block holds more than embeddings, so it cannot be scaled")
    if tied:
        assert norm is not None
        _scale(model.net.get_submodule(norm), 1 / outer)
    blocks = blocks_of(model.net, model.layout)
    for place, step in enumerate(plan):
        later = 1.0
        for after, factor in runs:
            later *= factor if after > place else 1.0
        if step.at is None or later == 1.0:
            continue
        own = next((one for one in found[step.at] if one.sublayer.name == step.name), None)
        if own is None or own.writer is None:
            raise LayoutError(f"scale: nothing that is scaled alone writes the update of {step.block}.{step.name}")
        writer = blocks[step.at].get_submodule(own.writer.path)
        others = [s for s in model.layout.blocks[step.at].sublayers if s.name != step.name]
        with hold(blocks[step.at]), forwards(muted(blocks[step.at], tuple(others))):
            once, twice = (
                written(start.calls[step.at], blocks[step.at], times * (start.stream + noise), own.writer)
                for times in (1, 2)
            )
        if not close(twice, once):
            raise LayoutError(f"scale: {step.block}.{step.name} reads the stream as it is, so its size matters to it")
        with hold(writer):
            _scale(writer, later)
    return {"factors": [{"before": place, "factor": round(factor, 6)} for place, factor in runs]}


def _norms(repair: Repair) -> list[Tensor]:
    """The size of the dense stream of every real token, before each step and after the last."""
    both = pair(repair.teacher, repair.model, repair.data, repair.held, repair.memory)
    try:
        sizes = [_sizes(both.dense, both.batches)]
        while both.dense.at < len(repair.teacher.layout.blocks):
            both.dense.advance()
            sizes.append(_sizes(both.dense, both.batches))
            if repair.show is not None:
                repair.show("scale", float(both.dense.at), float(len(repair.teacher.layout.blocks)))
    finally:
        both.close()
    return sizes


def _sizes(side: Side, batches: int) -> Tensor:
    return torch.cat([side.stream(b).double().norm(dim=-1)[side.masks[b]] for b in range(batches)])


def _embeddings(model: Model) -> list[nn.Embedding]:
    """The embeddings outside of the blocks that are as wide as the stream."""
    width = model.net.get_input_embeddings().weight.shape[1]
    inside = {id(module) for module in model.net.get_submodule(model.layout.path).modules()}
    return [
        module
        for module in model.net.modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == width and id(module) not in inside
    ]


def _entry(model: Model) -> Recording:
    """The stream before the first block on a probe, and how each block is called."""
    tokens = torch.randint(model.vocabulary, (2, 6), generator=torch.Generator().manual_seed(8)).to(model.device)
    arities = [block.arity for block in model.layout.blocks]
    return record(model.net, blocks_of(model.net, model.layout), arities, tokens, None)


def _scale(module: nn.Module, factor: float) -> None:
    """Make all that a linear map or a norm gives larger by a factor."""
    weight, bias = weight_of(module), bias_of(module)
    if matrix(module):
        set_weight(module, weight.double() * factor)
    else:
        probe = torch.randn(1, len(weight), generator=torch.Generator().manual_seed(9)).to(weight)
        none, one, two = (
            functional_call(module, {"weight": torch.full_like(weight, value)}, (probe,)).double()
            for value in (0, 1, 2)
        )
        plain = none if bias is None else none - bias.double()
        plus = (plain / (two - one)).mean().round()  # Gemma's norms multiply by 1 + weight, others by the weight
        set_weight(module, (weight.double() + plus) * factor - plus)
    if bias is not None:
        set_bias(module, bias.double() * factor)
