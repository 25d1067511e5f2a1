"""What training reads: rows that are in memory, in an order fixed beforehand, or text streamed from its source."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from depthprune import sources
from depthprune.data import Data, digest
from depthprune.dist import world
from depthprune.errors import DataError, OptionError
from depthprune.recover.repair import Repair
from depthprune.rows import opening, tokenize

IGNORED = -100  # the label of a token whose prediction does not count
_WINDOW = 16  # tokens in a row that a streamed row may share with the held-out text
_BUFFER = 1024  # rows of a stream that are shuffled at a time
_PIECE = 1 << 16  # characters that are tokenized at a time

Batch = dict[str, Tensor]


class Rows(Dataset[Batch]):
    """Rows of some data in a given order; ``row`` says which it was."""

    def __init__(self, data: Data, order: Tensor) -> None:
        self.data, self.order = data, order
        self.labels = labels(data)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Batch:
        row = self.order[index]
        return {
            "input_ids": self.data.tokens[row],
            "attention_mask": self.data.mask[row],
            "labels": self.labels[row],
            "row": row,
        }


def labels(data: Data) -> Tensor:
    """The tokens (N, T), with -100 in place of those whose prediction does not count."""
    marked = torch.full_like(data.tokens, IGNORED)
    marked[:, 1:] = torch.where(data.counted, data.tokens[:, 1:], IGNORED)
    return marked


def whole(data: Data) -> Data:
    """The rows of all processes, where each has its own; the same in each of them."""
    if world() == 1:
        return data
    shares: list[Any] = [None] * world()
    torch.distributed.all_gather_object(shares, (data.digest, data.tokens, data.mask, data.scored))
    if len({named for named, *_ in shares}) == 1:
        return data
    tokens, mask = (torch.cat([share[place] for share in shares]) for place in (1, 2))
    scored = None if data.scored is None else torch.cat([share[3] for share in shares])
    return replace(data, tokens=tokens, mask=mask, scored=scored, choices=None, digest=digest(tokens, mask, scored))


def order(data: Data, rows: int, seed: int) -> Tensor:
    """Which rows to train on, one after the other: one pass in random order after the other, until there are enough."""
    generator = torch.Generator().manual_seed(seed)
    useful = data.counted.any(1).nonzero().squeeze(1)
    passes = -(-rows // len(useful))
    drawn = [useful[torch.randperm(len(useful), generator=generator)] for _ in range(passes)]
    return torch.cat(drawn)[:rows]


def together(items: list[Batch]) -> Batch:
    """Rows as one batch."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class Stream(IterableDataset[Batch]):
    """Packed rows of the whole text that a repair names, pass after pass, shuffled within a buffer.

    A row that shares about 30 tokens in a row with the held-out text is left out.
    Raises ``OptionError`` where the repair names no text to stream.
    """

    def __init__(self, repair: Repair) -> None:
        if repair.source is None:
            raise OptionError("stream=true needs the name of a text to stream (--data), and there is none here")
        self.parts = sources.parse(repair.source)
        if any(part.is_task for part in self.parts):
            raise OptionError("stream=true takes text, not questions; leave the task: parts of --data out")
        self.tokenizer, self.field, self.seed = repair.model.tokenizer, repair.field, repair.seed
        self.front, self.length = list(opening(self.tokenizer)), repair.data.length
        held = repair.held.tokens.numpy().astype("<i8")
        starts = range(held.shape[1] - _WINDOW + 1)
        self.held = {row[at : at + _WINDOW].tobytes() for row in held for at in starts}

    def __iter__(self) -> Iterator[Batch]:
        draw = random.Random(f"stream {self.seed}")
        readers = [self._rows(part) for part in self.parts]
        weights = [part.weight for part in self.parts]
        kept: list[list[int]] = []
        while True:
            row = next(readers[draw.choices(range(len(readers)), weights)[0]])
            if len(kept) < _BUFFER:
                kept.append(row)
                continue
            place = draw.randrange(_BUFFER)
            kept[place], row = row, kept[place]
            yield _packed(row)

    def _rows(self, part: sources.Source) -> Iterator[list[int]]:
        """The rows of one source, from its beginning again when it ends. Raises ``DataError`` where it has none."""
        eos = self.tokenizer.eos_token_id
        between = [] if eos is None or eos in self.front else [int(eos)]
        body, turn = self.length - len(self.front), 0
        while True:
            left: list[int] = []
            found = False
            for document in sources.documents(part.path, field=self.field, seed=self.seed + turn):
                for number, text in enumerate(sources.split(document, _PIECE)):
                    left += (between if number == 0 and (left or found) else []) + self._ids(text)
                    start = 0
                    while len(left) - start >= body:
                        row = self.front + left[start : start + body]
                        start += body
                        if not self._is_held(row):
                            found = True
                            yield row
                    left = left[start:]
            if not found:
                raise DataError(f"{part.path}: too short for a row of {self.length} tokens, or all of it is held out")
            turn += 1

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = tokenize(self.tokenizer, [text])[0].tolist()
        return ids

    def _is_held(self, row: list[int]) -> bool:
        array = np.asarray(row, dtype="<i8")
        starts = range(0, len(array) - _WINDOW + 1, _WINDOW)
        return any(array[at : at + _WINDOW].tobytes() in self.held for at in starts)


def _packed(row: list[int]) -> Batch:
    ids = torch.tensor(row)
    marked = ids.clone()
    marked[0] = IGNORED
    real = torch.ones_like(ids, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": real, "labels": marked, "row": torch.tensor(-1)}
