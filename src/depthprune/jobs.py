"""The long commands, which leave a folder: ``prune``, ``compare`` and ``recover``. No torch until one runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from depthprune import options, recipes, registry, tables
from depthprune.console import Console, resumable
from depthprune.errors import OptionError, unknown
from depthprune.files import place
from depthprune.options import (
    Calibration,
    Choice,
    Common,
    DropOption,
    FormOption,
    Loading,
    ModelArgument,
    OutOption,
    option,
)
from depthprune.plan import rank
from depthprune.serving import PrivateOption, PushOption, uploads

COMPARE_QUANTIZE_HELP = (
    "Quantize what each recipe leaves (`w4a16`, `gptq`, …, as `export --quantize`), and test it beside the quantized "
    "model without the same units."
)
HOW_HELP = "How to win back what was lost: `refit`, `distill`, `refit+distill:tokens=8M`, …; `list recoverers`."
RECOVER_DATA_HELP = (
    "Text to recover on: a text, JSONL or Parquet file, a folder, `hub:NAME:CONFIG:SPLIT`, or a mixture; `self:`: what "
    "the dense model writes itself, `self:PROMPTS` from the beginnings of a text, `self:FILE:chat=true` as answers; "
    "also `:temperature=0.8:top_p=0.95:prompt=32`."
)


@options.command(options.app)
def prune(
    console: Console,
    choice: Choice,
    calibration: Calibration,
    loading: Loading,
    common: Common,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = None,
    drop: DropOption = "25%",
    data: Annotated[str | None, option("--data", options.DATA_HELP)] = None,
    out: Annotated[Path | None, option("--out", "The run folder.")] = None,
    demo: Annotated[bool, option("--demo", "Use the small model and the texts that come with depthprune.")] = False,
    recover: Annotated[str, option("--recover", HOW_HELP + " `none`: leave the weights.")] = "refit",
    recover_data: Annotated[
        str | None,
        option(
            "--recover-data",
            "Text to recover on, or `self:`, which the dense model writes (see `recover`); default: that of --data, "
            "but for rows of --text.",
        ),
    ] = None,
    recover_sequences: Annotated[
        int | None,
        option("--recover-sequences", "Rows of it; default: a million tokens on a GPU, 64 thousand on a CPU.", least=2),
    ] = None,
    text: Annotated[
        str | None, option("--text", "Text to evaluate on; default: rows of the calibration text that were not used.")
    ] = None,
    window: Annotated[int | None, option("--window", "Tokens of a window; default: the length.", least=2)] = None,
    stride: Annotated[int | None, option("--stride", "How far it moves; default: the window.", least=1)] = None,
    windows: Annotated[int, option("--windows", "Evaluate on the first windows of --text.", least=1)] = 256,
    form: FormOption = "hf",
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    run_bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure speed.")] = True,
    resume: Annotated[bool, option("--resume", "Finish a run that was stopped.")] = False,
    overwrite: Annotated[bool, option("--overwrite", "Replace a run in the folder.")] = False,
) -> None:
    """The main job: plan, drop, recover, prove, evaluate, time and report, in one run folder.

    Ctrl-C at any moment leaves a run that `--resume` finishes.
    """
    if demo:
        from depthprune import demo as embedded

        model, data = model or str(embedded.unpack()), data or str(embedded.CALIBRATION)
        text, out = text or str(embedded.TEST), out or Path("runs/demo")
        calibration = replace(calibration, sequences=min(calibration.sequences or 24, 24))
    if model is None:
        raise OptionError(options.NO_MODEL)
    if data is None or out is None:
        raise OptionError(
            f"prune needs {'--data TEXT to choose by' if data is None else '--out RUN, a folder to write to'}"
        )
    if recover != "none":
        _known((recover,))
        if alone := [name for name in registry.ways(recover) if name.partition(":")[0] in FILLING]:
            raise OptionError(f"--recover {alone[0]}: {FILLING_NEEDS}")
    with resumable(out, console):
        choice, calibration, common = options.settled(choice, calibration, common)
        options.check(choice, drop)
        registry.find("forms", form)
        if push_to_hub:
            uploads(form)
        from depthprune import claim, pruning

        settings = claim.Settings(
            model=model,
            drop=drop,
            data=data,
            text=text,
            window=window,
            stride=stride,
            windows=windows,
            form=form,
            recover=recover,
            recover_data=recover_data,
            recover_sequences=recover_sequences,
            bench=run_bench,
            seed=common.seed or 0,
            device=common.device,
            dtype=common.dtype,
            **vars(choice),
            **vars(loading),
            **(vars(calibration) | {"memory": options.size(calibration.memory)}),
        )
        passed = pruning.prune(settings, out, console, resume=resume, overwrite=overwrite)
    if not passed:
        raise typer.Exit(1)
    if push_to_hub:
        from depthprune.export.push import push

        folder = out / beside if (beside := pruning.place_beside(form)) else out
        console.say(f"uploaded to {push(folder, push_to_hub, private=private)}")


@options.command(options.app)
def compare(
    console: Console,
    model: ModelArgument,
    data: Annotated[list[str], option("--data", options.DATA_HELP + " Several: importances are compared too.")],
    out: OutOption,
    calibration: Calibration,
    loading: Loading,
    common: Common,
    recipe: Annotated[str, option("--recipes", "`all`, `none`, or names with commas between; `list recipes`.")] = "all",
    drop: DropOption = "25%",
    text: Annotated[str | None, option("--text", "Text to test on: another than was calibrated on.")] = None,
    window: Annotated[int, option("--window", "Tokens of a window of the test text.", least=2)] = 512,
    windows: Annotated[int, option("--windows", "Test on the first windows of --text.", least=1)] = 128,
    metric: Annotated[str, option("--metric", "The importance that is compared over several --data.")] = "loss",
    unit: Annotated[str, option("--unit", "The units whose importance is compared.")] = "any",
    quantize: Annotated[str | None, option("--quantize", COMPARE_QUANTIZE_HELP)] = None,
) -> None:
    """Compare the papers' methods at one budget, in one table; and importances for several texts and tasks.

    A run that was stopped goes on where it was when it is started again with the same options.
    """
    names = [] if recipe == "none" else list(recipes.names()) if recipe == "all" else recipe.replace(" ", "").split(",")
    if len(set(data)) < len(data):
        raise OptionError("--data names the same source twice")
    if not names and len(data) < 2:
        raise OptionError("--recipes none compares importances: give --data twice or more, or name recipes")
    if names and text is None:
        raise OptionError("compare needs --text FILE, another text than --data, to test the plans on")
    options.check(Choice(unit=unit, metric=metric), drop)
    if quantize is not None:
        from depthprune.export.ways import WAYS

        if quantize not in WAYS:
            raise unknown("way to quantize", quantize, WAYS)
    for name in names:
        method = recipes.load(name)
        options.check(Choice(unit=method.unit, metric=method.metric, select=method.select), drop)
    if not (out / "compare.json").is_file():
        place(out, folder=True)
    made = options.load(model, common, loading)
    from depthprune.compare import compare as side_by_side
    from depthprune.compare import importances
    from depthprune.evaluate import fits
    from depthprune.evaluate import windows as cut
    from depthprune.files import write_json

    memory = options.size(calibration.memory)
    value: dict[str, object] = {}
    shown: list[Group] = []
    if len(data) > 1:
        agreement = importances(
            made,
            data,
            metric,
            unit=unit,
            console=console,
            sequences=calibration.sequences or 64,
            length=calibration.length or min(512, made.positions or 512),
            seed=common.seed or 0,
            field=calibration.field,
            memory=memory,
        )
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "importances.json", {"format": 1, **agreement})
        value = {"importances": agreement}
        shown.append(tables.agreement(agreement))
    if text is not None and names:
        rows = cut(text, made.tokenizer, window=min(window, made.positions or window), limit=windows)
        fits(made, rows)
        out.mkdir(parents=True, exist_ok=True)
        value = value | side_by_side(
            made,
            drop,
            names,
            data=data,
            text=rows,
            out=out,
            console=console,
            sequences=calibration.sequences,
            length=calibration.length,
            seed=common.seed,
            field=calibration.field,
            memory=memory,
            quantize=quantize,
        )
        shown.insert(0, tables.compared(value))
    console.result(value, Group(*shown))


FILLING = ("mean", "lstsq", "mse", "lm")
FILLING_NEEDS = "this fills stand-ins, and prune makes none; use drop --stand-in bias (or lowrank:16), then recover"


def _known(ways: Sequence[str], *stand_ins: str) -> None:
    """Refuse recoverers that do not exist, before a model is loaded."""
    for part in (part for way in ways for part in registry.ways(way)):
        if part.partition(":")[0] in stand_ins:
            rank(part)
        else:
            registry.find("recoverers", part)


@options.command(options.app)
def recover(
    console: Console,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a pruned model and its plan.json.")],
    teacher: Annotated[str, option("--teacher", "The dense model that it was cut from: " + options.MODEL_HELP)],
    data: Annotated[str, option("--data", RECOVER_DATA_HELP)],
    out: OutOption,
    calibration: Calibration,
    loading: Loading,
    common: Common,
    how: Annotated[list[str] | None, option("--how", HOW_HELP + " Default: refit.")] = None,
    compare: Annotated[
        bool, option("--compare", "Try several --how from the same cut; write a table, no model.")
    ] = False,
    text: Annotated[
        list[str] | None, option("--text", "Other text to measure on, before and after; may be given several times.")
    ] = None,
    window: Annotated[int, option("--window", "Tokens of a window of these texts.", least=2)] = 512,
    windows: Annotated[int, option("--windows", "Measure on the first windows.", least=1)] = 128,
    form: FormOption = "hf",
    resume: Annotated[bool, option("--resume", "Go on with a training that was stopped.")] = False,
) -> None:
    """Win back what a cut cost: other weights in the same structure, written to a new folder and proven.

    `refit` is closed form and takes seconds to minutes; `distill`, `full`, `lora` and `tail` train; `a+b` does one
    after the other. With `--compare` each `--how` starts from the same cut; there `bias` and `lowrank:16` are
    stand-ins, filled without training. Under `torchrun` several processes share the text.
    """
    from depthprune import recovering

    ways = list(how or (recovering.COMPARED if compare else ("refit",)))
    if len(ways) > 1 and not compare:
        raise OptionError("several --how need --compare; to do one after the other write --how refit+distill")
    _known(ways, *(recovering.STAND_INS if compare else ()))
    registry.find("forms", form)
    if not (folder / "plan.json").is_file():
        raise OptionError(f"{folder} has no plan.json: recover takes a folder that depthprune drop or prune wrote")
    training = out.with_name(f".{out.name}.training")
    if resume and training.exists() and (out / "recovery.json").is_file():
        shutil.rmtree(out)  # written by the run that goes on now, and not proven
    if not (compare and (out / "recover.json").is_file()):
        place(out, folder=True)
    if training.exists() and not (resume or compare):
        raise OptionError(f"{training} holds a training that was stopped: add --resume to go on with it, or delete it")
    from depthprune import dist
    from depthprune.evaluate import fits
    from depthprune.evaluate import windows as cut
    from depthprune.model import where

    common = replace(common, device=dist.start(where(common.device)))
    dense = options.load(teacher, common, loading)
    model = recovering.reopen(options.load(str(folder), common, loading), folder)
    asked = recovering.Asked(
        data,
        calibration.sequences,
        calibration.length or 512,
        calibration.field,
        common.seed or 0,
        options.size(calibration.memory),
    )
    kept = out.with_name(f".{out.name}.written.safetensors")
    rows = recovering.text_of(asked, dense, console, kept)
    window = min(window, model.positions or window)
    texts = {name: cut(name, model.tokenizer, window=window, limit=windows) for name in text or ()}
    for measured in texts.values():
        fits(model, measured)
    recovering.shared(rows, texts, console)
    if compare:
        out.mkdir(parents=True, exist_ok=True)
        found = recovering.compare(model, dense, rows, ways, texts, asked, out, console)
        if dist.rank() > 0:
            return
        kept.unlink(missing_ok=True)
        for row in found["rows"]:
            for line in row.get("warnings", ()):
                console.warn(f"{row['how']}: {line}")
        console.result(found, tables.recoveries(found))
        return
    with resumable(out, console):
        made = recovering.recovered(
            model, dense, rows, ways[0], asked, console, folder=training, resume=training.exists()
        )
    if dist.rank() > 0:
        return
    proofs = recovering.write(made, out, form, console.say)
    kept.unlink(missing_ok=True)
    if made.recovery is None:
        console.result(
            {"path": str(out)}, f"the plan drops nothing, so nothing was recovered; written to {out} as it was"
        )
        return
    measured_on = recovering.measure({"dense": dense, "pruned": model, "recovered": made}, texts, console)
    shutil.rmtree(training, ignore_errors=True)
    for line in recovering.carried_over(made.recovery, measured_on):
        console.warn(line)
    value = recovering.summary(made.recovery, measured_on)
    passed = all(proof.passed for proof in proofs)
    value |= {"path": str(out), "passed": passed, "proofs": [proof.to_json() for proof in proofs]}
    console.result(value, tables.recovered(value, out))
    if not passed:
        raise typer.Exit(1)
