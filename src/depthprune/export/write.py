"""The one way to write a model: by the name of a form."""

from __future__ import annotations

from pathlib import Path

from depthprune.export import gguf, nemotron_nas
from depthprune.model import Model
from depthprune.registry import find


def ready(model: Model, form: str) -> None:
    """Refuse, before there is anything to write, a form that cannot hold the model or whose tools are missing.

    Raises what ``export`` would.
    """
    _, function, options = find("forms", form)
    if function is nemotron_nas.write:
        nemotron_nas.refuse(model)
    elif function is gguf.write:
        gguf.tools(**options)


def export(model: Model, path: str | Path, form: str = "hf") -> Path:
    """Write a model in a form, by name. Raises ``OptionError`` for a form that does not exist."""
    _, function, options = find("forms", form)
    written: Path = function(model, path, **options)
    return written
