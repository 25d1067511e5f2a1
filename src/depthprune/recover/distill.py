"""Recovery by distillation: the cut model learns to say what the dense model says, all of it, not only the next token.

By default the dense model runs beside the one that is trained. With ``top`` and ``cache`` its answers are computed once
and kept: a few logits per position.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from depthprune.errors import OptionError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.recover.arguments import schedule
from depthprune.recover.feed import IGNORED, Batch, labels, whole
from depthprune.recover.loop import by_parts, cross_entropy, forward, targets
from depthprune.recover.pair import kept_blocks
from depthprune.recover.repair import Repair
from depthprune.recover.settings import Settings, settled, takes
from depthprune.recover.train import chosen, train

Known = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Distill(Settings):
    """What ``distill`` takes besides."""

    temperature: float = 1.0
    hard: float = 0.0
    features: float = 0.0
    top: int = 0
    cache: bool = False
    only: str = "all"


@takes(Distill)
def distill(repair: Repair, **options: Any) -> dict[str, Any]:
    """Train all weights so that the model predicts what the dense model predicts.

    The loss of a prediction is ``t^2 KL(p || q) - hard log q_1(next) + features F``. Here p and q are the dense and the
    cut model's softmax of their logits divided by the ``temperature`` t, and q_1 that with t = 1. F is the mean, over
    blocks, of the squared distance between the stream that enters a block and the dense model's stream before the same
    block, over that stream's mean square.

    With ``top`` = k, p and q are those of the dense model's k most likely tokens and of one bucket for all others; 0
    takes all. With ``cache`` too, these are computed once before training, for every row that will be used, and kept in
    float16: in a file where the repair has a folder, else in memory. ``only=stand-ins`` trains those alone. The other
    options are those of ``Settings``; the held-out loss is that of the next token.
    Raises ``OptionError`` for options out of range, ``PlanError`` where the blocks cannot be told apart.
    """
    settings = settled(Distill, {}, options)
    repair = dataclasses.replace(repair, data=whole(repair.data), held=whole(repair.held))
    student, teacher = repair.model, repair.teacher
    names = chosen(student, settings.only)
    if not settings.temperature > 0 or settings.hard < 0 or settings.features < 0:
        raise OptionError("distill needs a temperature above 0, and hard and features of at least 0")
    if not 0 <= settings.top < teacher.vocabulary:
        raise OptionError(f"top is from 0 to {teacher.vocabulary - 1}, below the vocabulary, not {settings.top}")
    if settings.cache and (not settings.top or settings.features):
        raise OptionError("cache=true keeps the largest logits: set top, and features=0")
    kept = kept_blocks(teacher, student) if settings.features else []
    known = _cached(repair, settings) if settings.cache else None
    return train(repair, partial(_loss, student, teacher, settings, kept, known), settings, names)


def _loss(
    student: Model,
    teacher: Model,
    settings: Distill,
    kept: Sequence[int],
    known: Known | None,
    net: nn.Module,
    batch: Batch,
) -> Tensor:
    """The loss of a batch, summed over the predictions that count."""
    device, after = batch["input_ids"].device, targets(batch)
    own = blocks_of(getattr(net, "module", net), student.layout) if kept else []
    dense: list[Tensor] = []
    answers: tuple[Tensor, ...]
    if known is not None:
        answers = known(batch)
    else:
        logits, dense = _ask(teacher, batch, kept)
        answers = _largest(logits, settings) if settings.top else (logits.to(device),)
    with _streams(own) as streams:
        said = forward(net, batch)
    each = partial(_divergence if len(answers) == 1 else _divergence_top, settings)
    total = by_parts(each, said, after, *(value.to(device) for value in answers))
    if kept:
        real = batch["attention_mask"]
        gaps = [_gap(mine[real], other.to(device)[real]) for mine, other in zip(streams, dense, strict=True)]
        total = total + settings.features * torch.stack(gaps).mean() * (after != IGNORED).sum()
    return total


def _divergence(settings: Distill, said: Tensor, target: Tensor, meant: Tensor) -> Tensor:
    """``t^2 KL(p || q)`` of all tokens (N, V), and the cross entropy, over the predictions that count."""
    t, counts = settings.temperature, target != IGNORED
    p, q = (meant.float() / t).log_softmax(-1), (said.float() / t).log_softmax(-1)
    total = t * t * (p.exp() * (p - q)).sum(-1)[counts].sum()
    return total + settings.hard * cross_entropy(said, target) if settings.hard else total


def _divergence_top(settings: Distill, said: Tensor, target: Tensor, meant: Tensor, tokens: Tensor) -> Tensor:
    """The same of the k tokens (N, k) whose ``log p`` is ``meant``, and of one bucket for all others."""
    t, counts, tokens = settings.temperature, target != IGNORED, tokens.long()
    p, scaled = meant.float(), said.float() / t
    whole = scaled.logsumexp(-1, keepdim=True)
    q = scaled.gather(-1, tokens) - whole
    q_rest = scaled.scatter(-1, tokens, -torch.inf).logsumexp(-1) - whole.squeeze(-1)
    p_rest = torch.log1p(-p.exp().sum(-1).clamp(max=1 - 1e-6))
    each = (p.exp() * (p - q)).sum(-1) + p_rest.exp() * (p_rest - q_rest)
    total = t * t * each[counts].sum()
    return total + settings.hard * cross_entropy(said, target) if settings.hard else total


def _gap(mine: Tensor, other: Tensor) -> Tensor:
    mine, other = mine.float(), other.float()
    return (mine - other).square().mean() / other.square().mean().clamp(min=1e-12)


@torch.no_grad()
def _ask(teacher: Model, batch: Batch, kept: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The dense model's logits, in its own precision, and its streams before some blocks."""
    there = {key: value.to(teacher.device) for key, value in batch.items()}
    every = blocks_of(teacher.net, teacher.layout)
    with torch.autocast(teacher.device.type, enabled=False), _streams([every[index] for index in kept]) as streams:
        logits = forward(teacher.net, there)
    return logits, list(streams)


def _largest(logits: Tensor, settings: Distill) -> tuple[Tensor, Tensor]:
    """``log p`` (B, T, k) at the temperature, of the most likely tokens, and which these are; row after row."""
    values, tokens = [], []
    for row in logits:
        scaled = row.float() / settings.temperature
        best = scaled.topk(settings.top, dim=-1)
        values.append(best.values - scaled.logsumexp(-1, keepdim=True))
        tokens.append(best.indices)
    return torch.stack(values), torch.stack(tokens)


@contextlib.contextmanager
def _streams(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what enters some blocks during one forward, in their order."""
    found: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cached(repair: Repair, settings: Distill) -> Known:
    """The dense model's largest logits on all rows that will be trained on, and how to look them up.

    Each process has its own.
    """
    teacher, data = repair.teacher, repair.data
    used = schedule(repair, settings, False)[2].order.unique()
    shape = (data.sequences, data.length, settings.top)
    record = {
        "data": data.digest, "model": teacher.reference.fingerprint, "rows": len(used), "shape": list(shape),
        "temperature": settings.temperature, "seed": repair.seed,
    }  # fmt: skip
    folder = None if repair.folder is None else repair.folder / f"teacher-{os.environ.get('RANK', '0')}"
    done = folder is not None and _read(folder / "record.json") == record
    values, tokens = _stores(folder, shape, new=not done)
    marked = labels(data)
    parts = () if done else used.split(max(1, 4096 // data.length))
    for number, rows in enumerate(parts, start=1):
        batch = {"input_ids": data.tokens[rows], "attention_mask": data.mask[rows], "labels": marked[rows]}
        best, which = _largest(_ask(teacher, batch, ())[0], settings)
        values[rows.numpy()], tokens[rows.numpy()] = best.half().cpu().numpy(), which.int().cpu().numpy()
        if repair.show is not None:
            repair.show("asking the dense model", float(number), float(len(parts)))
    if folder is not None and not done:
        (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")

    def known(batch: Batch) -> tuple[Tensor, Tensor]:
        rows = batch["row"].cpu().numpy()
        return torch.from_numpy(values[rows]), torch.from_numpy(tokens[rows])

    return known


def _stores(folder: Path | None, shape: tuple[int, ...], *, new: bool) -> tuple[Any, Any]:
    """Where the logits and their tokens are kept: arrays in memory, or files that are read as if they were."""
    if folder is None:
        return np.empty(shape, np.float16), np.empty(shape, np.int32)
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").unlink(missing_ok=True)
    mode: Any = "w+" if new else "r"
    places = (("logits.npy", np.float16), ("tokens.npy", np.int32))
    values, tokens = (
        open_memmap(folder / name, mode=mode, dtype=dtype if new else None, shape=shape if new else None)
        for name, dtype in places
    )
    return values, tokens


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
