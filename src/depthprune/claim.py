"""What a run of ``prune`` was asked to do, and the folder that it claims."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthprune import prompts, sources
from depthprune.errors import DepthpruneError, OptionError
from depthprune.files import place, read_json, why, write_json

MEANS = {"memory", "device", "bench", "place"}  # settings that change how a run is done and not what it finds
RECOVERS = {"recover", "recover_data", "recover_sequences"}  # these may change until weights are recovered


@dataclass(frozen=True)
class Settings:
    """What a run was asked to do; a resumed run must be asked for the same, by whatever ``MEANS``."""

    model: str
    drop: str
    data: str
    unit: str = "any"
    metric: str = "loss"
    select: str | None = None
    protect: str | None = None
    recipe: str | None = None
    stability: int = 0
    text: str | None = None
    sequences: int = 64
    length: int = 512
    window: int | None = None
    stride: int | None = None
    windows: int = 256
    field: str = "text"
    form: str = "hf"
    recover: str = "refit"
    recover_data: str | None = None
    recover_sequences: int | None = None
    bench: bool = True
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    memory: int | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    place: str = "whole"


def _asked(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if value is not None}


def examine(settings: Settings, out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse the run folder, or not: another run's is only replaced when asked, and only resumed as it was."""
    if resume and overwrite:
        raise OptionError("--resume finishes a run, --overwrite begins it again: choose one")
    if not (out.is_dir() and any(out.iterdir())):
        place(out, folder=True)
        return
    if not (out / "run.json").is_file():
        raise OptionError(f"--out {out} holds something that is no run of depthprune; name another folder")
    if overwrite:
        _spare(settings, out)
        return
    if not resume:
        raise OptionError(f"--out {out} holds a run already; add --resume to finish it or --overwrite to replace it")
    asked, record = _asked(settings), read_json(out / "run.json")
    before = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(before, dict):
        raise OptionError(f"--resume: {out / 'run.json'} is not that of a run; --overwrite starts again")
    free = MEANS if (out / "model").is_dir() else MEANS | RECOVERS
    if settings.form != "plain" and not (out / "check.json").is_file():
        free = free | {"form"}  # one that could not be written gives way to another
    named = sorted(key for key in {*before, *asked} - free if before.get(key) != asked.get(key))
    if named:
        differ = ", ".join(f"{key} was {before.get(key)!r}, now {asked.get(key)!r}" for key in named)
        raise OptionError(f"--resume: {out} was started with other settings: {differ}")


def _spare(settings: Settings, out: Path) -> None:
    """Refuse to replace a folder that the run is to read from."""
    read = [settings.data, settings.text, settings.recover_data]
    if settings.recover_data and prompts.asked(settings.recover_data):
        read[-1] = prompts.settings_of(settings.recover_data).prompts
    texts = [source.path for text in read if text for source in sources.parse(text)]
    folder = out.resolve()
    for given in (settings.model, settings.tokenizer, *texts):
        path = Path(given or "").expanduser()
        if given and path.exists() and folder in {*_above(path.resolve()), *_above(Path(os.path.abspath(path)))}:
            raise OptionError(f"--overwrite would delete {given}, which this run reads; name another --out")


def _above(path: Path) -> tuple[Path, ...]:
    return (path, *path.parents)


def claim(settings: Settings, out: Path, *, overwrite: bool) -> None:
    """Take the run folder that was examined: empty it first if it is to be replaced."""
    if overwrite and out.is_dir():
        try:
            shutil.rmtree(out)
        except OSError as error:
            raise DepthpruneError(f"cannot replace {out}: {why(error)}") from None
    if not (out / "run.json").is_file():
        record = {"format": 1, "settings": _asked(settings), "command": command(settings, out)}
        write_json(out / "run.json", record)


def command(settings: Settings, out: Path) -> str:
    """The command line that makes this run."""
    words = ["depthprune", "prune", settings.model, "--out", str(out)]
    for key, value in asdict(settings).items():
        if key == "model" or value is None or value == Settings.__dataclass_fields__[key].default:
            continue
        flag = f"--{key.replace('_', '-')}"
        words += ["--no-bench"] if key == "bench" else [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
