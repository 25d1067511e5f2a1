"""What a person sees: lines, tables and progress bars with time left. No torch."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as Screen
from rich.console import Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from depthprune.errors import DepthpruneError
from depthprune.files import to_json


class Console:
    """Where messages go: progress and remarks to standard error, results to standard output.

    ``quiet`` leaves only results and errors; ``as_json`` makes the result one JSON document; ``keep`` keeps every line.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json
        self._lines: list[str] = []
        self._log: Path | None = None
        self._err = Screen(stderr=True, highlight=False, soft_wrap=True)
        self._out = Screen(highlight=False, soft_wrap=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}

    def keep(self, log: Path) -> None:
        """Write the lines so far, and every one to come, to the end of a file."""
        self._log, lines = log, self._lines
        self._lines = []
        for line in lines:
            self._append(line)

    def note(self, text: str) -> None:
        """Keep a line in the log, with the time, and show it to nobody."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
        if self._log is None:
            self._lines.append(line)
        else:
            self._append(line)

    def _append(self, line: str) -> None:
        assert self._log is not None
        with self._log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def say(self, text: str) -> None:
        """A remark about what is going on."""
        self.note(text)
        if not self.quiet:
            self._err.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A warning, shown even when quiet."""
        self.note(f"warning: {text}")
        self._err.print(f"warning: {text}", markup=False, style="yellow")

    def result(self, value: Any, text: str | Table | Group | None = None) -> None:
        """The outcome of a command: as text or tables, or as JSON when asked for."""
        if isinstance(text, str):
            self.note(text)
        if self.as_json:
            print(to_json(value))
        elif isinstance(text, (Table, Group)):
            self._out.print(text)
        elif text is not None:
            self._out.print(text, markup=False)

    def show(self, what: str, done: float, total: float) -> None:
        """Move the progress bar of some work; it appears with the first call and goes when the work is done."""
        if self.quiet or not self._err.is_terminal:
            return
        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=self._err, transient=True)
            self._bars.start()
        if what not in self._tasks:
            for task in self._tasks.values():
                self._bars.remove_task(task)
            self._tasks = {what: self._bars.add_task(what, total=total)}
        self._bars.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the progress bar away."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Show Python warnings as one line each."""

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            self.warn(" ".join(str(message).split()))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield


class _Stop(KeyboardInterrupt):
    """Ctrl-C. CPython kills itself at its end if a plain one passed through an ``exec``, even when it was caught."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C a ``KeyboardInterrupt`` that, once caught, leaves the exit code alone."""

    def stop(*_: object) -> None:
        raise _Stop

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def resumable(run: Path, console: Console) -> Iterator[None]:
    """Say how to go on with a run that was stopped, or had not the memory."""
    try:
        yield
    except KeyboardInterrupt:
        console.close()
        raise DepthpruneError(f"stopped; the same command with --resume finishes {run}") from None
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        way = "try the same command with --resume and a smaller --memory, or --device cpu, to finish"
        raise DepthpruneError(f"out of memory; {way} {run}") from None


def no_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full, torch's own among them."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A plain table, numbers to the right."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    for row in rows:
        made.add_row(*row)
    return made


def human(count: float) -> str:
    """A number of bytes or parameters in a few characters: ``7.9M``."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if unit == "" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def die(text: str) -> None:
    """The one line of an error."""
    print(f"error: {text.strip()}", file=sys.stderr)
