"""The model card of a written folder: what was cut, what it cost, how to load it; without a path of any machine."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from depthprune.errors import CheckpointError
from depthprune.files import read_json
from depthprune.plan import Plan

WARNING = (
    "Perplexity says little about skills such as arithmetic, code or long context, which break first when layers go. "
    "Evaluate your own tasks before you use this model."
)
_MEASURES = (  # file, field, what it is called, how it is shown
    ("eval", "perplexity", "Perplexity", "{:.4g}"),
    ("eval", "parameters", "Parameters", "{:,.0f}"),
    ("eval", "bytes", "Bytes of weights", "{:,.0f}"),
    ("eval", "kv_bytes_per_token", "KV cache, bytes a token", "{:,.0f}"),
    ("bench", "prefill_ms", "Prefill, ms", "{:.4g}"),
    ("bench", "decode_ms_per_token", "Decoding, ms a token", "{:.4g}"),
    ("bench", "decode_tokens_per_second", "Decoding, tokens a second", "{:.4g}"),
    ("bench", "peak_bytes", "Peak memory, bytes", "{:,.0f}"),
)
_PATH = re.compile(
    r"(?<![\w/.])(?:~[\w.-]*|[A-Za-z]:(?=[\\/])|\.{1,2}(?=[\\/]))?(?!//)[\\/][^\s'\",;:]*[^\s'\",;:./\\]"
)
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card(
    folder: str | Path, *, run: str | Path | None = None, license: str | None = None, repo: str | None = None
) -> str:
    """The text of a ``README.md`` for a written folder, with the metadata that the Hub reads.

    What was cut comes from the folder's ``plan.json``; what it cost and gained from ``eval.json``, ``bench.json`` and
    ``check.json`` of the run folder ``run``, as far as they are there. ``license`` is that of the base model, unless
    the card of a base model in a folder says it; ``repo`` is where the folder will be. A model that is named by its
    path is named by the last part of it.
    Raises ``CheckpointError`` where the folder is no model, ``PlanError`` where its plan is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no model: it has no config.json")
    config = read_json(folder / "config.json")
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").is_file() else None
    base = None if plan is None else plan.model.id
    data = ModelCardData(
        base_model=base if base is not None and on_hub(base) else None,
        library_name="transformers",
        tags=["depth-pruning", "depthprune"],
        license=license or license_of(base),
        pipeline_tag="text-generation" if _generates(config) else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo.rpartition('/')[2] if repo else title(folder, run)}",
        _lead(base, config, plan),
        *_cut(plan),
        *_quantized(folder),
        *_recovered(folder),
        *([] if run is None else _measured(Path(run))),
        _loading(config, repo or "REPO"),
        f"## Before you use it\n\n{WARNING}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(folder: Path, run: str | Path | None = None) -> str:
    """What to call a folder: by its own name, or by its run's where it is only called ``model``."""
    own = folder.resolve().name
    return Path(run).resolve().name if own == "model" and run is not None else own


def on_hub(name: str) -> bool:
    """Whether a model's name can only be one of the Hub's: not a path, and no folder here."""
    return _HUB.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def public(name: str) -> str:
    """A model's name as anybody may read it: that of the Hub, or the last part of a path."""
    return name if on_hub(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1] or "a local model"


def scrubbed(value: Any) -> Any:
    """A JSON value in which every path of a machine, whole or within a text, is its last part."""
    if isinstance(value, dict):
        return {key: _last(part) if key == "path" else scrubbed(part) for key, part in value.items()}
    if isinstance(value, list):
        return [scrubbed(part) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "./", "../")) and "\n" not in value and os.path.exists(os.path.expanduser(value)):
        return Path(value).name
    return _PATH.sub(lambda match: re.split(r"[\\/]", match[0])[-1], value)


def _last(path: Any) -> Any:
    """The last part of a path, whatever its other parts are made of; a task stays one."""
    if not isinstance(path, str):
        return scrubbed(path)
    kind = "task:" if path.startswith("task:") else ""
    return kind + re.split(r"[\\/]", path.removeprefix(kind))[-1]


def license_of(base: str | None) -> str | None:
    """The licence that the card of a base model in a folder states; None where there is no such card."""
    readme = None if base is None or on_hub(base) else Path(base).expanduser() / "README.md"
    if readme is None or not readme.is_file():
        return None
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def _generates(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or [""]
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _lead(base: str | None, config: Mapping[str, Any], plan: Plan | None) -> str:
    if base is None:
        return "A language model with layers taken out by depthprune."
    name = f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"`{public(base)}`"
    if _zeroed(plan):
        return f"{name} with layers set to zero by depthprune: it predicts what the pruned model does, in the old size."
    uneven = config.get("depthprune") or (config.get("text_config") or {}).get("depthprune") or config.get("auto_map")
    rest = "" if uneven else ": the same architecture, shallower"
    return f"{name} with layers taken out by depthprune{rest}."


def _zeroed(plan: Plan | None) -> bool:
    return plan is not None and plan.why.get("form") == "zeroed"


def _quantized(folder: Path) -> list[str]:
    if not (folder / "quantization.json").is_file():
        return []
    fields = read_json(folder / "quantization.json")
    made = ", ".join(f"{name} {version}" for name, version in dict(fields.get("made_by") or {}).items())
    return [f"Its weights are quantized afterwards (`{fields.get('how')}`: {fields.get('weights')}; {made})."]


def _cut(plan: Plan | None) -> list[str]:
    if plan is None:
        return []
    kinds = Counter(unit.sublayer or "block" for unit in plan.drop)
    total = f" of {plan.model.blocks}" if plan.model.blocks else ""
    counts = [f"{count}{total if kind == 'block' else ''} {_plural(kind, count)}" for kind, count in kinds.items()]
    freed, why = {} if _zeroed(plan) else plan.frees, plan.why
    gains = []
    if isinstance(share := freed.get("fraction"), int | float):
        gains.append(f"{share:.1%} of the parameters of the blocks")
    if isinstance(cache := freed.get("kv_bytes_per_token"), int | float) and cache:
        gains.append(f"{cache:,.0f} bytes of KV cache a token")
    lines = [f"Gone: {', '.join(counts)}{', which frees ' + ' and '.join(gains) if gains else ''}."]
    lines.append(f"By their places in the original (from 0): `{'`, `'.join(str(unit) for unit in sorted(plan.drop))}`.")
    if plan.stand_in:
        forms = ", ".join(f"{count} x {form}" for form, count in Counter(plan.stand_in.values()).items())
        lines.append(f"In the place of some stands a small part: {forms}.")
    chosen = [f"{key} `{scrubbed(why[key])}`" for key in ("recipe", "metric", "select", "budget") if why.get(key)]
    data = why.get("data")
    if isinstance(data, dict) and data.get("name"):
        tokens = f", {data['tokens']:,} tokens" if isinstance(data.get("tokens"), int) else ""
        chosen.append(f"on `{scrubbed(data['name'])}`{tokens}")
    lines += [f"Chosen by {', '.join(chosen)}. All of it is in `plan.json`."] if chosen else []
    return ["## What was cut", "\n".join(lines)]


def _plural(kind: str, count: int) -> str:
    return kind + "s" * (count != 1) if kind == "block" else f"`{kind}`"


def _recovered(folder: Path) -> list[str]:
    if not (folder / "recovery.json").is_file():
        return []
    fields = read_json(folder / "recovery.json")
    done = [f"`{stage.get('how')}`" for stage in fields.get("stages", ()) if not stage.get("undone")]
    return [f"Weights were recovered after the cut, by {', '.join(done)}: see `recovery.json`."] if done else []


def _measured(run: Path) -> list[str]:
    rows = []
    for file, field, title, form in _MEASURES:
        first, last = _ends(run / f"{file}.json")
        values = [each.get(field) for each in (first, last)]
        if all(isinstance(value, int | float) for value in values):
            rows.append(f"| {title} | {form.format(values[0])} | {form.format(values[1])} |")
    parts = []
    if rows:
        parts = ["## What it cost, and what it gained", "\n".join(["| | before | after |", "|---|---|---|", *rows])]
    if (text := _text(run)) and rows:
        parts.append(f"Perplexity on {text}.")
    if (run / "check.json").is_file():
        found = read_json(run / "check.json")
        names = [str(proof.get("name")) for proof in found.get("proofs", ()) if proof.get("passed")]
        parts += [f"Proven when it was written: {', '.join(names)}."] if found.get("passed") and names else []
    return parts


def _ends(file: Path) -> Sequence[Mapping[str, Any]]:
    """The dense and the last model of a file of measurements; two empty ones where there are none."""
    models = read_json(file).get("models") if file.is_file() else None
    return (models[0], models[-1]) if isinstance(models, list) and len(models) > 1 else ({}, {})


def _text(run: Path) -> str:
    text = read_json(run / "eval.json").get("text") if (run / "eval.json").is_file() else None
    if not isinstance(text, dict) or not text.get("name"):
        return ""
    return f"`{scrubbed(text['name'])}`" + (f", {text['tokens']:,} tokens" if text.get("tokens") else "")


def _loading(config: Mapping[str, Any], repo: str) -> str:
    auto = "AutoModelForCausalLM" if _generates(config) else "AutoModel"
    uneven = config.get("depthprune") or (config.get("text_config") or {}).get("depthprune")
    plain = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{repo}")'
    trusted = f"{plain[:-1]}, trust_remote_code=True)"
    if uneven:
        text = "Its blocks are not all alike, which this repository's own code builds:"
        other = "or, without running code of the repository, with depthprune installed:"
        aware = _code(f"import depthprune\n{plain}")
        return f"## How to load it\n\n{text}\n\n{_code(trusted)}\n\n{other}\n\n{aware}"
    if config.get("auto_map"):
        return f"## How to load it\n\nWith this repository's own code:\n\n{_code(trusted)}"
    needs = "nothing else is needed"
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        needs = f"transformers needs the library for {method} weights"
    return f"## How to load it\n\nAs any model of its architecture; {needs}:\n\n{_code(plain)}"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"
