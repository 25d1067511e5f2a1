"""Choosing what to drop: from a budget to a plan, in a few lines."""

from __future__ import annotations

import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from depthprune import __version__
from depthprune.budget import Budget
from depthprune.data import Data, Mixture
from depthprune.errors import BudgetError, PlanError, unknown
from depthprune.layout import Layout
from depthprune.mixed import AnyOracle, oracle
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.registry import agree, find
from depthprune.scores import Scores
from depthprune.select.rank import Selection
from depthprune.units import UNITS, Unit, parse

SEARCH = "greedy:per=budget"  # what chooses unless told otherwise, where the metric is of whole plans
ENDS = {"ends": (0, -1), "plus": (0, 1, 2, 3, -2, -1)}  # words of --protect for blocks at both ends


def score(
    model: Model,
    data: Data | Mixture,
    metric: str | Callable[..., Scores] = "loss",
    *,
    unit: str = "any",
    **options: Any,
) -> Scores:
    """The score of every unit of a kind under a metric; the unit with the lowest goes first.

    ``options`` are those of ``ModelOracle``. Raises ``OptionError`` for unknown names.
    """
    _check_kind(unit)
    units = candidates(model.layout, unit, "none")
    return oracle(model, data, metric=metric, units=units, **options).scored()


def select(
    model: Model,
    budget: str,
    *,
    data: Data | Mixture,
    unit: str = "any",
    metric: str | Callable[..., Scores] = "loss",
    select: str | Callable[..., Selection] | None = None,
    protect: str | Sequence[Unit | str] | None = None,
    recipe: str | None = None,
    **options: Any,
) -> Plan:
    """Choose the units to drop for a budget, and write down why.

    ``unit`` is the kind of units that may go; ``protect`` lists units that must stay (``"none"`` lifts the default, the
    attention of block 0); ``select`` is by default ``greedy:per=budget`` for the loss and its like, else ``lowest``.
    ``options`` are those of ``ModelOracle``.
    Raises ``BudgetError`` for impossible budgets, ``OptionError`` for unknown names.
    """
    amount, unit = settle(budget, unit, model.layout)
    units = amount.candidates(model.layout, candidates(model.layout, unit, protect))
    asked = oracle(model, data, metric=metric, units=units, **options)
    return choose(asked, amount, units, unit=unit, select=select, seed=data.seed, recipe=recipe)


def stability(
    model: Model, budget: str, again: Iterable[Data | Mixture], *, memo: Path | None = None, **choice: Any
) -> dict[str, Any]:
    """How often each unit is chosen when the calibration rows are drawn anew: noise does not choose the same twice.

    ``again`` are the other draws, ``choice`` what ``select`` is given; each draw has a memo of its own.
    """
    times: Counter[str] = Counter()
    draws = 0
    seen: set[frozenset[bytes]] = set()
    for draws, data in enumerate(again, start=1):
        parts = data.parts if isinstance(data, Mixture) else (data,)
        rows = frozenset(row.numpy().tobytes() for part in parts for row in part.tokens)
        if rows in seen:
            text = f"{data.name} has no more rows than a draw takes, so all draws are alike: --stability says nothing"
            warnings.warn(text, UserWarning, stacklevel=2)
        seen.add(rows)
        own = None if memo is None else memo.with_name(f"{memo.stem}-draw-{draws}{memo.suffix}")
        times.update(str(unit) for unit in select(model, budget, data=data, memo=own, **choice).drop)
    return {"draws": draws, "chosen": dict(times.most_common())}


def settle(budget: str, unit: str, layout: Layout) -> tuple[Budget, str]:
    """Read a budget together with the kind of units it is for: ``8 blocks`` says both."""
    _check_kind(unit)
    amount = Budget.parse(budget, layout)
    if amount.kind is not None:
        if unit not in ("any", amount.kind):
            raise BudgetError(f"--drop {budget!r} counts units of kind {amount.kind}, but --unit is {unit}")
        unit = amount.kind
    return amount, unit


def _check_kind(unit: str) -> None:
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)


def candidates(layout: Layout, unit: str, protect: str | Sequence[Unit | str] | None = None) -> tuple[Unit, ...]:
    """The units of a kind that may be dropped: all but the protected ones, and blocks that hold a protected one.

    Raises ``BudgetError`` where there are none, ``PlanError`` for protected units that do not exist.
    """
    units = layout.units(unit)
    if not units:
        reasons = {block.reason for block in layout.blocks if block.reason}
        why = f": {'; '.join(sorted(reasons))}; use --unit block" if reasons else ""
        raise BudgetError(f"this model has no unit of kind {unit} that can be dropped{why}")
    kept = protected(layout, unit, protect)
    whole = {u for u in kept if not u.sublayer}
    holding = {u.whole for u in kept} if unit == "block" else set()
    return tuple(u for u in units if u not in kept and u.whole not in whole and u not in holding)


def protected(layout: Layout, unit: str, protect: str | Sequence[Unit | str] | None = None) -> tuple[Unit, ...]:
    """The units that must stay: those given, and the attention of block 0, without which several runtimes cannot serve.

    ``none`` among them lifts that default; ``ends`` stands for the first and the last block (SLEB), ``plus`` for the
    first four and the last two (Shortened LLaMA). A whole block 0 may go all the same: the next block's attention then
    is the first. Raises ``PlanError`` for units that do not exist.
    """
    given = (
        [part for part in protect.replace(" ", ",").split(",") if part] if isinstance(protect, str) else protect or []
    )
    words = [str(part).lower() for part in given]
    named = [part for part, word in zip(given, words, strict=True) if word not in ("none", *ENDS)]
    last = len(layout.blocks)
    ends = [block for word in words for block in ENDS.get(word, ())]
    units = (*parse(tuple(named)), *(Unit("", block % last) for block in ends))
    for one in units:
        try:
            layout.kind(one)
        except PlanError as error:
            raise PlanError(f"--protect: {error}") from None
    if unit == "block" or "none" in words:
        return tuple(dict.fromkeys(units))
    first = tuple(Unit("", 0, s.name) for s in layout.blocks[0].sublayers if s.kind == "attention")
    return tuple(dict.fromkeys((*first, *units)))


def choose(
    oracle: AnyOracle,
    budget: Budget,
    units: Sequence[Unit],
    *,
    unit: str,
    select: str | Callable[..., Selection] | None,
    seed: int = 0,
    recipe: str | None = None,
) -> Plan:
    """Run a selector on an oracle and write the plan. Raises ``OptionError`` where the metric cannot lead it."""
    select = select or (SEARCH if oracle.metric == oracle.measure else "lowest")
    name, function, options = find("selectors", select)
    agree(name, oracle.metric)
    selection: Selection = function(oracle, units, budget, **options)
    layout = oracle.model.layout
    gone = frozenset(selection.units)
    freed = layout.freed(gone)
    why: dict[str, Any] = {
        "metric": oracle.spec,
        "select": select if isinstance(select, str) else name,
        "unit": unit,
        "budget": budget.text,
        "nested": selection.nested,
        "evaluations": oracle.evaluations,
        "work": round(oracle.work, 3),
        "dense_loss": selection.dense,
        "data": oracle.data.describe(),
        "seed": seed,
        "recipe": recipe,
        "steps": [step.to_json() for step in selection.steps],
    }
    frees = {
        "parameters": freed,
        "fraction": round(freed / layout.parameters, 6),
        "kv_bytes_per_token": layout.kv_freed(gone),
    }
    return Plan(oracle.model.reference, selection.units, frees=frees, why=why, made_by=made_by())


def made_by() -> dict[str, str]:
    """The versions that a plan was made with."""
    return {
        "depthprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
