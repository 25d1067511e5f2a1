"""What a recoverer is given: the cut model to fill, the dense one to learn from, and rows of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from depthprune.data import Data
from depthprune.model import Model
from depthprune.oracle import Show


def silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, eq=False)
class Repair:
    """One recovery: weights of ``model`` may be replaced, its structure may not change.

    ``model.net`` has its own modules but shares weights with the model that the user holds, so a weight is never
    written in place: it is replaced by another parameter. ``teacher`` is the dense model and is only read.
    ``data`` is what to fit or train on; ``held`` are other rows, which decide when to stop and what to keep.
    ``folder`` is where training keeps checkpoints and logs (None: nowhere, so nothing can be resumed); ``resume`` says
    to go on from the last checkpoint there. ``source`` and ``field`` say where the text came from, for recoverers that
    stream more of it than ``data`` holds. ``memory`` bounds the bytes kept on the device beyond the weights.
    """

    model: Model
    teacher: Model
    data: Data
    held: Data
    show: Show | None = None
    say: Callable[[str], None] = silent
    memory: int | None = None
    seed: int = 0
    folder: Path | None = None
    resume: bool = False
    source: str | None = None
    field: str = "text"
