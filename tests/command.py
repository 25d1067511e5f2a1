"""The command line in this process, and a small real model with texts to use it on."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_text
from depthprune import cli, hub, runtimes
from depthprune.export import Proof
from families import tiny

WORDS = 92  # of the tokenizer's, those that the tiny models have embeddings for
SMALL = ("--sequences", "8", "--length", "32")


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.endswith(lines[0] + "\n"), self.err
        return lines[0].removeprefix("error: ")


def run(*words: object) -> Done:
    """Run the command line as a shell would, within this process."""
    out, err, code = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["depthprune", *map(str, words)])
        patch.setattr(hub, "away", lambda: "HF_HUB_OFFLINE is set")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as exit:
                code = exit.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def interrupt(*_: object, **__: object) -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def hold(*_: object, **__: object) -> Any:
    """Stand in for the proofs where they are not what a test is about: each starts a process."""
    return _Held()


class _Held(dict[Path, list[Proof]]):
    def __missing__(self, key: Path) -> list[Proof]:
        return [Proof("assumed", True, "")]


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the fresh process."""
    monkeypatch.setattr(runtimes, "check_many", hold)


@pytest.fixture
def desk(tmp_path: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, to work in, with the model and the texts of the workshop."""
    for item in workshop.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts, good ones and bad ones."""
    return furnish(tmp_path_factory.mktemp("workshop"))


def furnish(folder: Path) -> Path:
    """Fill a folder with a tiny model, another one, and texts."""
    tokenizer = tiny_text.make_tokenizer()
    for name, seed in (("model", 0), ("other-model", 5)):
        tiny("llama", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    for name, count, known in (("text.txt", 3000, WORDS), ("test.txt", 1500, WORDS), ("wide.txt", 3000, 400)):
        (folder / name).write_text(" ".join(f"w{draw.randrange(known)}" for _ in range(count)), encoding="utf-8")
    return folder


def copy(model: Path, to: Path) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(model.resolve(), to))


def leftovers(folder: Path) -> list[str]:
    """What is half-written: everything is first made under a hidden name."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
