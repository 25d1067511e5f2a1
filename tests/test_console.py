"""The console: who sees what, and where."""

from __future__ import annotations

import json
import math
import signal
import warnings
from pathlib import Path

import pytest

from depthprune.console import Console, die, human, interruptible, resumable, table
from depthprune.errors import DepthpruneError


def test_remarks_go_to_standard_error_and_results_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("reading [bold]text[/bold]")
    console.warn("few")
    console.result({"a": 1}, "a is 1")
    shown = capsys.readouterr()
    assert shown.err == "reading [bold]text[/bold]\nwarning: few\n"  # names in brackets are no markup
    assert shown.out == "a is 1\n"


def test_quiet_leaves_warnings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.say("reading")
    console.warn("few")
    console.result({}, "done")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("done\n", "warning: few\n")


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"units": ["1.mlp"], "loss": 2.5, "none": None}
    Console(as_json=True).result(value, table(("a",), [("1",)]))
    assert json.loads(capsys.readouterr().out) == value


def test_json_is_json_whatever_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).result({"loss": math.nan, "scores": [math.inf, 1.0]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "scores": [None, 1.0]}


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "stopped; the same command with --resume finishes run"),
        (MemoryError(), "out of memory; try the same command with --resume and a smaller --memory"),
        (OutOfMemoryError("tried"), "out of memory; try the same command with --resume and a smaller --memory"),
    ],
)
def test_a_run_that_stops_says_how_it_goes_on(error: BaseException, says: str) -> None:
    with pytest.raises(DepthpruneError) as caught, resumable(Path("run"), Console()):
        raise error
    assert str(caught.value).startswith(says)


def test_a_defect_is_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="an invariant"), resumable(Path("run"), Console()):
        raise RuntimeError("an invariant")


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    line = "word " * 60 + "end"
    console = Console()
    console.say(line)
    console.result(None, line)
    shown = capsys.readouterr()
    assert shown.err == shown.out == line + "\n"


def test_a_log_keeps_every_line_from_the_first(tmp_path: Path) -> None:
    console, log = Console(quiet=True), tmp_path / "log.txt"
    console.say("before")
    log.write_text("an earlier run\n", encoding="utf-8")
    console.keep(log)
    console.say("after")
    console.warn("few")
    console.result({}, "two\nlines")
    first, *rest = log.read_text(encoding="utf-8").splitlines()
    assert first == "an earlier run"
    assert [line[20:] for line in rest if line != "lines"] == ["before", "after", "warning: few", "two"]
    assert all(line[:2] == "20" and line[4] == "-" for line in rest if line != "lines")  # the time


def test_progress_appears_only_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for done in range(4):
        console.show("measuring", done, 3)
    console.close()
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_comes_and_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    console.show("measuring", 0, 3)
    console.show("walking", 1, 2)  # another kind of work takes its place
    assert list(console._tasks) == ["walking"]
    console.show("walking", 2, 2)
    assert console._bars is None and not console._tasks
    assert "walking" in capsys.readouterr().err


def test_warnings_become_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    with console.warnings():
        warnings.warn("only\n  three rows", UserWarning, stacklevel=1)
        warnings.warn("library business", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: only three rows\n"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    die("no such model\n")
    assert capsys.readouterr().err == "error: no such model\n"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (999, "999"), (1000, "1.0k"), (7_900_000, "7.9M"), (3e9, "3.0G"), (2e12, "2.0T")]
)
def test_human(count: float, shown: str) -> None:
    assert human(count) == shown


def test_an_interrupt_is_a_keyboard_interrupt_of_its_own() -> None:
    """CPython remembers a plain one that went through ``exec``, and dies of it in the end; see test_cli."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruptible(), pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
        assert caught.type is not KeyboardInterrupt
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
