"""A run folder as read back from its JSON files: the plan, what was measured, and the network as the plan leaves it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthprune.errors import DepthpruneError, PlanError
from depthprune.units import Unit, parse

_MISSING = "not measured"
NAMES = {
    "block": "block",
    "attention": "attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "mixer": "mixer",
}


@dataclass(frozen=True)
class Fields:
    """A JSON object, read field by field: absent is ``None``, a wrong type is an error that names file and field."""

    values: Mapping[str, Any]
    where: str
    error: type[DepthpruneError] = DepthpruneError

    def _get(self, name: str, kind: type | tuple[type, ...], what: str) -> Any:
        value = self.values.get(name)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise self.error(
                f"{self.where}: {name!r} must be {what}, not {json.dumps(value)[:60]}; write the file again"
            )
        return value

    def text(self, name: str) -> str | None:
        found: str | None = self._get(name, str, "text")
        return found

    def number(self, name: str) -> float | None:
        found: float | None = self._get(name, (int, float), "a number")
        return found

    def finite(self, name: str) -> float | None:
        """A number, or ``None`` where it is not finite, as the standard error of a single sequence."""
        found = self.number(name)
        return found if found is not None and math.isfinite(found) else None

    def flag(self, name: str) -> bool | None:
        found: bool | None = self._get(name, bool, "true or false")
        return found

    def part(self, name: str) -> Fields:
        return Fields(self._get(name, dict, "an object") or {}, f"{self.where}, {name}", self.error)

    def parts(self, name: str) -> dict[str, Fields]:
        return {key: self.part(name).part(key) for key in self.part(name).values}

    def units(self, name: str) -> tuple[Unit, ...]:
        listed = self._get(name, list, "a list of units") or []
        if not all(isinstance(unit, str) for unit in listed):
            raise self.error(
                f"{self.where}: {name!r} must be a list of units such as '12.self_attn'; write the file again"
            )
        return parse(listed)

    def objects(self, name: str) -> list[Fields]:
        listed = self._get(name, list, "a list of objects") or []
        if not all(isinstance(each, dict) for each in listed):
            raise self.error(f"{self.where}: {name!r} must be a list of objects; write the file again")
        return [Fields(each, f"{self.where}, {name}[{index}]", self.error) for index, each in enumerate(listed)]


@dataclass(frozen=True)
class Run:
    """The files of a run folder as read; what was missing is ``None``."""

    folder: Path
    plan: Fields
    scores: Fields | None
    eval: Fields | None
    bench: Fields | None
    check: Fields | None
    notes: Fields | None
    config: Fields | None


def read(folder: Path) -> Run:
    """Read the JSON files of a run folder.

    Raises ``PlanError`` for a missing or damaged plan and ``DepthpruneError`` for any other damaged file.
    """
    plan = _load(folder / "plan.json", PlanError)
    if plan is None:
        raise PlanError(
            f"{folder / 'plan.json'} does not exist; a run folder needs a plan, as `depthprune plan` writes it"
        )
    if plan.number("format") != 1:
        raise PlanError(
            f"{plan.where}: format {plan.values.get('format')!r} is not 1, the only one known; write the plan again"
        )
    if "drop" not in plan.values:
        raise PlanError(f"{plan.where}: 'drop' is missing; list the units to drop, such as [\"12.self_attn\"]")
    others = (_load(folder / f"{name}.json") for name in ("scores", "eval", "bench", "check", "run", "model/config"))
    return Run(folder, plan, *others)


def _load(path: Path, error: type[DepthpruneError] = DepthpruneError) -> Fields | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as damage:
        raise error(f"{path} cannot be read ({damage}); write it again or remove it") from damage
    if not isinstance(found, dict):
        raise error(f"{path} holds no JSON object; write it again or remove it")
    return Fields(found, str(path), error)


@dataclass(frozen=True)
class Network:
    """The units of the model in execution order, and what the plan does to each."""

    kinds: Mapping[Unit, str]
    dropped: frozenset[Unit]
    protected: frozenset[Unit]
    blocks: int | None
    recorded: bool

    @classmethod
    def of(cls, run: Run) -> Network:
        dropped = frozenset(run.plan.units("drop"))
        count = run.plan.part("model").number("blocks")
        kinds: dict[Unit, str] = {}
        protected: frozenset[Unit] = frozenset()
        if run.scores is not None:
            count = count or run.scores.part("model").number("blocks")
            protected = frozenset(run.scores.units("protected"))
            for each in run.scores.objects("layout"):
                kinds[Unit.parse(each.text("unit") or "")] = each.text("kind") or "sublayer"
        recorded = bool(kinds)
        for step in run.plan.part("why").objects("steps"):
            unit = Unit.parse(step.text("unit") or "")
            kinds.setdefault(unit, step.text("kind") or ("sublayer" if unit.sublayer else "block"))
        for unit in sorted(dropped):
            kinds.setdefault(unit, "sublayer" if unit.sublayer else "block")
        return cls(kinds, dropped, protected, None if count is None else int(count), recorded)

    def inside(self, block: Unit) -> list[Unit]:
        """The sublayers of a block, in execution order."""
        return [unit for unit in self.kinds if unit.sublayer and unit.whole == block]

    def state(self, unit: Unit) -> str:
        """Kept, dropped or protected; a block whose sublayers are all dropped is dropped."""
        if unit in self.dropped or unit.whole in self.dropped:
            return "dropped"
        inside = [] if unit.sublayer or not self.recorded else self.inside(unit)
        if inside and self.dropped.issuperset(inside):
            return "dropped"
        return "protected" if unit in self.protected or unit.whole in self.protected else "kept"

    def strip(self) -> list[tuple[Unit, list[tuple[str, str, str]]]]:
        """For every block its cells (name, kind, state); empty where the number of blocks is not known."""
        if self.recorded:
            blocks = list(dict.fromkeys(unit.whole for unit in self.kinds))
        elif self.blocks is None or any(unit.stack for unit in self.dropped):
            return []
        else:
            blocks = [Unit("", index) for index in range(self.blocks)]
        found = []
        for block in blocks:
            inside = [unit for unit in self.inside(block) if self.recorded or unit in self.dropped]
            units = inside or [block]
            cells = [(str(unit), self.kinds.get(unit, "block"), self.state(unit)) for unit in units]
            if not self.recorded and units != [block]:
                cells.append((f"the rest of block {block}", "block", "kept"))
            found.append((block, cells))
        return found

    def cut(self) -> list[tuple[int, int | None, str]]:
        """How many units went, of how many, by kind: ``(12, 24, "attention sublayers")``."""
        blocks = {unit.whole for unit in self.dropped if self.state(unit.whole) == "dropped"}
        total = len({unit.whole for unit in self.kinds}) if self.recorded else self.blocks
        found = [(len(blocks), total, "blocks")] if blocks else []
        rest = [self.kinds[unit] for unit in self.dropped if unit.whole not in blocks]
        for kind in sorted(set(rest)):
            number = sum(unit.sublayer != "" and other == kind for unit, other in self.kinds.items())
            name = "" if kind == "sublayer" else f"{NAMES.get(kind, kind)} "
            found.append((rest.count(kind), number if self.recorded else None, f"{name}sublayers"))
        return [(count, of, what[:-1] if count == 1 and of is None else what) for count, of, what in found]


@dataclass(frozen=True)
class Figure:
    """A measured number as shown: the exact value, the text, the change against the reference, the spread."""

    value: float | None
    text: str = _MISSING
    change: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Measure:
    """One row of the table before and after."""

    key: str
    title: str
    short: str
    unit: str
    figures: tuple[Figure, ...]

    @property
    def measured(self) -> bool:
        return any(figure.value is not None for figure in self.figures)


# file, field, title, short title, unit
_MEASURES = (
    ("eval", "perplexity", "Perplexity", "Perplexity", ""),
    ("eval", "loss", "Loss, nats per token", "Loss", "nats"),
    ("eval", "parameters", "Parameters", "Parameters", "count"),
    ("eval", "bytes", "Weights on disk", "On disk", "bytes"),
    ("eval", "kv_bytes_per_token", "KV cache per token", "KV cache per token", "bytes"),
    ("bench", "prefill_ms", "Prefill latency", "Prefill time", "ms"),
    ("bench", "decode_ms_per_token", "Decode latency per token", "Decode time per token", "ms"),
    ("bench", "decode_tokens_per_second", "Decode speed", "Decode", "tokens/s"),
    ("bench", "bytes_per_step", "Bytes read per decode step", "Read per step", "bytes"),
    ("bench", "share_of_copy_bandwidth", "Share of copy bandwidth reached", "Bandwidth", "share"),
    ("bench", "peak_bytes", "Peak memory", "Peak memory", "bytes"),
)


def _models(run: Run) -> dict[str, dict[str, Fields]]:
    return {
        "eval": {each.text("name") or "?": each for each in (run.eval.objects("models") if run.eval else [])},
        "bench": {each.text("name") or "?": each for each in (run.bench.objects("models") if run.bench else [])},
    }


def model_names(run: Run) -> list[str]:
    return list(dict.fromkeys(name for models in _models(run).values() for name in models))


def measures_of(run: Run) -> dict[str, Measure]:
    """Every measured number of every model, by field."""
    models, names = _models(run), model_names(run)
    found = {}
    for file, key, title, short, unit in _MEASURES:
        entries = [models[file].get(name) for name in names]
        values = [None if entry is None else entry.number(key) for entry in entries]
        figures = [_figure(key, unit, value, values[0] if index else None) for index, value in enumerate(values)]
        figures = [_with_spread(figure, entry, key) for figure, entry in zip(figures, entries, strict=True)]
        found[key] = Measure(key, title, short, unit, tuple(figures))
    return found


def _figure(key: str, unit: str, value: float | None, reference: float | None) -> Figure:
    if value is None:
        return Figure(None)
    if reference is None or not reference or key == "share_of_copy_bandwidth":
        return Figure(value, show(value, unit))
    if key == "perplexity":
        return Figure(value, show(value, unit), f"×{value / reference:#.3g}")  # noqa: RUF001
    if key == "loss":
        return Figure(value, show(value, unit), _signed(value - reference, "+.3f"))
    return Figure(value, show(value, unit), _signed(100 * (value / reference - 1), "+.1f") + " %")


def _with_spread(figure: Figure, entry: Fields | None, key: str) -> Figure:
    low, high = (None, None) if entry is None else (entry.number(f"{key}_min"), entry.number(f"{key}_max"))
    if low is None or high is None:
        return figure
    return Figure(figure.value, figure.text, figure.change, f"{low:#.3g} to {high:#.3g}".replace(". ", " ").rstrip("."))


def _signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")  # noqa: RUF001


def show(value: float | None, unit: str = "") -> str:
    """A number as a person reads it: ``7.90 M``, ``15.8 MB``, ``1.24 ms``."""
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return str(value)
    if unit in ("count", "bytes"):
        for size, prefix in ((1e12, "T"), (1e9, "B" if unit == "count" else "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:#.3g}".rstrip(".") + f" {prefix}" + ("B" if unit == "bytes" else "")
        return f"{value:.4g}" + (" B" if unit == "bytes" else "")
    if unit == "share":
        return f"{100 * value:.3g} %"
    text = f"{value:#.4g}".rstrip(".") if abs(value) < 1e5 else f"{value:.4g}"
    return f"{text} {unit}" if unit and unit != "nats" else text


def ends_of(measure: Measure) -> tuple[float, float] | None:
    """The figures of the reference and of the result, where both were measured."""
    if len(measure.figures) < 2:
        return None
    first, last = measure.figures[0].value, measure.figures[-1].value
    return None if not first or last is None else (first, last)
