"""Text as a model reads it: rows of tokens, a mask, and a record of where they came from.

Packed rows are cut from the documents joined end to end; unpacked rows hold one document each, padded on the right.
Padding is never counted, scored or hashed into an overlap: the mask says what is real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthprune import sources
from depthprune.errors import DataError, OptionError
from depthprune.rows import Rows, Wanted, draw, shuffled, wanted_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Choices:
    """Which rows are answers to one question: ``item`` (N,) int64 numbers the questions, ``right`` (N,) bool says
    which row of a question ends in the right answer (exactly one does)."""

    item: Tensor
    right: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Choices:
        return Choices(self.item[rows], self.right[rows])


@dataclass(frozen=True, eq=False)
class Data:
    """Rows of tokens with a mask, and where they came from.

    ``tokens`` (N, T) int64 holds the pad id where ``mask`` (N, T) bool is False. ``sources`` says for each source its
    ``path``, its ``weight`` (share of the rows), the ``documents`` read, and the ``tokens`` of the rows drawn from it.
    Of a task, ``scored`` (N, T) bool marks the tokens whose prediction counts (those of the answer), and ``choices``
    which rows are answers to the same question.
    Raises ``DataError`` where the shapes differ, or the mask leaves nothing to predict.
    """

    tokens: Tensor
    mask: Tensor
    name: str
    digest: str
    seed: int
    sources: tuple[dict[str, object], ...]
    scored: Tensor | None = None
    choices: Choices | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.shape != self.mask.shape:
            shapes = f"{tuple(self.tokens.shape)} and {tuple(self.mask.shape)}"
            raise DataError(f"{self.name}: tokens and mask must have one shape (rows, length), not {shapes}")
        if self.tokens.dtype != torch.int64 or self.mask.dtype != torch.bool:
            raise DataError(
                f"{self.name}: tokens must be int64 and mask bool, not {self.tokens.dtype}, {self.mask.dtype}"
            )
        if self.predicted == 0:
            raise DataError(
                f"{self.name}: all masked; no token has a real token before it, so nothing can be predicted"
            )

    @property
    def sequences(self) -> int:
        """The number of rows, N."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """The tokens of a row, T, padding included."""
        return self.tokens.shape[1]

    @property
    def tokens_total(self) -> int:
        """The number of real tokens."""
        return int(self.mask.sum())

    @property
    def predicted(self) -> int:
        """The number of next-token predictions that count."""
        return int(self.counted.sum())

    @property
    def counted(self) -> Tensor:
        """Which predictions count (N, T - 1): of real tokens that follow a real token and, in a task, are scored."""
        real = self.mask[:, 1:] & self.mask[:, :-1]
        return real if self.scored is None else real & self.scored[:, 1:]

    @property
    def packed(self) -> bool:
        """Whether there is no padding at all."""
        return bool(self.mask.all())

    def head(self, n: int) -> Data:
        """The first ``n`` rows (all, if there are fewer), with their own digest; ``sources`` stays that of the whole.

        Raises ``OptionError`` for fewer than one row.
        """
        if n < 1:
            raise OptionError(f"the head of {self.name} needs at least one row, not {n}")
        return self.rows(slice(0, n))

    def tail(self, n: int) -> Data:
        """The last ``n`` rows, with their own digest; the rows that ``head(sequences - n)`` leaves."""
        if not 1 <= n <= self.sequences:
            raise OptionError(f"the tail of {self.name} needs 1 to {self.sequences} rows, not {n}")
        return self.rows(slice(self.sequences - n, self.sequences))

    def rows(self, chosen: slice | Tensor) -> Data:
        """Some of the rows, as a slice or a mask (N,), with their own digest."""
        tokens, mask = self.tokens[chosen], self.mask[chosen]
        scored = None if self.scored is None else self.scored[chosen]
        choices = None if self.choices is None else self.choices[chosen]
        named = digest(tokens, mask, scored)
        return replace(self, tokens=tokens, mask=mask, digest=named, scored=scored, choices=choices)

    def describe(self) -> dict[str, object]:
        """What a plan or a report records of this data, ready for JSON."""
        return {
            "name": self.name,
            "tokens": self.tokens_total,
            "sequences": self.sequences,
            "length": self.length,
            "digest": self.digest,
            "seed": self.seed,
            "sources": [dict(source) for source in self.sources],
        }


def calibrate(
    source: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = 64,
    length: int = 512,
    seed: int = 0,
    pack: bool = True,
    field: str = "text",
    shuffle: bool = True,
) -> Data:
    """Read text and turn it into rows of tokens.

    ``source`` is a text, JSON-lines or Parquet file (``.txt.gz`` and ``.txt.xz`` too), a folder of them, a Hub data set
    ``hub:NAME:CONFIG:SPLIT[:COLUMN]``, or a mixture ``a.txt=0.7,b.jsonl=0.3``, where a weight is a share of the rows.
    ``field`` is the column of JSON and Parquet; ``"prompt+response"`` joins two.

    With ``pack`` the documents are joined, eos between them, and cut in rows of ``length``; the remainder is dropped.
    Without it a row is one document, truncated or padded on the right; documents under 2 tokens are skipped. Every row
    starts with BOS where the tokenizer wants it. With ``shuffle`` the rows are drawn evenly from the whole text,
    without replacement, in random order; without it they are the first ones, in order.

    Texts above 4 million characters (or 8 a token asked for, if more) are read through once, and rows are drawn from
    pieces of 64 thousand characters or more, sampled evenly under the seed. Hub data sets are not read to their end:
    they are streamed in ``datasets``' shuffled order until there is as much text.

    Warns where there are fewer rows than asked for. Raises ``DataError`` for text that is missing, malformed or too
    short, and ``OptionError`` for ``sequences`` below 1 or a ``length`` below 2.
    """
    wanted = wanted_rows(tokenizer, sequences, length, seed, pack, shuffle)
    parts = sources.parse(source)
    shares = _shares(parts, sequences)
    drawn = []
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        read = partial(sources.documents, part.path, field=field, seed=seed if shuffle else None)
        drawn.append(draw(read, replace(wanted, sequences=share), part, index))
    names = [part.name if len(parts) == 1 else f"{part.name}={part.weight:.4g}" for part in parts]
    return _assemble(drawn, parts, ",".join(names), wanted)


def from_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequences: int = 64,
    length: int = 512,
    seed: int = 0,
    pack: bool = True,
    shuffle: bool = True,
    name: str = "texts",
) -> Data:
    """Turn documents that are in memory into rows of tokens, as ``calibrate`` does with files.

    Warns and raises as ``calibrate`` does.
    """
    if isinstance(texts, str):
        raise OptionError("from_texts takes a list of documents, not one string; put it in a list")
    wanted = wanted_rows(tokenizer, sequences, length, seed, pack, shuffle)
    part = sources.Source(name, 1.0)
    rows = draw(lambda: ((text,) for text in texts), wanted, part, 0)
    return _assemble([rows], (part,), name, wanted)


def digest(tokens: Tensor, mask: Tensor, scored: Tensor | None = None) -> str:
    """The SHA-256 over the shape, the tokens (int64, little-endian) and the masks (one byte each): ``"sha256:…"``."""
    state = hashlib.sha256(str(tuple(tokens.shape)).encode())
    state.update(tokens.cpu().contiguous().numpy().astype("<i8").tobytes())
    for marks in (mask,) if scored is None else (mask, scored):
        state.update(marks.cpu().contiguous().numpy().tobytes())
    return f"sha256:{state.hexdigest()}"


def check_vocabulary(data: Data | Tensor, vocabulary: int) -> None:
    """Refuse token ids, of padding too, that a model with ``vocabulary`` embeddings cannot look up (``DataError``)."""
    ids = data.tokens if isinstance(data, Data) else data
    for worst in (int(ids.max()), int(ids.min())) if ids.numel() else ():
        if not 0 <= worst < vocabulary:
            fault = f"the tokenizer produces id {worst} but the model has {vocabulary} embeddings"
            raise DataError(f"{fault}: tokenizer of another model?")


def overlap(a: Data, b: Data, *, n: int = 16) -> float:
    """The share of ``b``'s windows of ``n`` real tokens that also occur in ``a``, from 0 to 1.

    Windows start at every position, in both, and are compared by 64-bit hashes. Rows with fewer real tokens
    than ``n`` have no window; a ``length`` below ``n`` takes its place. Both must come from one tokenizer.
    """
    n = min(n, a.length, b.length)
    known, asked = _windows(a, n), _windows(b, n)
    return float(np.isin(asked, known).mean()) if asked.size else 0.0


def warn_overlap(a: Data, b: Data) -> str | None:
    """One line of warning where more than 1 % of ``b`` (evaluation) also occurs in ``a`` (calibration), else None."""
    share = overlap(a, b)
    if share <= 0.01:
        return None
    return f"{share:.1%} of {b.name} also occurs in {a.name}, which the plan was chosen on: evaluate on other text"


def _shares(parts: Sequence[sources.Source], sequences: int) -> list[int]:
    """Whole rows for every part, by the largest remainder, so that they add up."""
    exact = [part.weight * sequences for part in parts]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: sequences - sum(shares)]:
        shares[i] += 1
    if 0 in shares:
        part = parts[shares.index(0)]
        raise DataError(
            f"{part.path}: its weight {part.weight:.3g} gives no row of {sequences}; ask for more sequences"
        )
    return shares


def _assemble(drawn: Sequence[Rows], parts: Sequence[sources.Source], name: str, wanted: Wanted) -> Data:
    tokens = np.concatenate([rows.tokens for rows in drawn])
    mask = np.concatenate([rows.mask for rows in drawn])
    if wanted.shuffle and len(drawn) > 1:
        order = shuffled(len(tokens), f"mixture {wanted.seed}")
        tokens, mask = tokens[order], mask[order]
    record: list[dict[str, object]] = [
        {"path": part.path, "weight": part.weight, "documents": rows.documents, "tokens": int(rows.mask.sum())}
        for part, rows in zip(parts, drawn, strict=True)
    ]
    ids, real = torch.from_numpy(tokens), torch.from_numpy(mask)
    return Data(ids, real, name, digest(ids, real), wanted.seed, tuple(record))


def _windows(data: Data, n: int) -> npt.NDArray[np.uint64]:
    """The hash of every window of ``n`` real tokens: a polynomial over mixed ids, modulo 2**64."""
    ids = data.tokens.cpu().numpy().astype(np.uint64)
    mask = data.mask.cpu().numpy()
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
    ids = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    count = data.length - n + 1
    hashes = np.zeros((data.sequences, count), dtype=np.uint64)
    real = np.ones(hashes.shape, dtype=np.bool_)
    for k in range(n):
        hashes = hashes * np.uint64(0x5851F42D4C957F2D) + ids[:, k : k + count]
        real &= mask[:, k : k + count]
    return hashes[real]
