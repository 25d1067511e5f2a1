"""Make deep language models shallower: find the layers a model can do without, drop them, prove that the result loads.

    import depthprune as dp

    model = dp.load("path/or/hub-id")
    data = dp.calibrate("text.txt", model.tokenizer)
    plan = dp.select(model, "25%", data=data, unit="any")
    smaller = dp.drop(model, plan)
    dp.export(smaller, "smaller")

Importing it loads neither torch nor transformers; it also lets plain ``from_pretrained`` load folders whose sublayers
were dropped.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

import wrapt

__version__ = "0.1.0"

_WHERE = {
    "BudgetError": "errors",
    "CheckpointError": "errors",
    "Data": "data",
    "DataError": "errors",
    "DepthpruneError": "errors",
    "ExportError": "errors",
    "Layout": "layout",
    "LayoutError": "errors",
    "Losses": "scores",
    "Model": "model",
    "OptionError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "Scores": "scores",
    "Unit": "units",
    "bench": "bench",
    "calibrate": "data",
    "check": "export",
    "drop": "surgery",
    "export": "export",
    "from_texts": "data",
    "load": "model",
    "losses": "variants",
    "perplexity": "evaluate",
    "recover": "recover.apply",
    "report": "report",
    "score": "planning",
    "select": "planning",
    "windows": "evaluate",
    "without": "surgery",
}
__all__ = sorted([*_WHERE, "__version__"])


class _Package(ModuleType):
    """Keeps a public function where a submodule of the same name (``report``, say) would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'depthprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"depthprune.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _teach(modeling_utils: Any) -> None:
    """Let every transformers model build itself without the sublayers that its configuration says were dropped."""
    original = modeling_utils.PreTrainedModel.post_init

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        if getattr(self.config.get_text_config(decoder=True), "depthprune", None):
            importlib.import_module("depthprune.skip").skip_sublayers(self)

    modeling_utils.PreTrainedModel.post_init = post_init


sys.modules[__name__].__class__ = _Package
wrapt.register_post_import_hook(_teach, "transformers.modeling_utils")
