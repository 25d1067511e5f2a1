"""Recipes: the papers' settings by name, one TOML file each. No torch.

    --recipe shortgpt                           a paper's settings
    --recipe shortened-llama-taylor:code=true   those of its released code, where the two differ
    --recipe mine.toml                          your own

A file needs ``title``, ``unit``, ``metric`` and ``select``. What it leaves out is the caller's default, as for what a
paper does not say. A table ``[code.FIELD]`` holds the ``value`` of a field in the released code, and ``why``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from depthprune.errors import OptionError, unknown
from depthprune.units import UNITS

# What a recipe sets, each with the type of its value, and the least value of a number.
TYPES: dict[str, type] = {
    "unit": str,
    "metric": str,
    "select": str,
    "protect": str,
    "data": str,
    "sequences": int,
    "length": int,
    "seed": int,
    "dtype": str,
}
LEAST = {"sequences": 1, "length": 2, "seed": 0}
CHOICES: dict[str, tuple[str, ...]] = {"unit": UNITS, "dtype": ("float32", "bfloat16", "float16")}
TEXTS = ("title", "paper", "section")
NEEDED = ("title", "unit", "metric", "select")


@dataclass(frozen=True)
class Difference:
    """One setting in which the released code differs from its paper: the field, its value there, and why."""

    field: str
    value: str | int
    why: str


@dataclass(frozen=True)
class Recipe:
    """The settings of one method, as its paper has them or as its released code does.

    ``name``: what it is called, the file's name without ``.toml``. ``title``: the method in a line. ``paper``: its
    arXiv id. ``section``: where the paper says it. ``unit``: what may go. ``metric``: how units are scored. ``select``:
    how they are chosen. ``protect``: what must stay. ``data``: the calibration text. ``sequences``, ``length``: how
    many, and of how many tokens. ``seed``: that of the draw. ``dtype``: the precision of the model. ``notes``: what
    else paper and code do, in sentences. ``differences``: the settings in which the released code differs.
    ``code``: whether those are in force.
    """

    name: str
    title: str
    unit: str
    metric: str
    select: str
    paper: str | None = None
    section: str | None = None
    protect: str | None = None
    data: str | None = None
    sequences: int | None = None
    length: int | None = None
    seed: int | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    code: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What the recipe sets, by field; what it leaves to the caller is not in it."""
        return {name: value for name in TYPES if (value := getattr(self, name)) is not None}

    @property
    def spec(self) -> str:
        """How to ask for this recipe again."""
        return f"{self.name}:code=true" if self.code else self.name


def names() -> tuple[str, ...]:
    """The recipes that come with depthprune."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.toml")))


def load(spec: str) -> Recipe:
    """Read a recipe by its name or by the path of a ``.toml`` file, either followed by ``:code=true`` or not.

    Raises ``OptionError`` for names, options, fields and values that do not exist, naming the file and the field.
    """
    name, colon, option = spec.rpartition(":")
    if not colon or spec.endswith(".toml"):
        name, option = spec, ""
    if option not in ("", "code=true", "code=false"):
        raise OptionError(f"{option!r} is no option of recipe {name!r}; write {name}:code=true for its released code")
    if not name.endswith(".toml"):
        if name not in names():
            raise unknown("recipe", name, names())
        recipe = read(Path(__file__).parent / f"{name}.toml")
    else:
        recipe = replace(read(Path(name).expanduser()), name=name)
    if option != "code=true":
        return recipe
    if not recipe.differences:
        raise OptionError(f"recipe {name!r} knows no difference between paper and code; leave out code=true")
    changes: dict[str, Any] = {difference.field: difference.value for difference in recipe.differences}
    return replace(recipe, code=True, **changes)


def read(path: Path) -> Recipe:
    """Read a recipe from a file. Raises ``OptionError``, naming the file and the field."""
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not TOML: {error}") from None
    code, notes = fields.pop("code", {}), fields.pop("notes", [])
    for name, value in fields.items():
        if name not in (*TYPES, *TEXTS):
            raise OptionError(f"{path}: {unknown('field', name, (*TYPES, *TEXTS, 'notes', 'code'))}")
        _check(f"{path}: {name}", name, value)
    for name in NEEDED:
        if name not in fields:
            raise OptionError(f"{path}: {name} is missing; a recipe needs {', '.join(NEEDED)}")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise OptionError(f"{path}: notes must be a list of sentences")
    if not isinstance(code, dict):
        raise OptionError(f"{path}: code must be tables such as [code.metric]")
    differences = tuple(_difference(path, name, table, fields) for name, table in code.items())
    return Recipe(path.stem, **fields, notes=tuple(notes), differences=differences)


def _difference(path: Path, name: str, table: object, fields: Mapping[str, Any]) -> Difference:
    if name not in TYPES:
        raise OptionError(f"{path}: {unknown('field', f'code.{name}', (f'code.{known}' for known in TYPES))}")
    if not isinstance(table, dict) or table.keys() != {"value", "why"}:
        raise OptionError(f"{path}: [code.{name}] needs a value and why, and nothing else")
    _check(f"{path}: code.{name}.value", name, table["value"])
    _check(f"{path}: code.{name}.why", "why", table["why"])
    if table["value"] == fields.get(name):
        raise OptionError(f"{path}: code.{name}.value is {table['value']!r} already; leave [code.{name}] out")
    return Difference(name, table["value"], table["why"])


def _check(where: str, name: str, value: object) -> None:
    """Refuse a value of another type, a number that is too small, an empty text, and a choice that is none."""
    if TYPES.get(name, str) is int:
        if type(value) is not int or value < LEAST[name]:
            raise OptionError(f"{where} must be a whole number of at least {LEAST[name]}, not {value!r}")
    elif not isinstance(value, str) or not value.strip():
        raise OptionError(f"{where} must be text, not {value!r}")
    elif name in CHOICES and value not in CHOICES[name]:
        raise OptionError(f"{where}: {unknown(name, value, CHOICES[name])}")
