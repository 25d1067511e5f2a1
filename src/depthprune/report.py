"""One HTML page about a run, made from the JSON files of its folder and from nothing else.

    plan.json     what was dropped and why; the only file that must be there
    scores.json   {"format", "model": {"id", "blocks"}, "layout": [{"unit", "kind", "parameters"}], "protected": [unit],
                   "metrics": {name: {"data": {…}, "dense": {"loss"}, "units": {unit: {"score", "se"}}}}}
    eval.json     {"format", "text": {"name", "tokens", "digest"}, "window", "stride", "overlap",
                   "models": [{"name", "path", "perplexity", "loss", "parameters", "bytes", "kv_bytes_per_token"}],
                   "recovery": {"how", "tokens", "seconds", "text", "warning"}}; the last where weights were recovered
    bench.json    what ``bench`` returns
    check.json    {"format", "passed", "proofs": [{"name", "passed", "detail"}]}
    run.json      {"command": text or list of arguments}; optional

In ``models`` the first is the reference and the last is the result. Steps of a plan may carry ``loss`` (after the
step), ``rise``, ``se``, ``score`` and ``ties`` (the units that were as good).
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from depthprune import charts
from depthprune.files import write_text
from depthprune.run import NAMES, Fields, Measure, Network, Run, ends_of, measures_of, model_names, read, show
from depthprune.units import KINDS, Unit

LETTERS = {"block": "B", "attention": "A", "cross_attention": "C", "mlp": "M", "mixer": "X", "sublayer": "S"}
_RATIO_TO_WARN, _OVERLAP_TO_WARN = 1.5, 0.01
_TILES = ("perplexity", "parameters", "bytes", "kv_bytes_per_token", "prefill_ms", "decode_ms_per_token")


def report(run: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    Reads ``plan.json`` and, where they exist, ``scores.json``, ``eval.json``, ``bench.json``, ``check.json``,
    ``run.json`` and ``model/config.json``; what is missing the page says was not measured. The page is one file, loads
    nothing from anywhere, and is written beside and renamed.

    Raises ``PlanError`` for a missing or damaged plan and ``DepthpruneError`` for any other damaged file.
    """
    found = read(Path(run))
    page = _environment().get_template("report.html.jinja").render(view(found))
    return write_text(found.folder / "report.html", page)


def _environment() -> Environment:
    folder = Path(__file__).parent
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["px"] = lambda value: f"{value:.1f}".removesuffix(".0")
    made.filters["show"] = show
    made.filters["whole"] = lambda value: "an unknown number of" if value is None else f"{value:.0f}"
    return made


def view(run: Run) -> dict[str, Any]:
    """Everything the template shows, by name."""
    plan, why = run.plan, run.plan.part("why")
    model = plan.part("model").text("id") or "unnamed model"
    replay = ["depthprune", "drop", plan.part("model").text("id") or "MODEL", str(run.folder / "plan.json")]
    if model.startswith(("/", ".", "~")):  # a folder: its name says more than its place
        model = model.rstrip("/").rpartition("/")[2]
    net, measures = Network.of(run), measures_of(run)
    strip, curve, steps = net.strip(), _curve(run), _steps(run, net)
    return {
        "run": run,
        "model": model,
        "net": net,
        "cut": net.cut(),
        "removed": _removed(run),
        "text": run.eval.part("text").text("name") if run.eval else None,
        "ends": ends_of(measures["perplexity"]),
        "perplexity": measures["perplexity"],
        "measures": [measure for measure in measures.values() if measure.measured],
        "tiles": [measures[name] for name in _TILES],
        "models": model_names(run),
        "recovery": _recovery(run),
        "warnings": _warnings(run, measures),
        "passed": bool(run.check and run.check.flag("passed")) and not _failed(run),
        "proofs": run.check.objects("proofs") if run.check else [],
        "failed": len(_failed(run)),
        "strip": strip,
        "cell_kinds": sorted({kind for _, cells in strip for _, kind, _ in cells}),
        "charts": _charts(run, net),
        "why": why,
        "steps": steps,
        "scored": any(step.score is not None for step in steps),
        "stable": any(step.again for step in steps),
        "curve": curve,
        "curve_has_errors": curve is not None and any(point.step.se for point in curve.points),
        "uneven": any(unit.sublayer for unit in net.dropped),
        "remote": bool(run.config and run.config.values.get("auto_map")),
        "loader": _loader(run),
        "folder": repr(str(run.folder / "model")),
        "replay": shlex.join([*replay, "--out", "DIR"]),
        "provenance": _provenance(run),
        "names": NAMES,
        "letters": LETTERS,
    }


def _removed(run: Run) -> tuple[str, str]:
    """The size of the cut, large and small: ``("25.0 %", "of the parameters in the blocks, 6 units")``."""
    units = len(run.plan.units("drop"))
    listed = f"{units} unit{'s' * (units != 1)}"
    freed = run.plan.part("frees").number("parameters")
    layout = run.scores.objects("layout") if run.scores else []
    stack = sum(each.number("parameters") or 0 for each in layout if each.text("kind") == "block")
    if freed is None or not stack:
        return listed, "" if freed is None else f"{show(freed, 'count')} parameters"
    return f"{100 * freed / stack:.1f} %", f"of the parameters in the blocks, {listed}"


def _recovery(run: Run) -> str:
    """How weights were recovered, and how much of the damage that won back on the evaluation text."""
    if run.eval is None or not run.eval.part("recovery").values:
        return ""
    found, losses = run.eval.part("recovery"), [entry.number("loss") for entry in run.eval.objects("models")]
    done = f"Weights were recovered by {found.text('how')} on {show(found.number('tokens'), 'count')} tokens of "
    done += f"{found.text('text')} in {found.number('seconds') or 0:.0f} s"
    dense, cut, last = losses if len(losses) == 3 else (None, None, None)
    if dense is None or cut is None or last is None or not cut > dense:
        return f"{done}."
    return f"{done}: {100 * (cut - last) / (cut - dense):.0f} % of the loss that the cut had added is gone again."


def _failed(run: Run) -> list[Fields]:
    return [proof for proof in (run.check.objects("proofs") if run.check else []) if not proof.flag("passed")]


def _warnings(run: Run, measures: dict[str, Measure]) -> list[str]:
    """What a person must know before using the result, the worst first."""
    found = []
    for proof in _failed(run):
        detail = f": {proof.text('detail')}" if proof.text("detail") else ""
        found.append(f"The check \u201c{proof.text('name')}\u201d failed{detail}. Do not deploy this folder.")
    if run.check and not run.check.flag("passed") and not found:
        found.append("The check failed. Do not deploy this folder.")
    for entry in run.eval.objects("models") if run.eval else []:
        if entry.values.get("perplexity", 0) is None:
            found.append(
                f"The perplexity of the {entry.text('name')} model is not a number: its weights are damaged, or it "
                "overflows. Do not deploy this folder."
            )
    perplexity = ends_of(measures["perplexity"])
    if perplexity and not perplexity[1] / perplexity[0] <= _RATIO_TO_WARN:
        found.append(
            f"Perplexity is {perplexity[1] / perplexity[0]:.3g} times that of the intact model. "
            "A cut this deep usually needs training (`recover --how distill`), or a smaller budget."
        )
    found += _overlaps(run)
    if run.eval and (warning := run.eval.part("recovery").text("warning")):
        found.append(f"{warning[:1].upper()}{warning[1:]}.")
    for key, what in (("prefill_ms", "Prefill"), ("decode_ms_per_token", "Decoding")):
        ends = ends_of(measures[key])
        if ends and ends[1] > ends[0]:
            found.append(f"{what} got slower, not faster: {show(ends[0], 'ms')} before, {show(ends[1], 'ms')} after.")
    steps = run.plan.part("why").objects("steps")
    ties = sum(bool(step.units("ties")) for step in steps)
    if ties:
        found.append(
            f"{ties} of the {len(steps)} choices {'was a tie' if ties == 1 else 'were ties'}: another unit was as good "
            "within the standard error, so other calibration text could choose otherwise."
        )
    return found


def _overlaps(run: Run) -> list[str]:
    if run.eval is None:
        return []
    flatters = "so the perplexity flatters the result; evaluate on other text."
    text = run.eval.part("text").text("digest")
    if text is not None and text == run.plan.part("why").part("data").text("digest"):
        return [f"The evaluation text is the calibration text, {flatters}"]
    share = run.eval.number("overlap") or 0.0
    if share <= _OVERLAP_TO_WARN:
        return []
    return [f"{show(share, 'share')} of the evaluation text also occurs in the calibration text, {flatters}"]


@dataclass(frozen=True)
class Importance:
    """The chart of one metric, with its data and the unit of its scores."""

    metric: str
    unit: str
    data: str
    bars: charts.Bars


def _charts(run: Run, net: Network) -> list[Importance]:
    found = []
    metrics = run.scores.parts("metrics") if run.scores else {}
    chosen = run.plan.part("why").text("metric")
    for metric, fields in sorted(metrics.items(), key=lambda pair: pair[0] != chosen):
        scores = []
        for name, entry in fields.parts("units").items():
            unit, value = Unit.parse(name), entry.number("score")
            kind = net.kinds.get(unit, "sublayer" if unit.sublayer else "block")
            if value is not None:
                scores.append(charts.Score(unit, kind, net.state(unit), value, entry.finite("se")))
        if scores:
            units = [*net.kinds, *(score.unit for score in scores)]
            places = sorted(
                {(unit.stack, unit.block) for unit in units}, key=lambda place: (place[0] != "encoder", place)
            )
            kinds = dict.fromkeys([*KINDS, *(score.kind for score in scores)])
            unit_name = "nats of loss" if metric.partition(":")[0] == "loss" else f"score, {metric}"
            data = fields.part("data").text("name") or "its calibration text"
            found.append(Importance(metric, unit_name, data, charts.bars(scores, list(kinds), places)))
    return found


@dataclass(frozen=True)
class Removal:
    """One row of the table of steps."""

    unit: str
    kind: str
    loss: float | None
    rise: float | None
    se: float | None
    score: float | None
    ties: str
    again: str = ""  # in how many other draws of the calibration rows it was chosen too


def _dense_loss(run: Run) -> float | None:
    """The calibration loss of the intact model, if it was measured on the text that the plan was made with."""
    if run.scores is None:
        return None
    data = run.plan.part("why").part("data").text("digest")
    for fields in run.scores.parts("metrics").values():
        loss = fields.part("dense").number("loss")
        if loss is not None and fields.part("data").text("digest") in (None, data):
            return loss
    return None


def _steps(run: Run, net: Network) -> list[Removal]:
    steps = run.plan.part("why").objects("steps")
    if not steps:
        return [Removal(str(unit), net.kinds[unit], None, None, None, None, "") for unit in run.plan.units("drop")]
    found, before = [], _dense_loss(run)
    stable = run.plan.part("why").part("stability")
    draws, chosen = stable.number("draws"), stable.part("chosen")
    for step in steps:
        loss, rise, score = step.number("loss"), step.number("rise"), step.number("score")
        if rise is None and loss is not None and before is not None:
            rise = loss - before
        before = loss
        ties = ", ".join(map(str, step.units("ties")))
        unit = step.text("unit") or ""
        again = f"{chosen.number(unit) or 0:.0f} of {draws:.0f}" if draws else ""
        found.append(Removal(unit, net.kinds[Unit.parse(unit)], loss, rise, step.finite("se"), score, ties, again))
    return found


def _curve(run: Run) -> charts.Curve | None:
    steps = run.plan.part("why").objects("steps")
    points = [(step.text("unit") or "", step.number("loss"), step.finite("se")) for step in steps]
    known = [charts.Step(name, loss, se) for name, loss, se in points if loss is not None and math.isfinite(loss)]
    dense = _dense_loss(run)
    if not known:
        return None
    return charts.curve([*([] if dense is None else [charts.Step("intact", dense)]), *known])


def _provenance(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Where everything came from: titled groups of names and values."""
    why = run.plan.part("why")
    command = (run.notes or Fields({}, "")).values.get("command", why.values.get("command"))
    groups = [
        ("Model", _scalars(run.plan.part("model"))),
        ("Choice", [*_scalars(why, skip=("command",)), *_stand_ins(run)]),
        ("Freed, by the plan", _scalars(run.plan.part("frees"))),
        ("Calibration text", _scalars(why.part("data"))),
        ("Evaluation text", [*_scalars(run.eval.part("text")), *_scalars(run.eval)] if run.eval else []),
        ("Speed", _scalars(run.bench) if run.bench else []),
        ("Versions", _scalars(run.plan.part("made_by"))),
    ]
    if command:
        line = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
        groups.append(("Command", [("command line", line)]))
    return [(title, rows) for title, rows in groups if rows]


def _scalars(fields: Fields, skip: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    kept = {
        key: value
        for key, value in fields.values.items()
        if isinstance(value, str | int | float) and key not in (*skip, "format")
    }
    return [(key.replace("_", " "), _plain(value)) for key, value in kept.items()]


def _plain(value: str | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else str(value)


def _stand_ins(run: Run) -> list[tuple[str, str]]:
    return [(f"stand-in for {unit}", str(form)) for unit, form in run.plan.part("stand_in").values.items()]


def _loader(run: Run) -> str:
    """The class of transformers that loads the model, by the architecture that its config names."""
    listed = (run.config.values.get("architectures") if run.config else None) or ["ForCausalLM"]
    ends = {
        "ForCausalLM": "AutoModelForCausalLM",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
    }
    return next((loader for end, loader in ends.items() if str(listed[0]).endswith(end)), "AutoModel")
