"""Methods side by side: one model, one budget, one text to be tested on, a row for each recipe.

Every recipe chooses by itself, with its own calibration rows, so that its evaluations and seconds are its own; all
plans are then tested on the same text by the same engine, so that differences between them are paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from depthprune import recipes, sources
from depthprune.budget import Budget
from depthprune.console import Console
from depthprune.data import Data, Mixture, calibrate
from depthprune.errors import BudgetError, DepthpruneError, OptionError
from depthprune.evaluate import Windows
from depthprune.files import read_json, write_json, write_text
from depthprune.mixed import AnyOracle, oracle
from depthprune.model import Model
from depthprune.oracle import ModelOracle
from depthprune.plan import Plan
from depthprune.planning import candidates, choose, settle
from depthprune.recipes import Recipe
from depthprune.scores import Scores
from depthprune.units import Unit, parse


@dataclass(frozen=True)
class Row:
    """What one recipe chose, what it cost, and what it left; ``note`` says what is special, or why there is no plan."""

    recipe: str
    title: str
    unit: str
    metric: str
    select: str
    settings: dict[str, Any]
    digest: str | None = None  # of the calibration rows
    sequences: int | None = None
    length: int | None = None
    drop: tuple[str, ...] = ()
    fraction: float | None = None  # of the parameters in blocks
    parameters: int | None = None  # that are left
    kv_bytes_per_token: int | None = None
    loss: float | None = None  # on the test text
    perplexity: float | None = None
    prune_quantize: float | None = None  # the loss of what is left, quantized
    quantize_prune: float | None = None  # the loss of the quantized model without the same units
    quantized_bytes: int | None = None
    evaluations: int | None = None
    work: float | None = None  # the evaluations in passes over the calibration rows
    seconds: float | None = None
    note: str = ""


def compare(
    model: Model,
    budget: str,
    names: Sequence[str],
    *,
    data: Sequence[str],
    text: Windows,
    out: Path,
    console: Console,
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    field: str = "text",
    memory: int | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Run recipes on a model, test what each chose, and write ``compare.json``, the plans and a plot to a folder.

    ``data`` are calibration sources: recipes for tasks take the first that is all tasks, the others the first that is
    not. ``sequences``, ``length`` and ``seed`` replace those of every recipe; the precision is the model's for all.
    ``quantize`` is a way to quantize what each recipe leaves; beside it stands the quantized model without those units.
    Rows that the folder holds already, made under the same settings on the same data, are not made again.
    Raises ``OptionError`` for unknown recipes, ``BudgetError`` for a budget that no recipe can meet.
    """
    chosen = [recipes.load(name) for name in dict.fromkeys(names)]
    Budget.parse(budget, model.layout)  # text that is no budget is out of reach of every recipe
    asked: dict[str, Any] = {"sequences": sequences, "length": length, "seed": seed, "field": field}
    drawn = _drawn(model, chosen, data, **asked)
    out.mkdir(parents=True, exist_ok=True)
    held_out = replace(text.data, scored=text.scored)
    test = ModelOracle(model, held_out, memory=memory, memo=out / "test.jsonl", show=console.show)
    dense = float(test.losses([frozenset()]).mean()[0])
    head: dict[str, Any] = {
        "format": 1,
        "model": vars(model.reference),
        "dtype": str(next(model.net.parameters()).dtype).removeprefix("torch."),
        "budget": budget,
        "data": list(data),
        "text": {"name": held_out.name, "tokens": held_out.predicted, "digest": held_out.digest},
        "asked": asked,
        "quantize": quantize,
        "dense": {
            "loss": dense,
            "perplexity": math.exp(dense),
            "parameters": model.parameters,
            "kv_bytes_per_token": model.layout.kv_bytes_per_token,
        },
    }
    before = _finished(out / "compare.json", head)
    orders = None
    if quantize is not None:
        from depthprune.orders import Orders

        rows_of_first = next((rows for rows in drawn.values() if rows is not None), None)
        orders = Orders(model, quantize, text, rows_of_first, out)
        head["dense"] |= {"quantized_loss": orders.loss, "quantized_bytes": orders.bytes}
    rows: dict[str, Row] = {}
    if not before:
        write_json(out / "compare.json", head | {"rows": []})
    for number, recipe in enumerate(chosen, start=1):
        calibration = drawn[recipe.spec]
        if calibration is None:
            rows[recipe.spec] = _row(recipe, note=f"needs {_KIND[_on_task(recipe)]}")
            continue
        done = before.get(recipe.spec)
        if done is not None and (done.settings, done.digest) == (recipe.settings, calibration.digest):
            rows[recipe.spec] = done
            continue
        console.say(f"{number} of {len(chosen)}: {recipe.spec}")
        try:
            plan, row = _choose(model, budget, recipe, calibration, console, memory=memory)
        except DepthpruneError as error:
            rows[recipe.spec] = _row(recipe, note=str(error))
            continue
        gone = frozenset(plan.drop)
        loss = float(test.losses([gone]).mean()[0])
        if not math.isfinite(loss):
            rows[recipe.spec] = replace(row, note=f"without {', '.join(row.drop)} there is no finite loss on the text")
            continue
        row = replace(row, loss=loss, perplexity=math.exp(min(loss, 700.0)))
        if orders is not None:
            try:
                then, size = orders.then(plan, calibration)
                row = replace(row, prune_quantize=then, quantize_prune=orders.first(plan), quantized_bytes=size)
            except DepthpruneError as error:
                row = replace(row, note=str(error))
        rows[recipe.spec] = row
        plan.save(out / "plans" / f"{_file(recipe.spec)}.json")
        every = before | rows  # what an earlier run made is kept until it is made again
        write_json(out / "compare.json", head | {"rows": [asdict(row) for row in every.values()]})
    if all(row.loss is None for row in rows.values()):
        raise BudgetError("; ".join(f"{row.recipe}: {row.note}" for row in rows.values()))
    # those that met the budget first, the best of them ahead: others cannot be compared with them
    ordered = sorted(rows.values(), key=lambda row: (row.note != "", math.inf if row.loss is None else row.loss))
    value = head | {"rows": [asdict(row) | {"behind": behind(test, ordered, row)} for row in ordered]}
    write_json(out / "compare.json", value)
    write_text(out / "compare.svg", plot(value))
    return value


def behind(test: ModelOracle, ordered: Sequence[Row], row: Row) -> list[float] | None:
    """How much higher a row's test loss is than the best row's, in nats, and the paired standard error of that."""
    if row.loss is None or row is ordered[0]:
        return None
    both = test.losses([frozenset(parse(row.drop)), frozenset(parse(ordered[0].drop))])
    return list(both.difference(0, 1))


def _finished(path: Path, head: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of an earlier run of the same comparison. Raises ``OptionError`` for another one's."""
    if not path.is_file():
        return {}
    before = read_json(path)
    if not isinstance(before, dict) or not isinstance(before.get("rows"), list):
        raise OptionError(f"{path} is not that of a comparison; name another --out")
    differ = [name for name in head if name != "dense" and before.get(name) != head[name]]
    if differ:
        raise OptionError(f"{path} is of another comparison ({', '.join(differ)} differ); name another --out")
    known = Row.__dataclass_fields__
    rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in before["rows"]]
    return {row.recipe: replace(row, drop=tuple(row.drop)) for row in rows if row.loss is not None}


_KIND = {True: "a task: --data task:FILE", False: "text: --data FILE"}


def _on_task(recipe: Recipe) -> bool:
    return recipe.metric.startswith("error") or "of=error" in recipe.metric


def _drawn(
    model: Model,
    chosen: Sequence[Recipe],
    data: Sequence[str],
    *,
    sequences: int | None,
    length: int | None,
    seed: int | None,
    field: str,
) -> dict[str, Data | Mixture | None]:
    """The calibration rows of every recipe; None for one whose kind of data was not given."""
    tasks = [all(part.is_task for part in sources.parse(source)) for source in data]
    known: dict[tuple[str, int, int, int], Data | Mixture] = {}
    found: dict[str, Data | Mixture | None] = {}
    for recipe in chosen:
        source = next((one for one, task in zip(data, tasks, strict=True) if task == _on_task(recipe)), None)
        if source is None:
            found[recipe.spec] = None
            continue
        count, size = sequences or recipe.sequences or 64, length or recipe.length or 512
        draw = (recipe.seed or 0) if seed is None else seed
        key = (source, count, min(size, model.positions or size), draw)
        if key not in known:
            known[key] = calibrate(source, model.tokenizer, sequences=count, length=key[2], seed=draw, field=field)
        found[recipe.spec] = known[key]
    return found


def _choose(
    model: Model, budget: str, recipe: Recipe, rows: Data | Mixture, console: Console, *, memory: int | None
) -> tuple[Plan, Row]:
    """The plan of one recipe and what it cost."""
    able = candidates(model.layout, recipe.unit, recipe.protect)
    asked = oracle(model, rows, metric=recipe.metric, units=able, memory=memory, show=console.show)
    start = time.perf_counter()
    note = ""
    try:
        plan = _plan(asked, budget, able, recipe)
    except BudgetError as error:
        half = max(1, len(model.layout.units(recipe.unit)) // 2)
        plan = _plan(asked, f"{half} {'units' if recipe.unit == 'any' else recipe.unit}", able, recipe)
        note = f"half of its units instead ({error})"
    seconds = time.perf_counter() - start
    gone = frozenset(plan.drop)
    layout = model.layout
    return plan, _row(
        recipe,
        digest=rows.digest,
        sequences=rows.sequences,
        length=rows.length,
        drop=tuple(str(unit) for unit in plan.drop),
        fraction=layout.freed(gone) / layout.parameters,
        parameters=model.parameters - layout.freed(gone),
        kv_bytes_per_token=layout.kv_bytes_per_token - layout.kv_freed(gone),
        evaluations=asked.evaluations,
        work=asked.work,
        seconds=seconds,
        note=note,
    )


def _plan(asked: AnyOracle, budget: str, able: tuple[Unit, ...], recipe: Recipe) -> Plan:
    amount, unit = settle(budget, recipe.unit, asked.model.layout)
    units = amount.candidates(asked.ledger, able)
    return choose(asked, amount, units, unit=unit, select=recipe.select, seed=asked.data.seed, recipe=recipe.spec)


def _row(recipe: Recipe, **found: Any) -> Row:
    return Row(recipe.spec, recipe.title, recipe.unit, recipe.metric, recipe.select, recipe.settings, **found)


def _file(spec: str) -> str:
    return Path(spec).name.replace(":", "-").replace("=", "-")


def importances(
    model: Model,
    sources: Sequence[str],
    metric: str,
    *,
    unit: str = "any",
    console: Console,
    sequences: int = 64,
    length: int = 512,
    seed: int = 0,
    field: str = "text",
    memory: int | None = None,
) -> dict[str, Any]:
    """How much importances for different texts and tasks agree: the rank of every unit on each, low goes first.

    ``spearman`` holds the correlation of the ranks for every pair of sources; ``units`` are in the order of how far
    their ranks lie apart. Source: A deeper look at depth pruning (task-adaptive importances trade tasks off).
    """
    units = candidates(model.layout, unit, "none")
    found: dict[str, Scores] = {}
    for source in sources:
        rows: Data | Mixture = calibrate(
            source, model.tokenizer, sequences=sequences, length=length, seed=seed, field=field
        )
        asked = oracle(model, rows, metric=metric, units=units, memory=memory, show=console.show, say=console.say)
        found[source] = asked.scored()
    ranks = {source: {u: place for place, u in enumerate(scores.ranked())} for source, scores in found.items()}
    table = np.array([[ranks[source][u] for u in units] for source in sources], dtype=np.float64)
    spread = table.max(0) - table.min(0)
    order = sorted(range(len(units)), key=lambda index: -spread[index])
    return {
        "metric": metric,
        "sources": list(sources),
        "spearman": np.atleast_2d(np.corrcoef(table)).tolist(),
        "units": [
            {
                "unit": str(units[index]),
                "kind": model.layout.kind(units[index]),
                "ranks": [int(rank) + 1 for rank in table[:, index]],
                "scores": [found[source].values[units[index]] for source in sources],
                "apart": int(spread[index]),
            }
            for index in order
        ],
    }


_LINE, _NAME, _WIDE, _TAIL, _TOP = 24, 210, 420, 230, 64
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1b1f24 } .small { font-size: 11px; fill: #57606a }
.title { font-size: 15px; font-weight: 600 } .bar { fill: #3b6fb6 } .own { fill: #b6523b } .grid { stroke: #d8dee4 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .small { fill: #9da7b1 } .grid { stroke: #30363d }
  .bar { fill: #6ea0e6 } .own { fill: #e6836e } .paper { fill: #0d1117 } }
"""


def plot(value: Mapping[str, Any]) -> str:
    """A bar for every recipe: the test perplexity against the dense model's, the best on top, its cost behind it."""
    rows = [row for row in value["rows"] if row["loss"] is not None]
    base = value["dense"]["perplexity"]
    ratios = [row["perplexity"] / base for row in rows]
    largest = min(max(ratios), 4 * sorted(ratios)[len(ratios) // 2])  # one collapsed model must not flatten the rest
    scale = _WIDE / max(largest - 1, 1e-9)
    width, height = _NAME + _WIDE + _TAIL, _TOP + _LINE * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img"><style>{_STYLE}</style><rect class="paper" width="100%" height="100%" fill="#fff"/>',
        f'<text class="title" x="12" y="24">Perplexity on {_safe(value["text"]["name"])}, times the dense model\'s '
        f"({base:.4g}), after dropping {_safe(value['budget'])}</text>",
        f'<text class="small" x="12" y="44">{_safe(Path(value["model"]["id"]).name)}. Behind each bar: share of the '
        "block parameters dropped, models measured, seconds.</text>",
    ]
    for number, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        y = _TOP + _LINE * number
        long = min(max((ratio - 1) * scale, 1.0), _WIDE)
        kind = "own" if row["recipe"].startswith("depthprune") else "bar"
        more = "…" if ratio > largest * 1.0001 else ""
        cost = f"{row['fraction']:.1%}, {row['evaluations']:,} models, {row['seconds']:.1f} s"
        parts += [
            f'<text x="{_NAME - 8}" y="{y + 15}" text-anchor="end">{_safe(row["recipe"])}</text>',
            f'<rect class="{kind}" x="{_NAME}" y="{y + 3}" width="{long:.1f}" height="{_LINE - 8}" rx="2">'
            f"<title>{_safe(row['title'])}</title></rect>",
            f'<text x="{_NAME + long + 6:.1f}" y="{y + 15}">{ratio:.3f}x{more} '
            f'<tspan class="small" dx="6">{cost}</tspan></text>',
        ]
    bottom = _TOP + _LINE * len(rows) + 4
    parts.append(f'<line class="grid" x1="{_NAME}" x2="{_NAME}" y1="{_TOP - 4}" y2="{bottom}"/></svg>\n')
    return "".join(parts)


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
