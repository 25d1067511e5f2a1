"""An oracle on several texts and tasks at once, each with a weight: several skills are protected together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthprune.data import Data, Mixture
from depthprune.layout import Layout
from depthprune.model import Model
from depthprune.oracle import ModelOracle
from depthprune.scores import Losses, Scores
from depthprune.units import Unit


class MixedOracle:
    """Answers as ``ModelOracle`` does, with the weighted mean over the parts of a mixture.

    Losses: the sequences of all parts, scaled so that the mean over all of them is ``sum_i w_i mean_i``.
    Scores: ``sum_i w_i score_i``.
    """

    def __init__(self, model: Model, data: Mixture, *, memo: Path | None = None, **options: Any) -> None:
        self.model, self.data, self.weights = model, data, data.weights
        files = [
            None if memo is None else memo.with_name(f"{memo.stem}-{n}{memo.suffix}") for n in range(len(data.parts))
        ]
        self.parts = [
            ModelOracle(model, part, memo=file, **options) for part, file in zip(data.parts, files, strict=True)
        ]
        self.memo = memo

    def asking(self, metric: str | Callable[..., Scores]) -> MixedOracle:
        """The same oracle under another metric; what either measures, both know."""
        other = copy.copy(self)
        other.parts = [part.asking(metric) for part in self.parts]
        return other

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self.parts[0].metric

    @property
    def spec(self) -> str:
        """The metric with its options, as it was asked for."""
        return self.parts[0].spec

    @property
    def measure(self) -> str:
        """What losses are measured in."""
        return self.parts[0].measure

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that scores are of."""
        return self.parts[0].units

    @property
    def ledger(self) -> Layout:
        """What budgets count with: the model's layout."""
        return self.model.layout

    @property
    def evaluations(self) -> int:
        """How many different thinned models were asked for."""
        return max(part.evaluations for part in self.parts)

    @property
    def work(self) -> float:
        """How many passes over the whole calibration data the evaluations come to."""
        sizes = [part.data.tokens_total for part in self.parts]
        return sum(part.work * size for part, size in zip(self.parts, sizes, strict=True)) / sum(sizes)

    @property
    def sequences(self) -> int:
        """How many calibration sequences there are, in all parts."""
        return sum(part.sequences for part in self.parts)

    def note(self, text: str) -> None:
        """Say in a line what was decided."""
        self.parts[0].note(text)

    def scored(self, gone: frozenset[Unit] = frozenset()) -> Scores:
        """The weighted mean of the parts' scores, with its standard error where every part has one."""
        each = [part.scored(gone) for part in self.parts]
        values = {unit: self._mean([scores.values[unit] for scores in each]) for unit in each[0].values}
        shared = set.intersection(*(set(scores.errors) for scores in each))
        errors = {
            unit: math.sqrt(sum((w * s.errors[unit]) ** 2 for w, s in zip(self.weights, each, strict=True)))
            for unit in values
            if unit in shared
        }
        dense = [scores.dense for scores in each]
        mean = None if None in dense else self._mean([value for value in dense if value is not None])
        return Scores(each[0].metric, values, errors, self.data.describe(), mean)

    def scores(self, gone: frozenset[Unit] = frozenset()) -> Mapping[Unit, float]:
        """The score of every unit left once some are gone, low goes first; infinite: must stay."""
        return self.scored(gone).values

    def streams(self, tokens: str) -> dict[str, Scores]:
        """The weighted mean scores of every unit under every one-pass metric."""
        each = [part.streams(tokens) for part in self.parts]
        return {
            name: Scores(
                name,
                {unit: self._mean([scores[name].values[unit] for scores in each]) for unit in each[0][name].values},
                data=self.data.describe(),
            )
            for name in each[0]
        }

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> list[float]:
        """The score of dropping several consecutive units together."""
        return [
            self._mean(list(values)) for values in zip(*(part.windows(windows) for part in self.parts), strict=True)
        ]

    def losses(self, gone: Sequence[frozenset[Unit]], *, rows: int | None = None) -> Losses:
        """The losses of the model without each of these sets of units, on the same share of every part."""
        rows, count = self.sequences if rows is None else rows, self.sequences
        each = [part.losses(gone, rows=-(-part.sequences * rows // count)) for part in self.parts]
        total = sum(float(losses.tokens.sum()) for losses in each)
        scales = [w * total / float(losses.tokens.sum()) for w, losses in zip(self.weights, each, strict=True)]
        nll = [losses.nll * scale for losses, scale in zip(each, scales, strict=True)]
        tokens = [losses.tokens * scale for losses, scale in zip(each, scales, strict=True)]
        return Losses(np.concatenate(nll, 1), np.concatenate(tokens))

    def milliseconds(self) -> Mapping[Unit, float]:
        """The time that each unit takes in one forward over one sequence of the first part."""
        return self.parts[0].milliseconds()

    def _mean(self, values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


AnyOracle = ModelOracle | MixedOracle


def oracle(model: Model, data: Data | Mixture, **options: Any) -> AnyOracle:
    """The oracle for a model on calibration data: a text, a task, or several of them weighted."""
    return MixedOracle(model, data, **options) if isinstance(data, Mixture) else ModelOracle(model, data, **options)
