"""Text as a model reads it: rows of tokens, a mask, and a record of where they came from.

Packed rows are cut from the documents joined end to end; unpacked rows hold one document each, padded on the right.
Padding is never counted, scored or hashed into an overlap: the mask says what is real.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthprune import sources, tasks
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
        named = digest(tokens, mask, scored, choices)
        return replace(self, tokens=tokens, mask=mask, digest=named, scored=scored, choices=choices)

    def right_only(self) -> Data:
        """The rows that end in the right answer, with nothing to choose from; itself where there are no choices."""
        if self.choices is None:
            return self
        kept = self.rows(self.choices.right)
        return replace(kept, choices=None, digest=digest(kept.tokens, kept.mask, kept.scored))

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


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several skills to keep at once: a text, or a task, each with its weight in the objective.

    ``parts`` has the text first, if there is any, then the tasks; ``weights`` are positive and sum to 1.
    """

    parts: tuple[Data, ...]
    weights: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        assert self.parts and len(self.parts) == len(self.weights), "a weight for each part"
        assert all(weight > 0 for weight in self.weights) and abs(math.fsum(self.weights) - 1) < 1e-9, self.weights

    @property
    def sequences(self) -> int:
        """The number of rows of all parts."""
        return sum(part.sequences for part in self.parts)

    @property
    def length(self) -> int:
        """The tokens of a row of the part with the longest, padding included."""
        return max(part.length for part in self.parts)

    @property
    def tokens_total(self) -> int:
        """The number of real tokens of all parts."""
        return sum(part.tokens_total for part in self.parts)

    @property
    def predicted(self) -> int:
        """The number of next-token predictions that count, of all parts."""
        return sum(part.predicted for part in self.parts)

    @property
    def seed(self) -> int:
        """The seed under which the parts were drawn."""
        return self.parts[0].seed

    @property
    def digest(self) -> str:
        """The SHA-256 over the digests and the weights of the parts: ``"sha256:…"``."""
        lines = (f"{part.digest} {weight!r}\n" for part, weight in zip(self.parts, self.weights, strict=True))
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    def right_only(self) -> Mixture:
        """The same mixture of the rows that end in the right answer."""
        return replace(self, parts=tuple(part.right_only() for part in self.parts))

    def describe(self) -> dict[str, object]:
        """What a plan or a report records of this data, ready for JSON; ``parts`` describes each, with its weight."""
        each = list(zip(self.parts, self.weights, strict=True))
        places = [{**s, "weight": w * cast(float, s["weight"])} for part, w in each for s in part.sources]
        return {
            "name": self.name,
            "tokens": self.tokens_total,
            "sequences": self.sequences,
            "length": self.length,
            "digest": self.digest,
            "seed": self.seed,
            "sources": places,
            "parts": [{**part.describe(), "weight": weight} for part, weight in each],
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
) -> Data | Mixture:
    """Read text, or questions with their answers, and turn them into rows of tokens.

    ``source`` is a text, JSON-lines or Parquet file (``.txt.gz`` and ``.txt.xz`` too), a folder of them, a Hub data set
    ``hub:NAME:CONFIG:SPLIT[:COLUMN]``, a task ``task:FILE``, or a mixture ``a.txt=0.7,b.jsonl=0.3``, where a weight is
    a share of the rows. ``field`` is the column of JSON and Parquet; ``"prompt+response"`` joins two.

    With ``pack`` the documents are joined, eos between them, and cut in rows of ``length``; the remainder is dropped.
    Without it a row is one document, truncated or padded on the right; documents under 2 tokens are skipped. Every row
    starts with BOS where the tokenizer wants it. With ``shuffle`` the rows are drawn evenly from the whole text,
    without replacement, in random order; without it they are the first ones, in order.

    Texts above 4 million characters (or 8 a token asked for, if more) are read through once, and rows are drawn from
    pieces of 64 thousand characters or more, sampled evenly under the seed. Hub data sets are not read to their end:
    they are streamed in ``datasets``' shuffled order until there is as much text.

    A task is a file of JSON lines (``tasks`` lists the formats; ``task:FILE:format=letters:shots=5:dev=FILE`` sets its
    options). ``sequences`` counts its questions, drawn as rows of text are; every answer is a row, prompt in front,
    padded on the right to the longest row, and only the answer's tokens are scored. A mixture with a task in it is a
    ``Mixture``: all its text is one part, each task another, and the weights also weigh the parts' losses.

    Warns where there are fewer rows than asked for, and where questions are too long. Raises ``DataError`` for text
    that is missing, malformed or too short, and ``OptionError`` for ``sequences`` below 1 or a ``length`` below 2.
    """
    wanted = wanted_rows(tokenizer, sequences, length, seed, pack, shuffle)
    parts = sources.parse(source)
    shares = sources.shares(parts, sequences)
    drawn: list[Rows] = []
    asked: list[Data] = []
    for part, share in zip(parts, shares, strict=True):
        fewer = replace(wanted, sequences=share)
        if part.is_task:
            asked.append(_task(tasks.draw(part, fewer), part, seed))
        else:
            read = partial(sources.documents, part.path, field=field, seed=seed if shuffle else None)
            drawn.append(draw(read, fewer, part, len(drawn)))
    texts = [part for part in parts if not part.is_task]
    if not asked:
        return _assemble(drawn, texts, sources.joined_name(texts), wanted)
    if len(parts) == 1:
        return asked[0]
    weights = [part.weight for part in parts if part.is_task]
    if texts:
        total = math.fsum(part.weight for part in texts)
        weights.insert(0, total)
        texts = [replace(part, weight=part.weight / total) for part in texts]
        asked.insert(0, _assemble(drawn, texts, sources.joined_name(texts), wanted))
    return Mixture(tuple(asked), tuple(weights), sources.joined_name(parts))


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


def digest(tokens: Tensor, mask: Tensor, scored: Tensor | None = None, choices: Choices | None = None) -> str:
    """The SHA-256 over the shape, the tokens, the masks and the choices: ``"sha256:…"``.

    Numbers are int64, little-endian, and marks one byte each.
    """
    state = hashlib.sha256(str(tuple(tokens.shape)).encode())
    chosen = () if choices is None else (choices.item, choices.right)
    for values in (tokens, mask, scored, *chosen):
        if values is not None:
            array = values.cpu().contiguous().numpy()
            state.update((array if array.dtype == np.bool_ else array.astype("<i8")).tobytes())
    return f"sha256:{state.hexdigest()}"


def check_vocabulary(data: Data | Mixture | Tensor, vocabulary: int) -> None:
    """Refuse token ids, of padding too, that a model with ``vocabulary`` embeddings cannot look up (``DataError``)."""
    if isinstance(data, Mixture):
        for part in data.parts:
            check_vocabulary(part, vocabulary)
        return
    ids = data.tokens if isinstance(data, Data) else data
    for worst in (int(ids.max()), int(ids.min())) if ids.numel() else ():
        if not 0 <= worst < vocabulary:
            fault = f"the tokenizer produces id {worst} but the model has {vocabulary} embeddings"
            raise DataError(f"{fault}: tokenizer of another model?")


def overlap(a: Data | Mixture, b: Data | Mixture, *, n: int = 16) -> float:
    """The share of ``b``'s windows of ``n`` real tokens that also occur in ``a``, from 0 to 1.

    Windows start at every position, in both, and are compared by 64-bit hashes. Rows with fewer real tokens
    than ``n`` have no window; a ``length`` below ``n`` takes its place. Both must come from one tokenizer.
    """
    n = min(n, a.length, b.length)
    known, asked = _windows(a, n), _windows(b, n)
    return float(np.isin(asked, known).mean()) if asked.size else 0.0


def apart(a: Data, b: Data | Mixture, *, n: int = 16) -> Data:
    """The rows of ``a`` that share no window of ``n`` real tokens with ``b``: what can be learned from and not cheat.

    Raises ``DataError`` where no row is left.
    """
    n = min(n, a.length, b.length)
    known = _windows(b, n)
    each = (_windows(a.rows(slice(number, number + 1)), n) for number in range(a.sequences))
    kept = [number for number, found in enumerate(each) if not np.isin(found, known).any()]
    if not kept:
        raise DataError(f"every row of {a.name} is also in {b.name}")
    return a if len(kept) == a.sequences else a.rows(torch.tensor(kept))


def warn_overlap(a: Data | Mixture, b: Data | Mixture) -> str | None:
    """One line of warning where more than 1 % of ``b`` (evaluation) also occurs in ``a`` (calibration), else None."""
    share = overlap(a, b)
    if share <= 0.01:
        return None
    return f"{share:.1%} of {b.name} also occurs in {a.name}, which the plan was chosen on: evaluate on other text"


def _task(answers: tasks.Answers, part: sources.Source, seed: int) -> Data:
    tokens, mask, scored, item = map(torch.from_numpy, (answers.tokens, answers.mask, answers.scored, answers.item))
    choices = None if answers.right is None else Choices(item, torch.from_numpy(answers.right))
    record: dict[str, object] = {
        "path": part.path,
        "weight": 1.0,
        "documents": answers.documents,
        "tokens": int(mask.sum()),
        "format": answers.format,
        "questions": int(item[-1]) + 1,
    }
    return Data(tokens, mask, part.name, digest(tokens, mask, scored, choices), seed, (record,), scored, choices)


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


def _windows(data: Data | Mixture, n: int) -> npt.NDArray[np.uint64]:
    """The hash of every window of ``n`` real tokens: a polynomial over mixed ids, modulo 2**64."""
    if isinstance(data, Mixture):
        return np.concatenate([_windows(part, n) for part in data.parts])
    ids = data.tokens.cpu().numpy().astype(np.uint64)
    mask = data.mask.cpu().numpy()
    ids = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
    ids = (ids ^ (ids >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    count = max(0, data.length - n + 1)
    hashes = np.zeros((data.sequences, count), dtype=np.uint64)
    real = np.ones(hashes.shape, dtype=np.bool_)
    for k in range(n):
        hashes = hashes * np.uint64(0x5851F42D4C957F2D) + ids[:, k : k + count]
        real &= mask[:, k : k + count]
    return hashes[real]
