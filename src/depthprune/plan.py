"""The plan: what to drop, in which order, and why. Everything before it looks; everything after it obeys.

A plan is a small JSON file that a person can read, diff, edit and replay:

    {"format": 1, "model": {"id": "…"}, "drop": ["24.self_attn", "27"]}

is a whole one. Any prefix of the ``drop`` list of a nested plan is a plan too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from depthprune.errors import PlanError
from depthprune.files import write_text
from depthprune.units import Unit

FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """Which model is meant: its id or path, revision, number of blocks, and a fingerprint of its weights."""

    id: str
    revision: str | None = None
    blocks: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Plan:
    """An ordered list of units to drop, for one model, with the reasons.

    ``stand_in`` maps dropped units to what is put in their place: ``"bias"``, or a map of low rank ``"lowrank:16"``;
    ``frees`` is what the removal gains; ``why`` records metric, selector, budget, data and every step, and after
    ``drop`` where the stand-ins are. Equality ignores ``made_by``.
    Raises ``PlanError`` for units twice, and for stand-ins of units that stay.
    """

    model: Reference
    drop: tuple[Unit, ...]
    stand_in: Mapping[str, str] = field(default_factory=dict)
    frees: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        seen: set[Unit] = set()
        for unit in self.drop:
            if unit in seen:
                raise PlanError(f"the plan drops {unit} twice")
            if unit.sublayer and unit.whole in seen:
                raise PlanError(f"the plan drops {unit} after its whole block {unit.whole}")
            seen.add(unit)
        for name, form in self.stand_in.items():
            unit = Unit.parse(name)
            rank(form)
            if unit not in seen and (unit.sublayer or all(other.whole != unit for other in seen)):
                raise PlanError(f"the plan has a stand-in for {unit}, which it does not drop")

    def prefix(self, count: int) -> Plan:
        """The plan of the first ``count`` removals. Raises ``PlanError`` unless the plan is nested and long enough."""
        if self.why.get("nested") is False:
            raise PlanError("this plan is not nested: its first units are not the best choice for a smaller budget")
        if not 0 <= count <= len(self.drop):
            raise PlanError(f"the plan drops {len(self.drop)} units; it has no prefix of {count}")
        why = dict(self.why)
        if "steps" in why:
            why["steps"] = why["steps"][:count]
        left = {unit.whole for unit in self.drop[count:]} | set(self.drop[count:])
        stand_in = {name: form for name, form in self.stand_in.items() if Unit.parse(name) not in left}
        return replace(self, drop=self.drop[:count], stand_in=stand_in, frees={}, why=why)

    def diff(self, other: Plan) -> dict[str, list[str]]:
        """The units that only this plan drops, only the other, and both."""
        mine, theirs = set(self.drop), set(other.drop)
        return {
            "only_here": [str(unit) for unit in sorted(mine - theirs)],
            "only_there": [str(unit) for unit in sorted(theirs - mine)],
            "both": [str(unit) for unit in sorted(mine & theirs)],
        }

    def fits(self, reference: Reference) -> None:
        """Check that the plan was made for this model.

        Raises ``PlanError`` naming the field and both values where the number of blocks or the fingerprint differ.
        """
        for name in ("blocks", "fingerprint"):
            planned, actual = getattr(self.model, name), getattr(reference, name)
            if planned is not None and actual is not None and planned != actual:
                raise PlanError(
                    f"this plan is for {self.model.id} ({name} {_short(planned)}), "
                    f"not for {reference.id} ({name} {_short(actual)})"
                )

    def describe(self) -> str:
        """The plan in a few words, such as ``"12 units (7.self_attn, 3, …)"``."""
        names = [str(unit) for unit in self.drop]
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        return f"{len(names)} unit{'s' * (len(names) != 1)} ({shown})" if names else "nothing"

    def to_json(self) -> str:
        """The plan as JSON, one dropped unit per line."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "model": {key: value for key, value in vars(self.model).items() if value is not None},
            "drop": [str(unit) for unit in self.drop],
            "stand_in": dict(self.stand_in),
            "frees": dict(self.frees),
            "why": dict(self.why),
            "made_by": dict(self.made_by),
        }
        lines = [f" {json.dumps(key)}: {_lines(key, value)}" for key, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | Path) -> Path:
        """Write the plan; the file appears whole or not at all."""
        return write_text(path, self.to_json())

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> Plan:
        """Read a plan. Raises ``PlanError`` naming what is wrong with it."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source} is not JSON: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("drop"), list):
            raise PlanError(f'{source} is not a plan: it needs "format", "model" and a list "drop"')
        if fields.get("format") != FORMAT:
            raise PlanError(f"{source} has format {fields.get('format')!r}; this release reads format {FORMAT}")
        model = fields.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("id"), str):
            raise PlanError(f'{source} does not name its model: it needs "model": {{"id": …}}')
        if extra := model.keys() - {"id", "revision", "blocks", "fingerprint"}:
            raise PlanError(f"{source} has unknown fields in model: {', '.join(sorted(extra))}")
        _check_types(fields, source)
        if any(not isinstance(unit, str) for unit in fields["drop"]):
            raise PlanError(f'{source} is not a plan: "drop" must list units as text, such as "12.self_attn"')
        return cls(
            Reference(**model),
            tuple(Unit.parse(unit) for unit in fields["drop"]),
            **{name: fields.get(name) or {} for name in ("stand_in", "frees", "why", "made_by")},
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file. Raises ``PlanError`` where it is missing or malformed."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {getattr(error, 'strerror', None) or error}") from None


def rank(form: Any) -> int:
    """The rank of a stand-in: 0 for ``"bias"``, R for ``"lowrank:R"``. Raises ``PlanError`` for anything else."""
    match = re.fullmatch(r"bias|lowrank:([1-9]\d{0,8})", form) if isinstance(form, str) else None
    if match is None:
        raise PlanError(f"{form!r} is no stand-in; write bias, or lowrank:16 for a map of rank 16")
    return int(match[1] or 0)


def with_stand_ins(plan: Plan, form: str) -> Plan:
    """The plan with the same stand-in (``"bias"``, ``"lowrank:16"``; ``"none"``: nothing) for every dropped unit.

    Raises ``PlanError`` for another form.
    """
    if form == "none":
        return replace(plan, stand_in={})
    rank(form)
    return replace(plan, stand_in={str(unit): form for unit in plan.drop})


def _check_types(fields: Mapping[str, Any], source: str) -> None:
    for name, value in fields["model"].items():
        kind = int if name == "blocks" else str
        if value is not None and type(value) is not kind:
            wanted = "a number" if kind is int else "text"
            raise PlanError(f"{source}: model.{name} must be {wanted}, not {value!r}")
    for name in ("stand_in", "frees", "why", "made_by"):
        if not isinstance(fields.get(name) or {}, dict):
            raise PlanError(f"{source}: {name} must be an object, not {fields[name]!r}")
    if not isinstance((fields.get("why") or {}).get("steps", []), list):
        raise PlanError(f"{source}: why.steps must be a list, not {fields['why']['steps']!r}")


def _lines(key: str, value: Any) -> str:
    if key == "drop" and value:
        return "[\n  " + ",\n  ".join(json.dumps(unit) for unit in value) + "\n ]"
    if key == "why" and value.get("steps"):
        steps = ",\n   ".join(json.dumps(step) for step in value["steps"])
        rest = json.dumps({name: item for name, item in value.items() if name != "steps"})
        comma = ", " if len(value) > 1 else ""
        return f'{rest[:-1]}{comma}"steps": [\n   {steps}\n ]}}'
    return json.dumps(value)


def _short(value: Any) -> str:
    return str(value)[:19]
