"""A model that is only arithmetic: a ledger of sizes and an oracle over any damage function. No torch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from depthprune.scores import Array, Losses
from depthprune.units import Unit, parse

Damage = Callable[[frozenset[Unit]], Array]  # the loss in nats per token of each sequence, without these units


@dataclass(frozen=True)
class FakeLedger:
    """Sizes of sublayers; a block is the sum of its own, and nothing is counted twice."""

    sizes: Mapping[Unit, int]
    caches: Mapping[Unit, int] = field(default_factory=dict)
    vital: frozenset[Unit] = frozenset()  # units that cannot all go
    outside: int = 0

    @property
    def blocks(self) -> tuple[Unit, ...]:
        return tuple(dict.fromkeys(unit.whole for unit in self.sizes))

    @property
    def parameters(self) -> int:
        return sum(self.sizes.values())

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(self.caches.values())

    def freed(self, units: frozenset[Unit]) -> int:
        return sum(size for part, size in self.sizes.items() if part in units or part.whole in units)

    def kv_freed(self, units: frozenset[Unit]) -> int:
        return sum(size for part, size in self.caches.items() if part in units or part.whole in units)

    def viable(self, units: frozenset[Unit]) -> bool:
        return not self.vital or not self.vital <= units


class FakeOracle:
    """Answers from a damage function; remembers every set, as the real one does, and every question.

    ``asked`` lists the sets that losses were asked of, ``rows`` how many sequences each was asked on; ``scored`` the
    sets that scores were asked without. ``scores`` may be a function of what is gone.
    """

    def __init__(
        self,
        damage: Damage,
        ledger: FakeLedger,
        *,
        tokens: Sequence[float] = (8.0, 8.0),
        scores: Mapping[Unit, float] | Callable[[frozenset[Unit]], Mapping[Unit, float]] | None = None,
        milliseconds: Mapping[Unit, float] | None = None,
    ) -> None:
        self.ledger, self.damage, self.tokens = ledger, damage, np.array(tokens, dtype=np.float64)
        self._scores, self._milliseconds = scores or {}, dict(milliseconds or {})
        self.asked: list[frozenset[Unit]] = []
        self.rows: list[int] = []
        self.scored: list[frozenset[Unit]] = []
        self.notes: list[str] = []

    @property
    def evaluations(self) -> int:
        return len(set(self.asked))

    @property
    def sequences(self) -> int:
        return len(self.tokens)

    @property
    def work(self) -> int:
        """How many sequences were run through thinned models: no set runs one twice."""
        most: dict[frozenset[Unit], int] = {}
        for units, rows in zip(self.asked, self.rows, strict=True):
            most[units] = max(most.get(units, 0), rows)
        return sum(most.values())

    def scores(self, gone: frozenset[Unit] = frozenset()) -> Mapping[Unit, float]:
        self.scored.append(gone)
        values = self._scores(gone) if callable(self._scores) else self._scores
        return {unit: value for unit, value in values.items() if unit not in gone}

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> Sequence[float]:
        """The rise of the loss without each window, as the real one answers under the metric ``loss``."""
        measured = self.losses([frozenset(), *(frozenset(window) for window in windows)]).mean()
        return [float(value) for value in measured[1:] - measured[0]]

    def losses(self, gone: Sequence[frozenset[Unit]], *, rows: int | None = None) -> Losses:
        rows = self.sequences if rows is None else rows
        assert 1 <= rows <= self.sequences
        self.asked += gone
        self.rows += [rows] * len(gone)
        return Losses(np.stack([(self.damage(units) * self.tokens)[:rows] for units in gone]), self.tokens[:rows])

    def milliseconds(self) -> Mapping[Unit, float]:
        return self._milliseconds

    def note(self, text: str) -> None:
        self.notes.append(text)

    def mean(self, units: Iterable[Unit]) -> float:
        """The mean loss without these units, for naive comparisons: asks no question."""
        return float((self.damage(frozenset(units)) * self.tokens).sum() / self.tokens.sum())


def sublayers(blocks: int) -> tuple[Unit, ...]:
    """The attention and the MLP of every block, in execution order."""
    return parse([f"{index}.{name}" for index in range(blocks) for name in ("self_attn", "mlp")])


def whole(blocks: int) -> tuple[Unit, ...]:
    """Every block."""
    return parse([str(index) for index in range(blocks)])


def sizes(units: Sequence[Unit], seed: int = 0) -> FakeLedger:
    """A ledger with uneven sizes, a KV cache for attention only, and embeddings outside."""
    draw = np.random.default_rng(seed)
    return FakeLedger(
        {unit: int(draw.integers(50, 150)) for unit in units},
        {unit: int(draw.integers(4, 9)) for unit in units if unit.sublayer in ("", "self_attn")},
        outside=500,
    )


def anything(seed: int, sequences: int = 2) -> Damage:
    """A loss without rhyme or reason: any set may be better or worse than any other."""

    def damage(gone: frozenset[Unit]) -> Array:
        key = zlib.crc32(f"{seed} {sorted(map(str, gone))}".encode())
        return np.random.default_rng(key).uniform(1, 5, sequences)

    return damage


def growing(units: Sequence[Unit], seed: int, sequences: int = 2, *, whole_numbers: bool = False) -> Damage:
    """A supermodular loss: what a unit costs only grows as more units go. Whole numbers make for many exact ties."""
    draw = np.random.default_rng(seed)
    shape = (sequences, len(units), len(units))
    alone, pairs = draw.uniform(0, 1, shape[:2]), draw.uniform(0, 0.3, shape)
    if whole_numbers:
        alone, pairs = np.floor(alone * 3), np.floor(pairs * 5)
    return _quadratic(units, alone, pairs)


def shrinking(units: Sequence[Unit], seed: int, sequences: int = 2) -> Damage:
    """The opposite: a unit's damage may fall once others are gone, so old damage is no bound."""
    draw = np.random.default_rng(seed)
    alone = draw.uniform(2, 3, (sequences, len(units)))
    return _quadratic(units, alone, -draw.uniform(0, 1, (sequences, len(units), len(units))))


def _quadratic(units: Sequence[Unit], alone: Array, pairs: Array) -> Damage:
    order = {unit: index for index, unit in enumerate(units)}

    def damage(gone: frozenset[Unit]) -> Array:
        chosen = [order[unit] for unit in sorted(gone)]
        result: Array = 2 + alone[:, chosen].sum(1) + np.triu(pairs[:, chosen][:, :, chosen], 1).sum((1, 2))
        return result

    return damage
