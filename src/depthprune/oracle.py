"""The real oracle: answers a selector's questions with the engine, remembers every answer, and can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthprune.data import Data
from depthprune.errors import CheckpointError, PlanError
from depthprune.layout import Layout
from depthprune.metrics.loss import loss
from depthprune.metrics.stream import DISTANCES, spans, stream_scores
from depthprune.model import Model
from depthprune.registry import find
from depthprune.scores import Losses, Scores
from depthprune.units import Unit
from depthprune.variants import check, losses

Show = Callable[[str, float, float], None]  # what is going on, how much of it is done, out of how much


class ModelOracle:
    """Answers questions about one model on one calibration text.

    ``metric`` names the metric behind ``scores``; ``memory`` bounds the engine's streams; ``memo`` is a file that keeps
    every measured loss, so that an interrupted search goes on where it was; ``show`` is told of progress.
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
        self.model, self.data, self.memory, self.memo = model, data, memory, memo
        check(model, data)
        self.metric, self._function, self._options = find("metrics", metric)
        self.spec = metric if isinstance(metric, str) else self.metric
        self.units = tuple(units) or model.layout.units("any")
        self._show, self._say = show, say
        self._known: dict[frozenset[Unit], np.ndarray] = {}
        self._streams: dict[str, dict[str, Scores]] = {}
        self._scores: Scores | None = None
        self._asked: set[frozenset[Unit]] = set()
        if memo is not None and memo.is_file():
            self._recall(memo)

    @property
    def ledger(self) -> Layout:
        """What budgets count with: the model's layout."""
        return self.model.layout

    @property
    def evaluations(self) -> int:
        """How many different thinned models were asked for, those that an earlier run had measured included."""
        return len(self._asked)

    def note(self, text: str) -> None:
        """Say in a line what was decided."""
        if self._say is not None:
            self._say(text)

    def scored(self) -> Scores:
        """The scores of all units under this oracle's metric. Raises ``CheckpointError`` where one is not a number."""
        if self._scores is None:
            scores = self._function(self, self.units, **self._options)
            for unit, value in scores.values.items():
                if math.isnan(value):
                    raise self._broken(f"{self.metric} of {unit}")
            self._scores = scores
        return self._scores

    def scores(self) -> Mapping[Unit, float]:
        """The score of every unit of the dense model, low goes first."""
        return self.scored().values

    def streams(self, tokens: str) -> dict[str, Scores]:
        """The scores of every unit under every one-pass metric, from one walk."""
        if tokens not in self._streams:
            self._streams[tokens] = stream_scores(
                self.model, self.data, tokens=tokens, progress=self._progress("walking through the blocks")
            )
        return self._streams[tokens]

    def leave_one_out(self) -> Scores:
        """The rise of the loss without each unit, each measured once."""
        return loss(self, self.units)

    def windows(self, windows: Sequence[tuple[Unit, ...]]) -> list[float]:
        """The score of dropping several consecutive units together.

        Under ``loss`` the rise of the loss; whole blocks under a one-pass metric the distance across them all; else the
        sum of the units' scores.
        """
        if self.metric == "loss":
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

    def losses(self, gone: Sequence[frozenset[Unit]]) -> Losses:
        """The losses of the model without each of these sets of units; each set is measured once.

        Raises ``CheckpointError`` where the dense model has none that is finite.
        """
        missing = list(dict.fromkeys(units for units in gone if units not in self._known))
        if missing:
            what = f"measuring {len(missing)} variant{'s' * (len(missing) != 1)}"
            result = losses(self.model, self.data, missing, memory=self.memory, progress=self._progress(what))
            for units, nll in zip(missing, result.nll, strict=True):
                if not units and not np.isfinite(nll).all():
                    raise self._broken("the loss")
                self._known[units] = nll
                self._write({"gone": sorted(map(str, units)), "nll": nll.tolist()})
        self._asked.update(gone)
        tokens = (self.data.mask[:, 1:] & self.data.mask[:, :-1]).sum(1).double().numpy()
        return Losses(np.stack([self._known[units] for units in gone]), tokens)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what} is not a number for {self.model.reference.id} on {self.data.name}: its weights are damaged, or it "
            "overflows; try another --dtype"
        )

    def _progress(self, what: str) -> Callable[[float, float], None] | None:
        show = self._show
        return None if show is None else lambda done, total: show(what, done, total)

    def _header(self) -> dict[str, Any]:
        dtype = str(next(self.model.net.parameters()).dtype)
        return {"fingerprint": self.model.reference.fingerprint, "digest": self.data.digest, "dtype": dtype}

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
                gone, nll = frozenset(map(Unit.parse, fields["gone"])), np.array(fields["nll"], dtype=np.float64)
            except (ValueError, TypeError, KeyError, PlanError):
                break
            self._known[gone] = nll
            good += line + b"\n"
        memo.write_bytes(good)
