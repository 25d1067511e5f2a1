"""Files that appear whole or not at all. No torch."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthprune.errors import DepthpruneError, OptionError


def write_text(path: str | Path, text: str) -> Path:
    """Write a small file beside its place and rename it in. Raises ``DepthpruneError`` where that fails."""
    path = Path(path)
    part = _beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise DepthpruneError(f"cannot write {path}: {why(error)}") from None
    finally:
        if part.is_file():
            part.unlink()
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write a value as indented JSON, whole or not at all."""
    return write_text(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """A value as indented JSON; a figure that is not finite, which JSON has no word for, is null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ``DepthpruneError`` where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DepthpruneError(f"cannot read {path}: {why(error)}") from None
    except ValueError as error:
        raise DepthpruneError(f"{path} is not JSON: {error}") from None


def place(path: str | Path, *, folder: bool = False) -> Path:
    """Check, before long work, that a file can be written at a path, or a new folder where ``folder``.

    Raises ``OptionError`` where something is in the way or the place cannot be written.
    """
    path = Path(path)
    if not folder and path.is_dir():
        raise OptionError(f"cannot write {path}: it is a folder; name a file")
    if folder and path.exists() and not path.is_dir():
        raise OptionError(f"cannot write {path}: it is a file; name a folder")
    if folder and path.is_dir() and any(path.iterdir()):
        raise OptionError(f"cannot write {path}: it holds files already; name a new folder")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise OptionError(f"cannot write {path}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OptionError(f"cannot write {path}: {above} is not writable")
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder beside its place and rename it in when all went well; leave nothing behind when not.

    An existing folder is replaced in the last moment, and put back should that fail.
    Raises ``DepthpruneError`` where the place cannot be written, as when the disk is full.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    part, old = _beside(path, "part"), _beside(path, "replaced")
    try:
        shutil.rmtree(part, ignore_errors=True)
        _put_back(old, path)
        part.mkdir(parents=True)
        yield part
        if path.is_dir():
            os.replace(path, old)
        os.replace(part, path)
    except OSError as error:
        raise DepthpruneError(f"cannot write {path}: {why(error)}") from None
    finally:
        _put_back(old, path)
        shutil.rmtree(part, ignore_errors=True)


def _beside(path: Path, end: str) -> Path:
    if path.name in ("", ".."):
        raise DepthpruneError(f"cannot write {path}: it needs a name of its own")
    return path.with_name(f".{path.name}.{end}")


def _put_back(old: Path, path: Path) -> None:
    """Restore the folder that was set aside if nothing took its place (a killed run leaves it so); else remove it."""
    if old.is_dir():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, path)


def why(error: OSError) -> str:
    """The reason of an operating-system error, in its own words."""
    return error.strerror or str(error)
