"""The main job: from a model and a budget to a folder that is proven, measured and reported.

    plan -> drop -> write -> check -> eval -> bench -> report

Every stage leaves one file in the run folder, written whole or not at all, and every measured loss is kept, so a run
that was stopped at any moment goes on where it was.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from depthprune import sources, tables
from depthprune.bench import bench
from depthprune.console import Console
from depthprune.data import Data, Mixture, calibrate, check_vocabulary, overlap, warn_overlap
from depthprune.errors import DepthpruneError, OptionError
from depthprune.evaluate import Windows, fits, perplexity, windows
from depthprune.export import check_many, expect, export
from depthprune.files import place, read_json, why, write_json
from depthprune.mixed import AnyOracle, oracle
from depthprune.model import Model, load
from depthprune.plan import Plan
from depthprune.planning import candidates, choose, protected, settle, stability
from depthprune.report import report
from depthprune.scores import Scores
from depthprune.surgery import drop
from depthprune.units import Unit

REPEATS = 5
MEANS = {"memory", "device", "bench"}  # settings that change how a run is done and not what it finds


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
    recover: str = "none"
    bench: bool = True
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    memory: int | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False


def prune(
    settings: Settings, out: str | Path, console: Console, *, resume: bool = False, overwrite: bool = False
) -> bool:
    """Do the whole job in a run folder; True if every proof held.

    The folder is touched only once model, budget and texts are known to be good.
    Raises the errors of the stages; ``OptionError`` where the folder holds another run.
    """
    out = Path(out)
    _examine(settings, out, resume=resume, overwrite=overwrite)
    if resume and all((out / name).exists() for name in _files(settings)):
        console.keep(out / "log.txt")
        console.say("every stage of this run is done")
        return _conclude(out, console)
    console.say(f"loading {settings.model}")
    model = load_as(settings)
    budget, unit = settle(settings.drop, settings.unit, model.layout)
    if settings.form == "plain" and unit != "block":
        raise OptionError("--form plain holds whole blocks only: add --unit block, or use --form hf")
    units = budget.candidates(model.layout, candidates(model.layout, unit, settings.protect))
    console.say(f"{describe(model)}; {len(units)} units may be dropped")
    data, text = _texts(settings, model, console)
    check_vocabulary(data, model.vocabulary)
    known = oracle(model, data, metric=settings.metric, units=units)  # data may lack what the metric measures
    console.say(f"choosing on {known.sequences} sequences of {data.name}")
    fits(model, text)
    if warning := warn_overlap(data, text.data):
        console.warn(warning)
    _claim(settings, out, overwrite=overwrite)
    console.keep(out / "log.txt")
    if (out / "plan.json").is_file():
        before = Plan.load(out / "plan.json").why.get("data", {}).get("digest")
        if before != data.digest:
            raise OptionError(f"{settings.data} is not what it was when {out} began; --overwrite starts again")
    else:
        asked = oracle(
            model,
            data,
            metric=settings.metric,
            units=units,
            memory=settings.memory,
            memo=out / "losses.jsonl",
            show=console.show,
            say=console.say,
        )
        plan = choose(
            asked, budget, units, unit=unit, select=settings.select, seed=settings.seed, recipe=settings.recipe
        )
        write_json(out / "scores.json", scores(asked, unit, settings))
        if settings.stability:
            stable = _stability(settings, model, unit, console, out)
            console.say(tables.stable(stable, plan.drop))
            plan = replace(plan, why={**plan.why, "stability": stable})
        plan.save(out / "plan.json")
    plan = Plan.load(out / "plan.json")
    console.say(f"dropping {plan.describe()}, measured {plan.why.get('evaluations')} variants")
    smaller = drop(model, plan)
    if not (out / "model").is_dir():
        export(smaller, out / "model", settings.form)
    if not (out / "check.json").is_file():
        console.say("proving it in a fresh process")
        proofs = check_many({out / "model": expect(model, plan)}, device=str(model.device))[out / "model"]
        passed = all(proof.passed for proof in proofs)
        write_json(out / "check.json", {"format": 1, "passed": passed, "proofs": [p.to_json() for p in proofs]})
        for proof in proofs:
            console.say(f"  {'ok  ' if proof.passed else 'FAIL'} {proof.name}: {proof.detail}")
    pair = {"dense": model, "pruned": smaller}
    if not (out / "eval.json").is_file():
        shared = overlap(data, text.data)
        write_json(out / "eval.json", evaluate(pair, text, console, overlap=shared, folder=out / "model"))
    if settings.bench and not (out / "bench.json").is_file():
        console.say("measuring speed, the two in turn")
        write_json(out / "bench.json", speed(pair, seed=settings.seed))
    return _conclude(out, console)


def _stability(settings: Settings, model: Model, unit: str, console: Console, out: Path) -> dict[str, Any]:
    """Choose again on other draws of the calibration rows."""
    seeds = range(settings.seed + 1, settings.seed + settings.stability + 1)
    return stability(
        model,
        settings.drop,
        (_rows(settings, model, settings.sequences, seed) for seed in seeds),
        unit=unit,
        metric=settings.metric,
        select=settings.select,
        protect=settings.protect,
        memory=settings.memory,
        memo=out / "losses.jsonl",
        show=console.show,
    )


def _rows(settings: Settings, model: Model, sequences: int, seed: int) -> Data | Mixture:
    """Calibration rows; those of a recipe are cut to the model's positions, as papers had longer models."""
    length, most = settings.length, model.positions
    if settings.recipe is not None and most is not None:
        length = min(length, most)
    options: dict[str, Any] = {"length": length, "seed": seed, "field": settings.field}
    return calibrate(settings.data, model.tokenizer, sequences=sequences, **options)


def _files(settings: Settings) -> tuple[str, ...]:
    """What the stages leave in the run folder."""
    bench = ("bench.json",) if settings.bench else ()
    return ("scores.json", "plan.json", "model", "check.json", "eval.json", *bench)


def _conclude(out: Path, console: Console) -> bool:
    page = report(out)
    passed = bool(read_json(out / "check.json")["passed"])
    summary = summarize(out)
    console.result(
        summary | {"report": str(page), "passed": passed}, tables.conclusion(summary, out, page, passed=passed)
    )
    return passed


def load_as(settings: Settings) -> Model:
    """The model as the settings say."""
    return load(
        settings.model,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        tokenizer=settings.tokenizer,
        allow_pickle=settings.allow_pickle,
        trust_remote_code=settings.trust_remote_code,
    )


def describe(model: Model) -> str:
    """A model in a line."""
    layout = model.layout
    return (
        f"{type(model.net).__name__}: {len(layout.blocks)} blocks, {model.parameters:,} parameters "
        f"({layout.parameters:,} in blocks), {layout.kv_bytes_per_token:,} bytes of KV cache per token"
    )


def _asked(settings: Settings) -> dict[str, Any]:
    return {key: value for key, value in asdict(settings).items() if value is not None}


def _examine(settings: Settings, out: Path, *, resume: bool, overwrite: bool) -> None:
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
    named = sorted(key for key in {*before, *asked} - MEANS if before.get(key) != asked.get(key))
    if named:
        differ = ", ".join(f"{key} was {before.get(key)!r}, now {asked.get(key)!r}" for key in named)
        raise OptionError(f"--resume: {out} was started with other settings: {differ}")


def _spare(settings: Settings, out: Path) -> None:
    """Refuse to replace a folder that the run is to read from."""
    texts = [source.path for text in (settings.data, settings.text) if text for source in sources.parse(text)]
    folder = out.resolve()
    for given in (settings.model, settings.tokenizer, *texts):
        path = Path(given or "").expanduser()
        if given and path.exists() and folder in {*_above(path.resolve()), *_above(Path(os.path.abspath(path)))}:
            raise OptionError(f"--overwrite would delete {given}, which this run reads; name another --out")


def _above(path: Path) -> tuple[Path, ...]:
    return (path, *path.parents)


def _claim(settings: Settings, out: Path, *, overwrite: bool) -> None:
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


def _texts(settings: Settings, model: Model, console: Console) -> tuple[Data | Mixture, Windows]:
    """The calibration rows, and the windows to evaluate on: another text, or rows of the same that are not used."""
    if settings.text is not None:
        data = _rows(settings, model, settings.sequences, settings.seed)
        window = min(settings.length, model.positions or settings.length)
        window = window if settings.window is None else settings.window
        cut: dict[str, Any] = {
            "window": window,
            "stride": settings.stride,
            "limit": settings.windows,
            "field": settings.field,
        }
        return data, windows(settings.text, model.tokenizer, **cut)
    extra = max(1, settings.sequences // 2)
    rows = _rows(settings, model, settings.sequences + extra, settings.seed)
    if isinstance(rows, Mixture) or rows.scored is not None:
        raise OptionError(f"{rows.name} is a task: give --text FILE, a text to evaluate on")
    if rows.sequences < 2:
        raise DepthpruneError(
            f"{rows.name} holds one sequence of {rows.length} tokens: too few to choose and evaluate on; "
            f"give more text, --text FILE, or a smaller --length"
        )
    held = min(extra, max(1, rows.sequences // 3))
    data = rows.head(rows.sequences - held)
    held_out = rows.tail(held)
    others = f"{held} other row{'s' * (held != 1)}"
    console.say(f"no --text: evaluating on {others} of the calibration text; an independent text is better")
    scored = held_out.mask.clone()
    scored[:, 0] = False
    return data, Windows(held_out, scored, rows.length)


def scores(oracle: AnyOracle, unit: str, settings: Settings) -> dict[str, Any]:
    """``scores.json`` of a run: the scores that chose, those that cost one walk, and what was protected."""
    layout = oracle.model.layout
    found: dict[str, Scores] = {oracle.spec: oracle.scored()}
    found |= {name: measured for name, measured in oracle.streams("all").items() if name not in found}
    every = (*layout.units("block"), *(u for u in layout.units("any") if u.sublayer))
    kept = [str(u) for u in protected(layout, unit, settings.protect)]
    return scores_json(oracle.model, found, every) | {"protected": kept}


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
    for name, model in models.items():
        measured = perplexity(model, text, show=console.show)
        files = list(folder.glob("*.safetensors")) if folder is not None and model.plan is not None else []
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
