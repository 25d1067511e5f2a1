"""The long commands, which leave a folder: ``prune``, the main job, and ``compare``. No torch until one runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from depthprune import options, recipes, registry, tables
from depthprune.console import Console, resumable
from depthprune.errors import OptionError
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
    recover: Annotated[str, option("--recover", "How to win back what was lost: `none` in this release.")] = "none",
    text: Annotated[
        str | None, option("--text", "Text to evaluate on; default: rows of the calibration text that were not used.")
    ] = None,
    window: Annotated[int | None, option("--window", "Tokens of a window; default: the length.", least=2)] = None,
    stride: Annotated[int | None, option("--stride", "How far it moves; default: the window.", least=1)] = None,
    windows: Annotated[int, option("--windows", "Evaluate on the first windows of --text.", least=1)] = 256,
    form: FormOption = "hf",
    run_bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Measure speed.")] = True,
    resume: Annotated[bool, option("--resume", "Finish a run that was stopped.")] = False,
    overwrite: Annotated[bool, option("--overwrite", "Replace a run in the folder.")] = False,
) -> None:
    """The main job: plan, drop, prove, evaluate, time and report, in one run folder.

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
        raise OptionError(f"--recover {recover!r} does not exist yet. Available: none")
    with resumable(out, console):
        choice, calibration, common = options.settled(choice, calibration, common)
        options.check(choice, drop)
        registry.find("forms", form)
        from depthprune import pruning

        settings = pruning.Settings(
            model=model,
            drop=drop,
            data=data,
            text=text,
            window=window,
            stride=stride,
            windows=windows,
            form=form,
            recover=recover,
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
        )
        shown.insert(0, tables.compared(value))
    console.result(value, Group(*shown))
