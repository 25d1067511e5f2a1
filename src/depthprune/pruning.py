"""The main job: from a model and a budget to a folder that is proven, measured and reported.

    plan -> drop -> recover -> write -> check -> eval -> bench -> report

Every stage leaves one file in the run folder, written whole or not at all, and every measured loss is kept, so a run
that was stopped at any moment goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthprune import prompts, tables
from depthprune.claim import Settings, claim, examine
from depthprune.console import Console
from depthprune.data import Data, Mixture, apart, calibrate, check_vocabulary, overlap, warn_overlap
from depthprune.errors import DataError, DepthpruneError, OptionError
from depthprune.evaluate import Windows, fits, windows
from depthprune.export import expect, expect_as_it_is, export, ready
from depthprune.files import read_json, write_json
from depthprune.mixed import AnyOracle, oracle
from depthprune.model import Model, load
from depthprune.plan import Plan
from depthprune.planning import candidates, choose, protected, settle, stability
from depthprune.recovering import Asked, carried_over, recovered, reopen, text_of
from depthprune.report import report
from depthprune.runtimes import prove_written
from depthprune.scores import Scores
from depthprune.stages import describe, evaluate, scores_json, speed, summarize
from depthprune.surgery import drop, prunable


def prune(
    settings: Settings, out: str | Path, console: Console, *, resume: bool = False, overwrite: bool = False
) -> bool:
    """Do the whole job in a run folder; True if every proof held.

    The folder is touched only once model, budget and texts are known to be good.
    Raises the errors of the stages; ``OptionError`` where the folder holds another run.
    """
    out = Path(out)
    examine(settings, out, resume=resume, overwrite=overwrite)
    if resume and all((out / name).exists() for name in _files(settings)):
        console.keep(out / "log.txt")
        console.say("every stage of this run is done")
        return _conclude(out, console)
    beside = place_beside(settings.form)
    console.say(f"loading {settings.model}")
    model = load_as(settings)
    prunable(model)
    ready(model, settings.form)
    budget, unit = settle(settings.drop, settings.unit, model.layout)
    if settings.form == "plain" and unit != "block":
        raise OptionError("--form plain holds whole blocks only: add --unit block, or use --form hf")
    units = budget.candidates(model.layout, candidates(model.layout, unit, settings.protect))
    console.say(f"{describe(model)}; {len(units)} units may be dropped")
    data, text = _texts(settings, model, console)
    rows = None if (out / "model").is_dir() else _rows_to_recover(settings, model, data, text, console)
    check_vocabulary(data, model.vocabulary)
    known = oracle(model, data, metric=settings.metric, units=units)  # data may lack what the metric measures
    console.say(f"choosing on {known.sequences} sequences of {data.name}")
    fits(model, text)
    if warning := warn_overlap(data, text.data):
        console.warn(warning)
    claim(settings, out, overwrite=overwrite)
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
    pair = {"dense": model, "pruned": drop(model, plan)}
    if not (out / "model").is_dir():
        pair |= _recovered(settings, pair, rows, out, console, text)
        export([*pair.values()][-1], out / "model", "hf" if beside else settings.form)
    elif (out / "model" / "recovery.json").is_file():
        pair["recovered"] = reopen(load_as(replace(settings, model=str(out / "model"))), out / "model")
    if beside and not (out / beside).is_dir():
        console.say(f"writing it as {settings.form}, too")
        export([*pair.values()][-1], out / beside, settings.form)
    if not (out / "check.json").is_file():
        console.say("proving it in a fresh process")
        cut = pair["pruned"].plan or plan
        wanted = expect_as_it_is(pair["recovered"]) if "recovered" in pair else expect(model, cut)
        folders = [out / name for name in ("model", beside) if name]
        proofs = [
            replace(proof, name=f"{folder.name}: {proof.name}") if beside else proof
            for folder in folders
            for proof in prove_written(folder, [*pair.values()][-1], wanted, console.say)
        ]
        passed = all(proof.passed for proof in proofs)
        write_json(out / "check.json", {"format": 1, "passed": passed, "proofs": [p.to_json() for p in proofs]})
        for proof in proofs:
            console.say(f"  {'ok  ' if proof.passed else 'FAIL'} {proof.name}: {proof.detail}")
    if not (out / "eval.json").is_file():
        shared = overlap(data, text.data)
        found = evaluate(pair, text, console, overlap=shared, folder=out / "model")
        if "recovered" in pair:
            found["recovery"] = _told(pair["recovered"], found, text, console)
        write_json(out / "eval.json", found)
    if settings.bench and not (out / "bench.json").is_file():
        console.say("measuring speed, the two in turn")
        name, last = [*pair.items()][-1]
        write_json(out / "bench.json", speed({"dense": model, name: last}, seed=settings.seed))
    return _conclude(out, console)


def place_beside(form: str) -> str:
    """Where a form lies in the run folder that goes beside ``model/``, which transformers loads; empty for none."""
    name = form.partition(":")[0]
    return name if name in ("nemotron-nas", "gguf", "zeroed") else ""


def _asked_of(settings: Settings) -> Asked:
    source = settings.recover_data or settings.data
    return Asked(source, settings.recover_sequences, settings.length, settings.field, settings.seed, settings.memory)


def _rows_to_recover(
    settings: Settings, model: Model, data: Data | Mixture, text: Windows, console: Console
) -> Data | None:
    """Text to recover on that is not evaluated on; None where there is none, or weights are to stay.

    What the model is to write itself is written once the rest is known to be good, so it is None here too.
    Raises ``DataError`` where the source that was named for it is none.
    """
    if settings.recover == "none" or prompts.asked(settings.recover_data or ""):
        return None
    if settings.recover_data is None and (isinstance(data, Mixture) or data.scored is not None):
        console.say(f"{data.name} is a task: give --recover-data TEXT to recover weights; without it nothing is")
        return None
    return _apart(text_of(_asked_of(settings), model), text, console)


def _apart(rows: Data | Mixture, text: Windows, console: Console) -> Data | None:
    """The rows that share nothing with the evaluation text; None, and why, where these are too few."""
    if isinstance(rows, Mixture) or rows.scored is not None:
        raise DataError(f"--recover-data {rows.name} is a task; recovery reads plain text")
    try:
        rows = apart(rows, text.data)
    except DataError as error:
        console.say(f"{error}, so nothing is recovered; give --text FILE or --recover-data TEXT")
        return None
    if rows.sequences < 2:
        console.say(f"too little text in {rows.name} to recover weights on; give --recover-data TEXT")
        return None
    return rows


def _recovered(
    settings: Settings, pair: Mapping[str, Model], rows: Data | None, out: Path, console: Console, text: Windows
) -> dict[str, Model]:
    """The model with its weights recovered; nothing where there is no text for it, or nothing was cut."""
    asked, written, folder = _asked_of(settings), out / "written.safetensors", out / "training"
    if settings.recover != "none" and prompts.asked(asked.data):
        rows = _apart(text_of(asked, pair["dense"], console, written), text, console)
    plan = pair["pruned"].plan
    if rows is None or plan is None or not plan.drop:
        return {}
    console.say(f"recovering weights: {settings.recover} on {rows.tokens_total:,} tokens of {rows.name}")
    made = recovered(
        pair["pruned"], pair["dense"], rows, settings.recover, asked, console, folder=folder, resume=folder.is_dir()
    )
    shutil.rmtree(folder, ignore_errors=True)
    written.unlink(missing_ok=True)
    return {"recovered": made}


def _told(model: Model, found: Mapping[str, Any], text: Windows, console: Console) -> dict[str, Any]:
    """What ``eval.json`` says of the recovery: how, on what, and whether it does not carry over to this text."""
    done = model.recovery
    assert done is not None
    losses = {entry["name"]: entry["loss"] for entry in found["models"]}
    lines = carried_over(done, [{"text": text.data.name, "loss": losses}])
    for line in lines:
        console.warn(line)
    return {
        "how": "+".join(stage["how"] for stage in done["stages"]),
        "tokens": sum(stage["tokens"] for stage in done["stages"]),
        "seconds": sum(stage["seconds"] for stage in done["stages"]),
        "text": done["data"]["name"],
        "warning": lines[0] if lines else None,
    }


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
    beside = [name for name in (place_beside(settings.form),) if name]
    return ("scores.json", "plan.json", "model", *beside, "check.json", "eval.json", *bench)


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
        place=settings.place,
    )


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
