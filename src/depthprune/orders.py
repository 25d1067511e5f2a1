"""Quantizing and pruning, in both orders: what each leaves of a model's predictions."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import transformers

from depthprune.data import Data, Mixture
from depthprune.evaluate import Windows, perplexity
from depthprune.export.quantize import quantize, silence
from depthprune.export.ways import LLM_COMPRESSOR, WAYS
from depthprune.files import read_json
from depthprune.model import Model, auto_name
from depthprune.plan import Plan
from depthprune.surgery import drop, without


class Orders:
    """A model, quantized in one way, and what is left of it, on a text, once a plan is carried out before or after."""

    def __init__(self, model: Model, how: str, text: Windows, rows: Data | Mixture | None, scratch: Path) -> None:
        """Quantize the dense model. Raises what ``quantize`` raises."""
        self.model, self.how, self.text, self.scratch = model, how, text, scratch
        self.quantized, self.bytes = self._packed(model, rows)
        self.loss = perplexity(self.quantized, text).loss

    def first(self, plan: Plan) -> float:
        """The loss where the model is quantized, and then pruned."""
        with without(self.quantized, plan.drop):
            return perplexity(self.quantized, self.text).loss

    def then(self, plan: Plan, rows: Data | Mixture | None) -> tuple[float, int]:
        """The loss where the model is pruned, and what is left quantized; and the bytes of the weights."""
        packed, size = self._packed(drop(self.model, plan), rows)
        return perplexity(packed, self.text).loss, size

    def _packed(self, model: Model, rows: Data | Mixture | None) -> tuple[Model, int]:
        """The model as its quantized folder is read again, and the bytes of its weights."""
        dtype = next(model.net.parameters()).dtype if WAYS[self.how].library == LLM_COMPRESSOR else "auto"
        with tempfile.TemporaryDirectory(dir=self.scratch) as home:
            folder = quantize(model, Path(home) / "packed", self.how, rows)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            auto = getattr(transformers, auto_name(read_json(folder / "config.json")))
            with silence():
                net = auto.from_pretrained(folder, dtype=dtype, device_map={"": str(model.device)})
        return replace(model, net=net.eval()), size
