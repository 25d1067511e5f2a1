"""The stages that leave a file: scores, evaluation, speed, and what a run found in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthprune.bench import bench
from depthprune.console import Console
from depthprune.evaluate import Windows, perplexity
from depthprune.files import read_json
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.scores import Scores
from depthprune.units import Unit

REPEATS = 5


def describe(model: Model) -> str:
    """A model in a line."""
    layout = model.layout
    return (
        f"{type(model.net).__name__}: {len(layout.blocks)} blocks, {model.parameters:,} parameters "
        f"({layout.parameters:,} in blocks), {layout.kv_bytes_per_token:,} bytes of KV cache per token"
    )


def scores_json(model: Model, found: Mapping[str, Scores], units: Sequence[Unit]) -> dict[str, Any]:
    """Scores with the units they are of, as plain values."""
    layout = model.layout
    return {
        "format": 1,
        "model": {"id": model.reference.id, "blocks": len(layout.blocks)},
        "layout": [
            {"unit": str(u), "kind": layout.kind(u), "parameters": layout.freed(frozenset((u,)))} for u in units
        ],
        "protected": [],
        "metrics": {name: measured.to_json() for name, measured in found.items()},
    }


def evaluate(
    models: Mapping[str, Model],
    text: Windows,
    console: Console,
    *,
    overlap: float | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """``eval.json``: the perplexity and sizes of several models on one text."""
    entries = []
    for number, (name, model) in enumerate(models.items(), start=1):
        measured = perplexity(model, text, show=console.show)
        written = folder is not None and model.plan is not None and number == len(models)
        files = list(folder.glob("*.safetensors")) if folder is not None and written else []
        entries.append(
            {
                "name": name,
                "path": model.reference.id if not files else "model",
                "perplexity": measured.perplexity,
                "loss": measured.loss,
                "parameters": model.parameters,
                "bytes": sum(file.stat().st_size for file in files) or model.bytes,
                "kv_bytes_per_token": model.layout.kv_bytes_per_token,
            }
        )
        console.say(f"  {name}: perplexity {measured.perplexity:.3f} over {measured.tokens:,} tokens")
    described = text.data.describe()
    head = {"name": described["name"], "tokens": int(text.scored.sum()), "digest": described["digest"]}
    return {
        "format": 1,
        "text": head,
        "window": text.data.length,
        "stride": text.stride,
        "overlap": overlap,
        "models": entries,
    }


def speed(
    models: Mapping[str, Model], *, batch: int = 1, prompt: int = 256, new: int = 32, seed: int = 0
) -> dict[str, Any]:
    """``bench.json``: prefill and decoding speed, the models in turn; shorter where the model has fewer positions."""
    room = min([model.positions for model in models.values() if model.positions is not None] or [1 << 30])
    if prompt + new > room:
        new = max(1, min(new, room // 4))
        prompt = max(1, room - new)
    nets = {name: model.net for name, model in models.items()}
    return bench(nets, batch=batch, prompt=prompt, new=new, repeats=REPEATS, seed=seed)


def summarize(out: Path) -> dict[str, Any]:
    """What a run found, in a few numbers."""
    plan, measured = Plan.load(out / "plan.json"), read_json(out / "eval.json")["models"]
    dense, pruned = measured[0], measured[-1]
    summary: dict[str, Any] = {
        "drop": [str(unit) for unit in plan.drop],
        "result": pruned["name"],
        "evaluations": plan.why.get("evaluations"),
        "perplexity": [dense["perplexity"], pruned["perplexity"]],
        "parameters": [dense["parameters"], pruned["parameters"]],
        "bytes": [dense["bytes"], pruned["bytes"]],
        "kv_bytes_per_token": [dense["kv_bytes_per_token"], pruned["kv_bytes_per_token"]],
    }
    if (out / "bench.json").is_file():
        first, *_, last = read_json(out / "bench.json")["models"]
        for name in ("prefill_ms", "decode_ms_per_token"):
            if first.get(name) is not None:
                summary[name] = [first[name], last[name]]
    return summary
