"""The real oracle: answers a selector's questions with the engine, remembers every answer, and can be resumed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthprune.data import Data
from depthprune.errors import CheckpointError, OptionError, PlanError
from depthprune.layout import Layout
from depthprune.metrics.stream import DISTANCES, spans, stream_scores
from depthprune.model import Model
from depthprune.registry import MEASURED, find
from depthprune.scores import Losses, Scores
from depthprune.surgery import without
from depthprune.timing import unit_milliseconds
from depthprune.units import Unit
from depthprune.variants import Progress, check, losses

Show = Callable[[str, float, float], None]  # what is going on, how much of it is done, out of how much
ERROR = "error"  # the share of wrong answers: a measure of questions, made of the losses of their answers


class ModelOracle:
    """Answers questions about one model on one calibration text or task.

    ``metric`` names the metric behind ``scores``, and what ``losses`` measures where it is one of
    ``registry.MEASURED``; ``memory`` bounds the engine's streams; ``memo`` is a file that keeps every measurement, so
    that an interrupted search goes on where it was; ``show`` is told of progress, ``say`` of decisions.
    """

    def __init__(
        self,
        model: Model,
        data: Data,
        *,
        metric: str | Callable[..., Scores] = "loss",
        units: Sequence[Unit] = (),
        memory: int | None = None,
        memo: Path | None = None,
        show: Show | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.memory, self.memo = model, memory, memo
        check(model, data)
        self.questions = data  # with the wrong answers, if it is a task
        self.data = data.right_only()
        self.units = tuple(units) or model.layout.units("any")
        self._show, self._say = show, say
        self._base: frozenset[Unit] = frozenset()  # what is gone while a metric is asked about the rest
        self._known: dict[tuple[str, frozenset[Unit]], np.ndarray] = {}  # of the first sequences
        self._streams: dict[tuple[str, frozenset[Unit]], dict[str, Scores]] = {}
        self._asked: dict[frozenset[Unit], float] = {}
        self._times: dict[Unit, float] = {}
        if memo is not None and memo.is_file():
            self._recall(memo)
        self._ask(metric)

    def _ask(self, metric: str | Callable[..., Scores]) -> None:
        self.metric, self._function, self._options = find("metrics", metric)
        self.spec = metric if isinstance(metric, str) else self.metric
        self.measure = self.metric if self.metric in MEASURED else "loss"
        self._scores: dict[frozenset[Unit], Scores] = {}

    def asking(self, metric: str | Callable[..., Scores]) -> ModelOracle:
        """The same oracle under another metric; what either measures, both know."""
        other = copy.copy(self)
        other._ask(metric)
        return other

    @property
    def ledger(self) -> Layout:
        """What budgets count with: the model's layout."""
        return self.model.layout

    @property
    def evaluations(self) -> int:
        """How many different thinned models were asked for, those that an earlier run had measured included."""
        return len(self._asked)

    @property
    def work(self) -> float:
        """How many passes over the whole calibration text the evaluations come to: some see only a part of it."""
        return sum(self._asked.values())

    @property
    def sequences(self) -> int:
        """How many calibration sequences there are: questions, where answers are judged."""
        return self.sequences_of(self.measure)

    def sequences_of(self, measure: str) -> int:
        """How many sequences a measure has."""
        return len(self._tokens(measure))

    def note(self, text: str) -> None:
        """Say in a line what was decided."""
        if self._say is not None:
            self._say(text)

    def scored(self, gone: frozenset[Unit] = frozenset()) -> Scores:
        """The scores under this oracle's metric of the units left once some are gone.

        Raises ``CheckpointError`` where one is not a number.
        """
        if gone not in self._scores:
            left = tuple(u for u in self.units if u not in gone and u.whole not in gone)
            self._base = gone
            try:
                with without(self.model, gone):
                    scores = self._function(self, left, **self._options)
            finally:
                self._base = frozenset()
            for unit, value in scores.values.items():
                if math.isnan(value):
                    raise self._broken(f"{self.metric} of {unit}")
            self._scores[gone] = scores
        return self._scores[gone]

    def scores(self, gone: frozenset[Unit] = frozenset()) -> Mapping[Unit, float]:
        """The score of every unit left once some are gone, low goes first; infinite: must stay."""
        return self.scored(gone).values

    def streams(self, tokens: str) -> dict[str, Scores]:
        """The scores of every unit under every one-pass metric, from one walk."""
        key = (tokens, self._base)
        if key not in self._streams:
            self._streams[key] = stream_scores(
                self.model, self.data, tokens=tokens, progress=self.progress("walking through the blocks")
            )
        return self._streams[key]

    def milliseconds(self) -> Mapping[Unit, float]:
        """The time that each unit takes in one forward over one calibration sequence."""
        if not self._times:
            self._times = unit_milliseconds(self.model, self.data, self.units)
        return self._times

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> list[float]:
        """The score of dropping several consecutive units together.

        Under ``loss`` and its like the rise of it; whole blocks under a one-pass metric the distance across them all;
        else the sum of the units' scores.
        """
        if self.metric == self.measure:
            measured = self.losses([frozenset(), *(frozenset(window) for window in windows)]).mean()
            return [float(value) for value in measured[1:] - measured[0]]
        if self.metric in DISTANCES and all(not unit.sublayer for window in windows for unit in window):
            far = {
                length: spans(self.model, self.data, self.metric, length, **self._options)
                for length in {len(window) for window in windows}
            }
            return [far[len(window)][window[0].block] for window in windows]
        scores = self.scores()
        return [sum(scores[unit] for unit in window) for window in windows]

    def losses(self, gone: Sequence[frozenset[Unit]], *, rows: int | None = None, measure: str | None = None) -> Losses:
        """The losses of the model without each of these sets of units; each set is measured once.

        On the first ``rows`` sequences, or all; ``measure`` is by default that of the oracle's metric.
        Raises ``CheckpointError`` where the dense model has none that is finite, ``OptionError`` for a measure that
        the data do not have.
        """
        measure = measure or self.measure
        tokens, key = self._tokens(measure), self._key(measure)
        rows = min(rows or len(tokens), len(tokens))
        wanted = [self._canonical(units) for units in gone]
        missing: dict[int, list[frozenset[Unit]]] = {}
        for units in dict.fromkeys(wanted):
            have = len(self._known.get((key, units), ()))
            if have < rows:
                missing.setdefault(have, []).append(units)
            self._asked[units] = max(self._asked.get(units, 0.0), rows / len(tokens))
        for have, several in missing.items():
            what = f"measuring {len(several)} variant{'s' * (len(several) != 1)}"
            found = self._measured(several, slice(have, rows), measure, self.progress(what))
            for units, values in zip(several, found.nll, strict=True):
                if not units and not np.isfinite(values).all():
                    raise self._broken("the loss")
                before = self._known.get((key, units), np.empty(0))
                self._known[key, units] = np.concatenate([before, values])
                self._write({"gone": sorted(map(str, units)), "measure": key, "nll": values.tolist()})
        return Losses(np.stack([self._known[key, units][:rows] for units in wanted]), tokens[:rows])

    def sample(self, gone: Sequence[frozenset[Unit]], sequence: int, measure: str) -> Losses:
        """The losses on one sequence alone, not kept: for metrics that draw other sets for every sequence."""
        wanted = [self._canonical(units) for units in gone]
        for units in dict.fromkeys(wanted):
            share = 1 / len(self._tokens(measure))
            self._asked[units] = min(1.0, self._asked.get(units, 0.0) + share)
        return self._measured(wanted, slice(sequence, sequence + 1), measure, None)

    def _key(self, measure: str) -> str:
        """What a measurement is kept under: a distance from a model that lacks units is none from the dense one."""
        alone = measure in ("loss", ERROR) or not self._base
        return measure if alone else " ".join((measure, "without", *sorted(map(str, self._base))))

    def _canonical(self, units: frozenset[Unit]) -> frozenset[Unit]:
        return frozenset(self.model.layout.canonical(sorted(units | self._base)))

    def _tokens(self, measure: str) -> np.ndarray:
        """What each sequence counts: its predictions, or 1 where an answer is right or wrong."""
        if measure != ERROR:
            return self.data.counted.sum(1).double().numpy()
        if self.questions.choices is None:
            raise OptionError(f"the metric error needs questions with choices; {self.data.name} has none")
        return np.ones(len(np.unique(self.questions.choices.item.numpy())))

    def _measured(
        self, gone: Sequence[frozenset[Unit]], rows: slice, measure: str, progress: Progress | None
    ) -> Losses:
        if measure != ERROR:
            data = self.data.rows(rows)
            return losses(self.model, data, gone, measure=measure, memory=self.memory, progress=progress)
        assert self.questions.choices is not None
        kept = np.unique(self.questions.choices.item.numpy())[rows]
        data = self.questions.rows(torch.isin(self.questions.choices.item, torch.from_numpy(kept)))
        assert data.choices is not None
        each = losses(self.model, data, gone, memory=self.memory, progress=progress).nll
        wrong = np.empty((len(gone), len(kept)))
        for column, item in enumerate(kept.tolist()):
            mine, right = (data.choices.item == item).numpy(), data.choices.right.numpy()
            best, own = each[:, mine].min(1), each[:, mine & right].min(1)
            wrong[:, column] = np.where(np.isnan(best), np.nan, best < own)
        return Losses(wrong, np.ones(len(kept)))

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what} is not a number for {self.model.reference.id} on {self.data.name}: its weights are damaged, or it "
            "overflows; try another --dtype"
        )

    def progress(self, what: str) -> Progress | None:
        """A progress bar with a title, for work that calls back with how much is done and how much there is."""
        show = self._show
        return None if show is None else lambda done, total: show(what, done, total)

    def _header(self) -> dict[str, Any]:
        dtype = str(next(self.model.net.parameters()).dtype)
        digest = self.questions.digest
        return {"format": 2, "fingerprint": self.model.reference.fingerprint, "digest": digest, "dtype": dtype}

    def _write(self, line: dict[str, Any]) -> None:
        if self.memo is None:
            return
        new = not self.memo.is_file()
        with self.memo.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps(self._header()) + "\n")
            file.write(json.dumps(line) + "\n")

    def _recall(self, memo: Path) -> None:
        """Read what an earlier run measured; a line cut short by a crash is dropped, another model's file ignored."""
        header, *lines = memo.read_bytes().split(b"\n")
        if header.decode("utf-8", "replace") != json.dumps(self._header()):
            memo.unlink()
            return
        good = header + b"\n"
        for line in lines:
            try:
                fields = json.loads(line)
                key = (str(fields["measure"]), frozenset(map(Unit.parse, fields["gone"])))
                nll = np.array(fields["nll"], dtype=np.float64)
            except (ValueError, TypeError, KeyError, PlanError):
                break
            self._known[key] = np.concatenate([self._known.get(key, np.empty(0)), nll])
            good += line + b"\n"
        memo.write_bytes(good)
