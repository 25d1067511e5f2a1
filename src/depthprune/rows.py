"""Rows of tokens out of documents: gather enough text, tokenize it, cut it, choose.

Packed rows are cut from documents joined end to end; unpacked rows hold one document each, padded on the right.
"""

from __future__ import annotations

import heapq
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from depthprune import sources
from depthprune.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_SAMPLE = 4_000_000  # characters: texts shorter than this are tokenized whole, before rows are drawn
_PIECE = 1 << 16  # characters: longer documents are sampled in pieces of this size
_BATCH = 1 << 20  # characters that the tokenizer is given at a time


@dataclass(frozen=True)
class Wanted:
    """What rows are asked for: how many, how long, and how they are made. ``opening`` goes in front of each."""

    tokenizer: PreTrainedTokenizerBase
    opening: tuple[int, ...]
    sequences: int
    length: int
    seed: int
    pack: bool
    shuffle: bool


@dataclass(frozen=True)
class Rows:
    """The rows drawn from one source, (N, T) each, and how many documents were read for them."""

    tokens: Ids
    mask: Bools
    documents: int


def wanted_rows(
    tokenizer: PreTrainedTokenizerBase, sequences: int, length: int, seed: int, pack: bool, shuffle: bool
) -> Wanted:
    """Check the numbers and find out what the tokenizer puts in front. Raises ``OptionError``."""
    if sequences < 1:
        raise OptionError(f"sequences must be at least 1, not {sequences}")
    front = opening(tokenizer)
    least = max(2, len(front) + 1)
    if length < least:
        raise OptionError(f"length must be at least {least} tokens, not {length}")
    return Wanted(tokenizer, front, sequences, length, seed, pack, shuffle)


def draw(read: Callable[[], Iterable[Iterable[str]]], wanted: Wanted, part: sources.Source, index: int) -> Rows:
    """Rows from one source: tokenize enough of it, cut, choose.

    ``read`` opens the source anew; it is called again where the first sample held too few tokens. ``index`` sets the
    source apart from the others of its mixture, so that each has its own random numbers.
    Warns where there are fewer rows than wanted; raises ``DataError`` where there is none.
    """
    piece = max(_PIECE, 32 * wanted.length) if wanted.pack else 32 * wanted.length
    limit = wanted.sequences * wanted.length * (8 if wanted.pack else 32)
    in_order = not wanted.shuffle or part.path.startswith(sources.HUB)
    limit = max(limit, _SAMPLE) if wanted.shuffle else limit
    while True:
        order = None if in_order else random.Random(f"pieces {wanted.seed} {index}")
        stretches, documents, whole = _gather(read(), piece, limit, order, first_only=not wanted.pack)
        texts = [text for text in stretches if text and not text.isspace()]
        if not texts and whole:
            raise DataError(f"{part.path}: the text is empty")
        ids = tokenize(wanted.tokenizer, texts)
        tokens, mask = _cut(ids, wanted) if wanted.pack else _pad(ids, wanted)
        # One row to spare: the last of an incomplete text may have been tokenized differently at its end.
        if whole or len(tokens) > wanted.sequences:
            break
        limit *= 4
    if not len(tokens):
        raise DataError(f"{part.path}: {_too_short(ids, wanted)}")
    if len(tokens) < wanted.sequences:
        found = f"{len(tokens)} sequences of {wanted.length} tokens"
        warnings.warn(f"{part.path}: only {found}, not the {wanted.sequences} asked for", UserWarning, stacklevel=3)
    chosen = list(range(len(tokens)))
    if wanted.shuffle:
        chosen = shuffled(len(tokens), f"rows {wanted.seed} {index}")
    chosen = chosen[: wanted.sequences]
    return Rows(tokens[chosen], mask[chosen], documents)


def _gather(
    documents: Iterable[Iterable[str]], piece: int, limit: int, order: random.Random | None, *, first_only: bool
) -> tuple[list[str], int, bool]:
    """About ``limit`` characters of text, the number of documents read, and whether that was all there is.

    Without ``order`` these are the first ones; with it an even sample of pieces. Neighbours are joined again, so that
    a text below the limit comes back as its own documents; a stretch between two gaps counts as a document.
    """
    kept: list[tuple[float, int, int, str]] = []  # a heap, the piece to give up first on top
    size = serial = count = 0
    whole = True
    for number, part, text in _pieces(documents, piece):
        count = number + 1
        if first_only and part:
            continue
        key = -order.random() if order else float(-serial)
        heapq.heappush(kept, (key, serial, number, text))
        serial += 1
        size += len(text)
        if order is None and size >= limit:
            whole = False  # as far as we looked
            break
        while size - len(kept[0][3]) >= limit:
            size -= len(heapq.heappop(kept)[3])
            whole = False
    stretches: list[list[str]] = []
    last = (-2, -1)
    for _, at, number, text in sorted(kept, key=lambda entry: entry[1]):
        if not first_only and last == (at - 1, number):
            stretches[-1].append(text)
        else:
            stretches.append([text])
        last = (at, number)
    return ["".join(stretch) for stretch in stretches], count, whole


def _pieces(documents: Iterable[Iterable[str]], size: int) -> Iterator[tuple[int, int, str]]:
    number = -1
    for document in documents:
        for part, text in enumerate(sources.split(document, size)):
            number += part == 0
            yield number, part, text


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """The ids of each text, without BOS or anything else that the tokenizer would add."""
    ids: list[Ids] = []
    batch: list[str] = []
    size = 0
    for number, text in enumerate(texts, start=1):
        batch.append(text)
        size += len(text)
        if size >= _BATCH or number == len(texts):
            # verbose=False: a text longer than the model's context is no mistake here.
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids += [np.asarray(row, dtype=np.int64) for row in encoded["input_ids"]]
            batch, size = [], 0
    return ids


def _cut(ids: Sequence[Ids], wanted: Wanted) -> tuple[Ids, Bools]:
    """Pack: documents end to end, eos between them unless rows open with that very id, cut in whole rows."""
    eos = wanted.tokenizer.eos_token_id
    between = np.asarray([] if eos is None or eos in wanted.opening else [eos], dtype=np.int64)
    joined = [part for row in ids for part in (between, row)][1:]
    stream = np.concatenate(joined) if joined else between[:0]
    body = wanted.length - len(wanted.opening)
    count = len(stream) // body
    front = np.tile(np.asarray(wanted.opening, dtype=np.int64), (count, 1))
    tokens = np.concatenate([front, stream[: count * body].reshape(count, body)], axis=1)
    return tokens, np.ones(tokens.shape, dtype=np.bool_)


def _pad(ids: Sequence[Ids], wanted: Wanted) -> tuple[Ids, Bools]:
    """One document a row: truncated, or padded on the right."""
    front = np.asarray(wanted.opening, dtype=np.int64)
    rows = [np.concatenate([front, row])[: wanted.length] for row in ids]
    rows = [row for row in rows if len(row) >= 2]
    return padded(rows, wanted.length, wanted.tokenizer)


def padded(rows: Sequence[Ids], length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Bools]:
    """Rows of different lengths as one array, padded on the right, and which of its tokens are real."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    padding = next((int(i) for i in known if i is not None), 0)
    tokens = np.full((len(rows), length), padding, dtype=np.int64)
    mask = np.zeros(tokens.shape, dtype=np.bool_)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        mask[i, : len(row)] = True
    return tokens, mask


def _too_short(ids: Sequence[Ids], wanted: Wanted) -> str:
    have = sum(len(row) for row in ids)
    if not wanted.pack:
        return "no document has the 2 tokens that a row needs"
    need = wanted.length - len(wanted.opening)
    fits = have + len(wanted.opening)
    shorter = f", or --length {fits} or less" if fits >= 2 else ""
    return f"{have} tokens of text, but one row needs {need}; give more text{shorter}"


def shuffled(count: int, seed: str) -> list[int]:
    """A random order that no version of a library changes: Python promises ``random()`` for a seed, but no shuffle."""
    keys = random.Random(seed)
    drawn = [keys.random() for _ in range(count)]
    return sorted(range(count), key=drawn.__getitem__)


def opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that this tokenizer puts in front of a text: usually BOS or nothing, for some models two ids."""
    plain = tokenize(tokenizer, ["a"])[0].tolist()
    full = list(tokenizer("a")["input_ids"])
    start = next((at for at in range(len(full)) if plain and full[at : at + len(plain)] == plain), 0)
    bos = tokenizer.bos_token_id
    # Some tokenizers know that they want BOS and leave it to others to put it there.
    if start == 0 and bos is not None and (full[:1] == [bos] or getattr(tokenizer, "add_bos_token", False)):
        return (int(bos),)
    return tuple(int(i) for i in full[:start])
