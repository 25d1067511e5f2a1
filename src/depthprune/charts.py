"""Where every bar and point of the report's charts goes: plain arithmetic, drawn by the page's template.

Coordinates are SVG user units: x to the right, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from depthprune.units import Unit

_LEFT, _RIGHT, _PANEL, _GAP, _FOOT = 46.0, 8.0, 96.0, 38.0, 26.0
_CURVE_HEIGHT = 190.0
_DWARFS = 20.0  # above so many times the median, one bar would flatten all the others


@dataclass(frozen=True)
class Score:
    """What a metric says about one unit, and what became of the unit: kept, dropped or protected."""

    unit: Unit
    kind: str
    state: str
    value: float
    se: float | None = None


@dataclass(frozen=True)
class Mark:
    """One bar; ``whisker`` holds the two ends of its error bar."""

    score: Score
    x: float
    y: float
    width: float
    height: float
    whisker: tuple[float, float] | None

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Panel:
    """The bars of one kind of unit."""

    kind: str
    top: float
    bottom: float
    zero: float
    ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Bars:
    """Small multiples over the blocks: one panel per kind, all on one scale."""

    width: float
    height: float
    left: float
    panels: tuple[Panel, ...]
    columns: tuple[Tick, ...]
    threshold: float


@dataclass(frozen=True)
class Step:
    """A point of the removal curve: the loss once ``name`` is gone too."""

    name: str
    loss: float
    se: float | None = None


@dataclass(frozen=True)
class Point:
    """A step, placed; ``low`` and ``high`` are the ends of its error bar."""

    step: Step
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Loss after each removal; the right-hand axis shows the same ticks as perplexity."""

    width: float
    height: float
    left: float
    right: float
    bottom: float
    points: tuple[Point, ...]
    losses: tuple[Tick, ...]
    perplexities: tuple[Tick, ...]


@dataclass(frozen=True)
class Scale:
    """A value axis: linear, or with a threshold linear near zero and logarithmic beyond."""

    low: float
    high: float
    threshold: float = 0.0

    def bend(self, value: float) -> float:
        if not self.threshold:
            return value
        return math.copysign(math.log10(1 + abs(value) / self.threshold), value)

    def place(self, value: float, top: float, bottom: float) -> float:
        """The height at which a value is drawn; values beyond the ends stay at the ends."""
        low, high = self.bend(self.low), self.bend(self.high)
        share = (self.bend(min(max(value, self.low), self.high)) - low) / (high - low)
        return bottom - share * (bottom - top)

    def ticks(self, top: float, bottom: float, *, wanted: int = 4) -> tuple[Tick, ...]:
        if not self.threshold:
            values = _round_values(self.low, self.high, wanted)
        else:
            first = round(math.log10(self.threshold))
            powers = [10.0**power for power in range(first, math.ceil(math.log10(max(self.high, -self.low))) + 1)]
            values = [0.0]
            for value in sorted([*powers, *(-power for power in powers)], key=abs, reverse=True):
                at = self.place(value, top, bottom)
                if self.low <= value <= self.high and all(abs(at - self.place(v, top, bottom)) >= 15 for v in values):
                    values.append(value)
            values.sort()
        return tuple(Tick(self.place(value, top, bottom), f"{value:.6g}".replace("-", "−")) for value in values)  # noqa: RUF001


def scale(values: Sequence[float], *, wanted: int = 4) -> Scale:
    """The axis for bars from zero: logarithmic beyond a threshold where one value dwarfs the others."""
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    low, high = min(0.0, *finite), max(0.0, *finite)
    if low == high:
        high = 1.0
    sizes = sorted(abs(value) for value in finite if value)
    if len(sizes) >= 4:
        quarter, half, _ = quantiles(sizes, method="inclusive")
        if sizes[-1] > _DWARFS * half:
            return Scale(low, high, 10.0 ** math.floor(math.log10(quarter)))
    return Scale(low, high)


def bars(scores: Sequence[Score], kinds: Sequence[str], places: Sequence[tuple[str, int]]) -> Bars:
    """Lay out one panel for each kind that has scores, with a column for each block."""
    column = min(30.0, max(9.0, 860 / len(places)))
    width = _LEFT + _RIGHT + column * len(places)
    axis = scale([score.value for score in scores])
    order = {place: index for index, place in enumerate(places)}
    panels: list[Panel] = []
    top = _GAP
    for kind in kinds:
        chosen = [score for score in scores if score.kind == kind]
        if not chosen:
            continue
        bottom = top + _PANEL
        zero = axis.place(0.0, top, bottom)
        marks = tuple(_marks(chosen, order, column, axis, top, bottom))
        panels.append(Panel(kind, top, bottom, zero, axis.ticks(top, bottom), marks))
        top = bottom + _GAP
    every = next((step for step in (1, 2, 5, 10, 20, 50) if step * column >= 22), 100)
    labels = tuple(
        Tick(_LEFT + (index + 0.5) * column, f"{stack[:3]} {block}" if stack and not block else str(block))
        for index, (stack, block) in enumerate(places)
        if block % every == 0
    )
    return Bars(width, top - _GAP + _FOOT, _LEFT, tuple(panels), labels, axis.threshold)


def _marks(
    scores: Sequence[Score], order: Mapping[tuple[str, int], int], column: float, axis: Scale, top: float, bottom: float
) -> list[Mark]:
    marks: list[Mark] = []
    zero = axis.place(0.0, top, bottom)
    shared: dict[int, list[Score]] = {}
    for score in scores:
        shared.setdefault(order[score.unit.stack, score.unit.block], []).append(score)
    for index, group in shared.items():
        width = column * 0.72 / len(group)
        for offset, score in enumerate(group):
            end = axis.place(score.value if not math.isnan(score.value) else axis.high, top, bottom)
            whisker = None
            if score.se and math.isfinite(score.value + score.se):
                ends = (score.value - 2 * score.se, score.value + 2 * score.se)
                whisker = (axis.place(ends[0], top, bottom), axis.place(ends[1], top, bottom))
            x = _LEFT + (index + 0.14) * column + offset * width
            marks.append(Mark(score, x, min(zero, end), width, max(abs(zero - end), 1.0), whisker))
    return marks


def curve(steps: Sequence[Step]) -> Curve:
    """Lay out the loss after each step, the first being the intact model where it is known."""
    left, right = _LEFT + 4, 46.0
    column = min(46.0, max(18.0, 800 / max(len(steps), 1)))
    width = max(left + right + column * len(steps), 420.0)
    column = (width - left - right) / len(steps)
    spans = [(step.loss - 2 * (step.se or 0), step.loss + 2 * (step.se or 0)) for step in steps]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    room = (high - low) * 0.06 or 0.1
    axis = Scale(low - room, high + room)
    top, bottom = 10.0, 10.0 + _CURVE_HEIGHT

    def placed(value: float) -> float:
        return axis.place(value, top, bottom)

    points = tuple(
        Point(step, left + (index + 0.5) * column, placed(step.loss), placed(span[0]), placed(span[1]))
        for index, (step, span) in enumerate(zip(steps, spans, strict=True))
    )
    ticks = axis.ticks(top, bottom, wanted=5)
    perplexities = tuple(
        Tick(placed(value), f"{math.exp(min(value, 700)):.4g}") for value in _round_values(axis.low, axis.high, 5)
    )
    foot = 22 + 4.6 * max(len(step.name) for step in steps)  # names are written aslant
    return Curve(width, bottom + foot, left, width - right, bottom, points, ticks, perplexities)


def _round_values(low: float, high: float, wanted: int) -> list[float]:
    """About so many round values (1, 2 or 5 times a power of ten) between two ends."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
