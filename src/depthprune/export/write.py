"""The one way to write a model: by the name of a form."""

from __future__ import annotations

from pathlib import Path

from depthprune.model import Model
from depthprune.registry import find


def export(model: Model, path: str | Path, form: str = "hf") -> Path:
    """Write a model in a form, by name. Raises ``OptionError`` for a form that does not exist."""
    _, function, options = find("forms", form)
    written: Path = function(model, path, **options)
    return written
