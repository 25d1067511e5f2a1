"""The command line: one command per verb. Imports neither torch nor transformers until a command runs."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from depthprune import (
    __version__,
    jobs,  # noqa: F401 (its commands)
    options,
    recipes,
    registry,
    serving,
    tables,
)
from depthprune.console import Console, die, interruptible, no_memory
from depthprune.errors import BudgetError, DepthpruneError, OptionError, PlanError, unknown
from depthprune.files import place, write_json
from depthprune.options import (
    Calibration,
    Choice,
    Common,
    DataOption,
    DropOption,
    FormOption,
    Loading,
    ModelArgument,
    OutOption,
    option,
)


@options.command(options.app)
def inspect(console: Console, model: ModelArgument, loading: Loading, common: Common) -> None:
    """Show what can be dropped, how large it is, and why something cannot be."""
    made = options.load(model, common, loading)
    from depthprune.stages import describe

    blocks, shown = tables.units(made.layout, describe(made))
    head = {"model": vars(made.reference), "stack": made.layout.path, "parameters": made.parameters}
    console.result({**head, "kv_bytes_per_token": made.layout.kv_bytes_per_token, "blocks": blocks}, shown)


@options.command(options.app)
def score(
    console: Console,
    model: ModelArgument,
    data: DataOption,
    out: OutOption,
    calibration: Calibration,
    loading: Loading,
    common: Common,
    metric: Annotated[list[str] | None, option("--metric", "A metric; may be given several times.")] = None,
    unit: Annotated[str, option("--unit", "What to score: block, attention, mlp, mixer or any.")] = "any",
) -> None:
    """Score every unit: how much would be lost without it. Low goes first."""
    chosen = metric or ["loss", "cosine"]
    for name in chosen:
        registry.find("metrics", name)
    place(out)
    made = options.load(model, common, loading)
    from depthprune.mixed import oracle
    from depthprune.planning import candidates
    from depthprune.stages import scores_json

    text = options.text(data, made, calibration, common)
    units, memory = candidates(made.layout, unit, "none"), options.size(calibration.memory)
    asked = oracle(made, text, units=units, memory=memory, show=console.show, say=console.say)
    every = {name: asked.asking(name).scored() for name in chosen}
    value = scores_json(made, every, units)
    write_json(out, value)
    title = f"{len(units)} units, lowest {chosen[0]} first; written to {out}"
    console.result(value, tables.scored(every, made.layout, title))


@options.command(options.app)
def plan(
    console: Console,
    model: ModelArgument,
    drop: DropOption,
    data: DataOption,
    out: OutOption,
    choice: Choice,
    calibration: Calibration,
    loading: Loading,
    common: Common,
) -> None:
    """Choose what to drop for a budget, and write the plan: a small JSON file to read, edit and replay."""
    choice, calibration, common = options.settled(choice, calibration, common)
    options.check(choice, drop)
    place(out)
    made = options.load(model, common, loading)
    from depthprune import planning

    unit = choice.unit or "any"
    planning.settle(drop, unit, made.layout)
    calibration = options.clipped(calibration, choice, made)
    wanted: dict[str, Any] = {
        "unit": unit,
        "metric": choice.metric or "loss",
        "select": choice.select,
        "protect": choice.protect,
        "recipe": choice.recipe,
        "memory": options.size(calibration.memory),
        "show": console.show,
    }
    rows = options.text(data, made, calibration, common)
    chosen = planning.select(made, drop, data=rows, say=console.say, **wanted)
    if choice.stability:
        seeds = (replace(common, seed=(common.seed or 0) + draw) for draw in range(1, choice.stability + 1))
        again = (options.text(data, made, calibration, other) for other in seeds)
        stable = planning.stability(made, drop, again, **wanted)
        console.say(tables.stable(stable, chosen.drop))
        chosen = replace(chosen, why={**chosen.why, "stability": stable})
    chosen.save(out)
    freed = f"{chosen.describe()}: frees {chosen.frees['fraction']:.1%} of the block parameters; written to {out}"
    console.result({"plan": str(out), "drop": [str(u) for u in chosen.drop], "frees": dict(chosen.frees)}, freed)


@options.command(options.app)
def drop(
    console: Console,
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.json.")],
    out: OutOption,
    loading: Loading,
    common: Common,
    stand_in: Annotated[
        str | None,
        option(
            "--stand-in",
            "What to put in place of each dropped unit, for recovery to fill: `none`, `bias`, or `lowrank:16`, a map of"
            " that rank; default: what the plan says.",
        ),
    ] = None,
    form: FormOption = "hf",
) -> None:
    """Drop what a plan says, write the smaller model, and prove it in a fresh process."""
    registry.find("forms", form)
    from depthprune.plan import Plan, rank, with_stand_ins

    try:
        rank(stand_in if stand_in not in (None, "none") else "bias")
    except PlanError as error:
        raise OptionError(f"--stand-in: {error}; none for nothing") from None
    asked = Plan.load(plan)
    asked = asked if stand_in is None else with_stand_ins(asked, stand_in)
    place(out, folder=True)
    made = options.load(model, common, loading)
    from depthprune.export import expect, write
    from depthprune.runtimes import prove_written
    from depthprune.surgery import drop as cut

    smaller = cut(made, asked)
    write.export(smaller, out, form)
    proofs = prove_written(out, smaller, expect(made, smaller.plan or asked), console.say)
    serving.judged(console, proofs, f"{asked.describe()} dropped; written to {out}")


@options.command(options.app, "eval")
def evaluate(
    console: Console,
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Models; the first is the reference.")],
    text: Annotated[list[str], option("--text", "Text to predict; may be given several times.")],
    out: OutOption,
    loading: Loading,
    common: Common,
    window: Annotated[int, option("--window", "Tokens of a window.", least=2)] = 512,
    stride: Annotated[int | None, option("--stride", "How far it moves; smaller gives more context.", least=1)] = None,
    windows: Annotated[int | None, option("--windows", "Only the first windows.", least=1)] = None,
    field: Annotated[str, option("--field", "Field of JSONL and Parquet rows.")] = "text",
) -> None:
    """Measure the perplexity of models on text, each token predicted once. Several models make one table."""
    from depthprune import stages
    from depthprune.evaluate import windows as cut

    place(out)
    made = {name: options.load(name, common, loading, dequantize=False) for name in models}
    tokenizer = next(iter(made.values())).tokenizer
    rows = cut(",".join(text), tokenizer, window=window, stride=stride, limit=windows, field=field)
    value = stages.evaluate(made, rows, console)
    write_json(out, value)
    console.result(value, tables.evaluated(value))


@options.command(options.app)
def bench(
    console: Console,
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="Models to time; the first is the reference.")],
    out: OutOption,
    loading: Loading,
    common: Common,
    batch: Annotated[int, option("--batch", "Sequences at a time.", least=1)] = 1,
    prompt: Annotated[int, option("--prompt", "Tokens of the prompt.", least=1)] = 256,
    new: Annotated[int, option("--new", "Tokens to decode.", least=1)] = 32,
    repeats: Annotated[int, option("--repeats", "Turns of each model.", least=1)] = 5,
) -> None:
    """Time prefill and decoding of models, interleaved, so that drift hits all alike."""
    from depthprune.bench import bench as measure

    place(out)
    made = {name: options.load(name, common, loading, dequantize=False).net for name in models}
    value = measure(made, batch=batch, prompt=prompt, new=new, repeats=repeats, seed=common.seed or 0)
    write_json(out, value)
    console.result(value, tables.timed(value))


@options.command(options.app)
def report(
    console: Console,
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    common: Common,
    open_: Annotated[bool, option("--open", "Open it in the browser.")] = False,
) -> None:
    """Write the report of a run folder again from its JSON files."""
    from depthprune.report import report as write

    page = write(run)
    console.result({"report": str(page)}, str(page))
    if open_:
        typer.launch(page.resolve().as_uri())


@options.command(options.app, "list")
def list_(
    console: Console,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="metrics, selectors, recipes, recoverers or forms.")],
    common: Common,
) -> None:
    """List what can be asked for by name."""
    if what == "recipes":
        names = recipes.names()
        lines = [f"{name:28}{recipes.load(name).title}" for name in names]
        console.result(list(names), "\n".join(lines))
        return
    if what not in registry.TABLES:
        raise unknown("list", what, (*registry.TABLES, "recipes"))
    names = registry.names(what)
    console.result(list(names), "\n".join(names) or f"no {what} in this release")


def _version(value: bool) -> None:
    if value:
        print(f"depthprune {__version__}")
        raise typer.Exit


@options.app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt
# typer carries its own copy of click, so its errors are found through what it makes public
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Run the command line; every mistake of the user ends in one line and exit code 2 (usage) or 1."""
    warnings.simplefilter("ignore")
    code: Any = 1
    try:
        with interruptible():
            code = options.app(standalone_mode=False)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
    except (OptionError, BudgetError) as error:
        die(str(error))
        code = 2
    except DepthpruneError as error:
        die(str(error))
    except _USAGE as error:
        if error.format_message():  # not so where help was shown instead
            die(error.format_message())
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        die("stopped")
        code = 1
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        die("out of memory; try fewer tokens at a time, or --device cpu")
    except OSError as error:
        die(f"{error.filename or 'cannot write'}: {error.strerror or error}")
    sys.exit(code if isinstance(code, int) else 0)
