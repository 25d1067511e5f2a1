"""Results as a person reads them: a table or a few lines for what the commands found. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from depthprune.console import human, table
from depthprune.units import Unit

if TYPE_CHECKING:
    from depthprune.layout import Layout
    from depthprune.scores import Scores


def units(layout: Layout, title: str) -> tuple[list[dict[str, Any]], Table]:
    """What can be dropped from a model, as plain values and as a table: a block, then its sublayers."""
    value, rows = [], []
    for block in layout.blocks:
        inner = [
            {"unit": f"{block.index}.{s.name}", "kind": s.kind, "parameters": s.parameters} for s in block.sublayers
        ]
        whole = {"unit": str(block.index), "kind": "block", "parameters": block.parameters}
        cache = {"kv_bytes_per_token": block.kv_bytes_per_token, "reason": block.reason}
        value.append({**whole, **cache, "sublayers": inner})
        for unit in (whole, *inner):
            first = (str(unit["unit"]) if unit is whole else f"  {unit['unit']}", str(unit["kind"]))
            share = f"{int(str(unit['parameters'])) / layout.parameters:.1%}"
            rest = (f"{block.kv_bytes_per_token:,}", block.reason) if unit is whole else ("", "")
            rows.append((*first, f"{unit['parameters']:,}", share, *rest))
    return value, table(("unit", "kind", "parameters", "share", "KV bytes/token", "why not finer"), rows, title)


def scored(every: Mapping[str, Scores], layout: Layout, title: str) -> Table:
    """The scores of units under one or more metrics, in the order of the first."""
    first, *_ = every.values()
    rows = [
        (str(unit), layout.kind(unit), *(_score(s.values[unit], s.errors.get(unit)) for s in every.values()))
        for unit in first.ranked()
    ]
    return table(("unit", "kind", *every), rows, title)


def _score(value: float, error: float | None) -> str:
    return f"{value:.5f}" if error is None else f"{value:.5f} ± {error:.5f}"


def evaluated(value: Mapping[str, Any]) -> Table:
    """The perplexities and sizes of an ``eval.json``."""
    base = value["models"][0]["perplexity"]
    rows = [
        (
            entry["name"],
            f"{entry['perplexity']:.3f}",
            f"{entry['perplexity'] / base:.3f}x",
            f"{entry['parameters']:,}",
            human(entry["bytes"]),
            f"{entry['kv_bytes_per_token']:,}",
        )
        for entry in value["models"]
    ]
    columns = ("model", "perplexity", "ratio", "parameters", "bytes", "KV bytes/token")
    return table(columns, rows, f"{value['text']['name']}, {value['text']['tokens']:,} tokens")


def timed(value: Mapping[str, Any]) -> Table:
    """The times of a ``bench.json``."""
    keys = ("prefill_ms", "decode_ms_per_token")
    rows = [
        (entry["name"], *("" if entry.get(key) is None else f"{entry[key]:.3f}" for key in keys))
        for entry in value["models"]
    ]
    return table(("model", "prefill ms", "decode ms/token"), rows)


def compared(value: Mapping[str, Any]) -> Group:
    """The rows of a ``compare.json``, the best first, and what is special about some."""
    dense, how = value["dense"]["perplexity"], value.get("quantize")
    rows, notes = [], []
    for row in value["rows"]:
        if row["note"]:
            notes.append(f"{row['recipe']}: {row['note']}")
        if row["loss"] is None:
            continue
        gap = row["behind"]
        cost = (f"{row['evaluations']:,}", f"{row['work']:.0f}", f"{row['seconds']:.1f}")
        both = [_exp(row[order]) for order in ("prune_quantize", "quantize_prune") if how]
        rows.append(
            (
                row["recipe"],
                f"{row['fraction']:.1%}",
                human(row["parameters"]).removesuffix("B"),
                f"{row['perplexity']:.2f}",
                f"{row['perplexity'] / dense:.3f}x",
                "best" if gap is None else f"{gap[0]:+.3f}±{gap[1]:.3f}",
                *(both or cost),
            )
        )
    last = (f"then {how}", f"{how} first") if how else ("models", "passes", "seconds")
    columns = ("recipe", "cut", "left", "perplexity", "ratio", "above best", *last)
    title = f"{value['budget']} of {value['model']['id']}; {value['text']['name']}; dense {dense:.2f}"
    title += f", {how} {_exp(value['dense']['quantized_loss'])}" if how else ""
    return Group(table(columns, rows, title), *notes)


def _exp(loss: float | None) -> str:
    return "" if loss is None or not math.isfinite(loss) else f"{math.exp(min(loss, 700.0)):.2f}"


def recovered(value: Mapping[str, Any], out: Path) -> Group:
    """What a recovery won back, held out and on other texts, and what was done for it."""
    rows = []
    for entry in value["rows"]:
        dense, *others = (entry["loss"][name] for name in ("dense", "pruned", "recovered"))
        rows.append((entry["text"], *(_perplexity(loss, dense) for loss in (dense, *others))))
    lines = [
        f"{stage['how']}: {stage['seconds']:.1f} s, {stage['tokens']:,} tokens"
        + (f"; undone, as {stage['undone']}" if "undone" in stage else "")
        for stage in value["stages"]
    ]
    lines += [
        f"  {'ok  ' if proof['passed'] else 'FAIL'} {proof['name']}: {proof['detail']}" for proof in value["proofs"]
    ]
    shown = table(("perplexity, and times the dense model's", "dense", "pruned", "recovered"), rows)
    return Group(shown, *lines, f"written to {out}")


def recoveries(value: Mapping[str, Any]) -> Group:
    """The rows of a ``recover.json``: ways to recover from one cut, the best first."""
    names = [entry["text"] for entry in value["base"]]
    base = {entry["text"]: entry["loss"] for entry in value["base"]}

    def shown(losses: Mapping[str, float], held: Mapping[str, float] | None, which: str) -> list[str]:
        cells = [] if held is None else [_perplexity(held[which], held["dense"])]
        return [*(cells or [""]), *(_perplexity(losses[name], base[name]["dense"]) for name in names)]

    held = next((row["held_loss"] for row in value["rows"] if "held_loss" in row), None)
    rows = []
    if held is not None:
        rows += [
            ("dense", *shown({name: base[name]["dense"] for name in names}, held, "dense"), "", ""),
            ("cut", *shown({name: base[name]["pruned"] for name in names}, held, "before"), "", ""),
        ]
    done = [row for row in value["rows"] if "error" not in row]
    done.sort(key=lambda row: next(iter(row["loss"].values()), row["held_loss"]["after"]))
    for row in done:
        mark = " (undone)" if row["undone"] else ""
        cells = shown(row["loss"], row["held_loss"], "after")
        rows.append((row["how"] + mark, *cells, f"{row['tokens']:,}", f"{row['seconds']:.1f}"))
    notes = [f"{row['how']}: {row['error']}" for row in value["rows"] if "error" in row]
    short = [name.rpartition("/")[2] for name in names]
    title = f"{value['asked']['model']['id']} without {' '.join(value['asked']['drop'])}"
    return Group(table(("how", "held-out rows", *short, "tokens", "seconds"), rows, title), *notes)


def _perplexity(loss: float, dense: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.2f} ({math.exp(min(loss - dense, 700.0)):.3f}x)"


def agreement(value: Mapping[str, Any]) -> Group:
    """How much importances for several texts and tasks agree, and the units on which they agree least."""
    sources = [source.rpartition("/")[2] for source in value["sources"]]
    pairs = [(name, *(f"{number:.2f}" for number in row)) for name, row in zip(sources, value["spearman"], strict=True)]
    first = table((f"{value['metric']}: rank correlation", *sources), pairs)
    rows = [(u["unit"], u["kind"], *(str(rank) for rank in u["ranks"]), str(u["apart"])) for u in value["units"][:12]]
    title = f"ranks of the units that differ most, of {len(value['units'])} (1 goes first)"
    return Group(first, table(("unit", "kind", *sources, "apart"), rows, title))


def stable(value: Mapping[str, Any], drop: Sequence[Unit]) -> str:
    """How often each unit of a plan was chosen again on other draws, and what else was chosen as often."""
    draws, chosen = value["draws"], value["chosen"]
    mine = ", ".join(f"{unit} {chosen.get(str(unit), 0)}" for unit in drop)
    others = [
        f"{unit} {times}" for unit, times in chosen.items() if times * 2 >= draws and Unit.parse(unit) not in drop
    ]
    rest = f"; chosen there at least half of the time, and not here: {', '.join(others)}" if others else ""
    return f"chosen again in {draws} other draws of the calibration rows: {mine}{rest}"


def conclusion(summary: Mapping[str, Any], out: Path, page: Path, *, passed: bool) -> str:
    """What a run found, in a dozen lines."""
    names = {
        "perplexity": "perplexity",
        "parameters": "parameters",
        "bytes": "bytes on disk",
        "kv_bytes_per_token": "KV cache bytes per token",
        "prefill_ms": "prefill, ms",
        "decode_ms_per_token": "decode, ms per token",
    }
    lines = [f"{'':26}{'dense':>14}{summary.get('result', 'pruned'):>14}{'ratio':>9}"]
    for key, name in names.items():
        if key in summary:
            before, after = summary[key]
            form = ",.0f" if isinstance(before, int) else ",.2f"
            shown = ["not finite" if value is None else f"{value:{form}}" for value in (before, after)]
            ratio = f"{after / before:.3f}x" if before and after is not None else ""
            lines.append(f"{name:26}{shown[0]:>14}{shown[1]:>14}{ratio:>9}")
    lines += ["", f"dropped: {' '.join(summary['drop'])}"]
    lines += [f"proofs:  {'every one held' if passed else 'FAILED, see the report'}"]
    lines += [f"model:   {out / 'model'}", f"report:  {page}"]
    return "\n".join(lines)
