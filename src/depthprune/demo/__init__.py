"""The demo: a small real model and two texts that travel with the package, so that the first run needs no network.

README.md beside this file says what they are and where they come from.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import tempfile
from pathlib import Path

from depthprune.errors import CheckpointError, DepthpruneError
from depthprune.files import why

HERE = Path(__file__).parent
NAME = "tinybooks-16l"
ARCHIVE = HERE / NAME / "model.safetensors.xz"
SHA256 = "f2b5e50dc8f8c4a8b452ee0a7f81e7df5f68ac695c3c1cecae0b8144d1074e07"

CALIBRATION = HERE / "calibration.txt.xz"
"""Eleven books that the demo model was not trained on: choose by this text."""

TEST = HERE / "test.txt.xz"
"""Six other books that it was not trained on either: report on this text."""


def cache() -> Path:
    """Name the folder that the demo model is unpacked to by default.

    It lies under ``$XDG_CACHE_HOME`` where that is an absolute path, and under ``~/.cache`` otherwise.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "depthprune" / "demo" / NAME


def unpack(destination: Path | None = None, *, archive: Path = ARCHIVE) -> Path:
    """Unpack the demo model, ready to load, and return its folder.

    ``destination`` is that folder; by default it is ``cache()``. Files that are there already and right are kept, so
    that a second call costs one hash over 16 MB; every other file is written beside its place and renamed into it,
    the weights last. Raises ``CheckpointError`` where the archive is damaged (the folder then gets no weights), and
    ``DepthpruneError`` where the folder cannot be written.
    """
    folder = cache() if destination is None else destination
    try:
        return _unpack(archive, folder)
    except OSError as error:
        raise DepthpruneError(f"cannot unpack the demo model into {folder}: {why(error)}") from None


def _unpack(archive: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(archive.parent.glob("*.json")):
        target, content = folder / source.name, source.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            _place(content, target)
    weights = folder / "model.safetensors"
    if not weights.is_file() or _digest(weights.read_bytes()) != SHA256:
        _place(_weights(archive), weights)
    return folder


def _weights(archive: Path) -> bytes:
    try:
        content = lzma.decompress(archive.read_bytes())
    except lzma.LZMAError as error:
        raise CheckpointError(f"{archive}: the demo model is damaged ({error}); install depthprune again") from error
    if _digest(content) != SHA256:
        raise CheckpointError(f"{archive}: the demo model is not the one that belongs here; install depthprune again")
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _place(content: bytes, target: Path) -> None:
    # A temporary name of its own, so that two processes that unpack at once do not write into each other's file.
    handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    finally:
        Path(beside).unlink(missing_ok=True)
