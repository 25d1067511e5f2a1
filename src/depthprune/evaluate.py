"""Perplexity on text of any length, with a sliding window that predicts every token once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune import sources
from depthprune.data import Data, check_vocabulary, digest
from depthprune.errors import DataError, OptionError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.offload import hold, offloaded
from depthprune.oracle import Show
from depthprune.record import close, head, inputs, record, slices
from depthprune.rows import opening

LOGITS = 1 << 26  # numbers: logits of one forward at the most


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text: ``loss`` in nats per token, ``perplexity = exp(loss)``, over ``tokens``."""

    loss: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, eq=False)
class Windows:
    """A text cut in overlapping windows: tokens and mask (N, T), and which tokens each window is to predict."""

    data: Data
    scored: Tensor  # (N, T) bool
    stride: int


def windows(
    text: str | Sequence[str],
    tokenizer: Any,
    *,
    window: int = 512,
    stride: int | None = None,
    field: str = "text",
    limit: int | None = None,
) -> Windows:
    """Cut the text of files (or a list of documents) in windows that step by ``stride`` (default: the window).

    Every window starts with BOS where the tokenizer wants it; each token is predicted exactly once (but the very
    first of a text without BOS), in the first window that can, so that all windows but the first give at least
    ``window - stride`` tokens of context. The last may be shorter and is padded. ``limit`` keeps the first ones only.
    Raises ``DataError`` for text of fewer than two tokens, ``OptionError`` for a stride outside 1..window.
    """
    front = list(opening(tokenizer))
    room = window - len(front)
    most = room if front else room - 1  # without BOS the first token of a window is only read, so windows share one
    stride = most if stride is None or stride == window else stride
    if room < 2 or not 1 <= stride <= most:
        raise OptionError(f"a window of {window} tokens takes a stride from 1 to {most}, not {stride}")
    name, documents = _documents(text, field)
    ids = [token for document in documents for token in tokenizer(document, add_special_tokens=False)["input_ids"]]
    if len(ids) < 2:
        raise DataError(f"{name}: nothing to predict in {len(ids)} tokens; evaluation text needs at least 2")
    rows, scored, done = [], [], 0
    for start in range(0, len(ids), stride):
        stop = min(start + room, len(ids))
        if stop <= done:
            break
        row = front + ids[start:stop]
        fresh = [len(front) + start + offset >= len(front) + done for offset in range(stop - start)]
        rows.append(row)
        scored.append([False] * len(front) + fresh)
        done = stop
        if limit is not None and len(rows) == limit:
            break
    length = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    mask, wanted = torch.zeros(tokens.shape, dtype=torch.bool), torch.zeros(tokens.shape, dtype=torch.bool)
    for number, (row, flags) in enumerate(zip(rows, scored, strict=True)):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = True
        wanted[number, : len(row)] = torch.tensor(flags)
    wanted[:, 0] = False  # nothing comes before it
    return Windows(Data(tokens, mask, name, digest(tokens, mask), 0, ()), wanted, stride)


def _documents(text: str | Sequence[str], field: str) -> tuple[str, list[str]]:
    if not isinstance(text, str):
        return "texts", list(text)
    parts = sources.parse(text)
    documents = ["".join(document) for part in parts for document in sources.documents(part.path, field=field)]
    return ",".join(Path(part.path).name for part in parts), documents


def fits(model: Model, text: Windows) -> None:
    """Check that a model can read the windows. Raises ``DataError`` for other tokens, and for too long windows."""
    check_vocabulary(text.data, model.vocabulary)
    limit = model.positions
    if limit is not None and limit < text.data.length:
        raise DataError(
            f"windows of {text.data.length} tokens exceed the model's {limit} positions; pass --window {limit}"
        )


@torch.no_grad()
def perplexity(model: Model, text: Windows, *, show: Show | None = None) -> Perplexity:
    """The perplexity of a model on windows of text: ``exp(-1/n sum log p(x_t | window before it))``.

    Raises ``DataError`` where the tokens are not this model's, or where a window is longer than its positions.
    """
    fits(model, text)
    tokens, mask, scored = text.data.tokens, text.data.mask, text.scored
    rows = max(1, min(LOGITS // (model.vocabulary * tokens.shape[1]), 8192 // tokens.shape[1]))
    total, cuts = 0.0, slices(len(tokens), rows)
    found = _logits(model, tokens, mask, cuts)
    for some in cuts:
        ids, logits = tokens[some].to(model.device), next(found)[:, :-1].float()
        nll = logits.logsumexp(-1) - logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        total += nll.double()[scored[some, 1:].to(model.device)].sum().item()
        if show is not None:
            show("perplexity", float(some.stop), float(len(tokens)))
    count = int(scored.sum())
    return Perplexity(total / count, count, len(tokens))


def _logits(model: Model, tokens: Tensor, mask: Tensor, cuts: Sequence[slice]) -> Iterator[Tensor]:
    """The logits of each batch of rows: by a plain forward, or block by block where weights wait elsewhere."""
    if offloaded(model.net) and _streams(model, tokens[:1, :16], mask[:1, :16]):
        yield from _streamed(model, tokens, mask, cuts)
        return
    for some in cuts:
        yield _plain(model, tokens[some], mask[some])


def _plain(model: Model, tokens: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model.net(**inputs(tokens.to(model.device), mask.to(model.device)), use_cache=False).logits
    return logits


def _streamed(model: Model, tokens: Tensor, mask: Tensor, cuts: Sequence[slice]) -> Iterator[Tensor]:
    """All batches go through a block before the next one is touched; their streams wait in the CPU's memory."""
    blocks, arities = blocks_of(model.net, model.layout), [block.arity for block in model.layout.blocks]
    device = model.device
    found = [record(model.net, blocks, arities, tokens[some].to(device), mask[some].to(device)) for some in cuts]
    streams = [recording.stream.cpu() for recording in found]
    for index, block in enumerate(blocks):
        with hold(block):
            for number, recording in enumerate(found):
                streams[number] = recording.calls[index].run(block, streams[number].to(device)).cpu()
    for stream in streams:
        yield head(model.net, blocks, arities, stream.to(device))


def _streams(model: Model, tokens: Tensor, mask: Tensor) -> bool:
    """Whether blocks called one by one give the logits of the model: some hand each other something in secret."""
    (streamed,) = _streamed(model, tokens, mask, [slice(0, len(tokens))])
    return close(streamed, _plain(model, tokens, mask))
