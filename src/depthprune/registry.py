"""Names to functions: metrics and selectors, with options parsed from their signatures. No torch.

Built-ins are the lists below; outsiders register functions as entry points (``depthprune.metrics``,
``depthprune.selectors``, ``depthprune.recoverers``; ``depthprune.exporters`` for forms), loaded when asked for; Python
users pass a function. Keyword-only arguments are the options: ``cosine:tokens=last``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from depthprune.errors import OptionError, unknown

TABLES: dict[str, dict[str, str]] = {
    "metrics": {
        **{
            name: f"depthprune.metrics.stream:{name}"
            for name in ("cosine", "angular", "l1", "l2", "relative_l1", "relative_l2")
        },
        **{name: f"depthprune.metrics.loss:{name}" for name in ("loss", "kl", "js", "logit_distance", "error")},
        "shapley": "depthprune.metrics.shapley:shapley",
        "banzhaf": "depthprune.metrics.shapley:banzhaf",
        "taylor": "depthprune.metrics.gradient:taylor",
        "gates": "depthprune.metrics.gates:gates",
        "magnitude": "depthprune.metrics.weight:magnitude",
        "random": "depthprune.metrics.baseline:random",
        "last": "depthprune.metrics.baseline:last",
    },
    "selectors": {
        "lowest": "depthprune.select.rank:lowest",
        "contiguous": "depthprune.select.rank:contiguous",
        "joint": "depthprune.select.rank:joint",
        "iterative": "depthprune.select.rank:iterative",
        "greedy": "depthprune.select.search:greedy",
        "beam": "depthprune.select.beam:beam",
        "evolve": "depthprune.select.evolve:evolve",
    },
    "recoverers": {
        **{name: f"depthprune.recover.closed:{name}" for name in ("refit", "linear")},
        "scale": "depthprune.recover.scale:scale",
        **{name: f"depthprune.recover.fill:{name}" for name in ("mean", "lstsq", "mse", "lm")},
        **{name: f"depthprune.recover.train:{name}" for name in ("full", "tail")},
        "lora": "depthprune.recover.lora:lora",
        "distill": "depthprune.recover.distill:distill",
    },
    "forms": {
        "hf": "depthprune.export.hf:write",
        "plain": "depthprune.export.hf:plain",
        "nemotron-nas": "depthprune.export.nemotron_nas:write",
        "gguf": "depthprune.export.gguf:write",
        "zeroed": "depthprune.export.zeroed:write",
    },
}

# Metrics that can be measured of whole plans, not only of single units, and the selectors that need one of these.
MEASURED = ("loss", "kl", "js", "logit_distance", "error")
SEARCHES = ("greedy", "beam", "evolve")


def agree(selector: str, metric: str, unit: str = "any") -> None:
    """Refuse a search by whole plans under a metric of single units, and a joint ranking of blocks.

    Raises ``OptionError``.
    """
    if selector == "joint" and unit == "block":
        raise OptionError("joint ranks attention and MLP sublayers together, not blocks; use --unit any")
    if selector in SEARCHES and metric not in MEASURED:
        raise OptionError(
            f"{selector} goes by what whole plans cost ({', '.join(MEASURED)}), not by {metric}; "
            "choose one of these as --metric, or --select lowest or iterative"
        )


def names(table: str) -> tuple[str, ...]:
    """All names in a table, built in and registered by others."""
    return tuple(sorted({*TABLES[table], *_outsiders(table).names}))


def ways(how: str) -> list[str]:
    """The recoverers of ``a+b``, in turn; a plus inside a value (``lora:targets=gate_proj+up_proj``) stays."""
    known, parts = names("recoverers"), list[str]()
    for piece in how.split("+"):
        if parts and "=" in parts[-1] and piece.partition(":")[0] not in known:
            parts[-1] += f"+{piece}"
        else:
            parts.append(piece)
    return parts


def _outsiders(table: str) -> EntryPoints:
    return entry_points(group=f"depthprune.{'exporters' if table == 'forms' else table}")


def find(table: str, spec: str | Callable[..., Any]) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """Look up ``name`` or ``name:option=value,…``: the name, the function, and its options.

    Raises ``OptionError`` for a name or an option that does not exist, listing those that do.
    """
    if callable(spec):
        return getattr(spec, "__name__", "function"), spec, {}
    name, _, rest = spec.partition(":")
    if name in TABLES[table]:
        module, _, attribute = TABLES[table][name].partition(":")
        function = getattr(importlib.import_module(module), attribute)
    else:
        entries = _outsiders(table).select(name=name)
        if not entries:
            raise unknown(table.removesuffix("s"), name, names(table))
        function = next(iter(entries)).load()
    return name, function, _options(name, function, rest)


def _options(name: str, function: Callable[..., Any], rest: str) -> dict[str, Any]:
    simple: dict[Any, type] = {key: kind for kind in (bool, int, float, str) for key in (kind, kind.__name__)}
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: simple[p.annotation] for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation in simple}
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in known:
            raise OptionError(f"{name} has no option {key!r}; it has: {', '.join(sorted(known)) or 'none'}")
        if not equals:
            raise OptionError(f"option {key!r} of {name} needs a value: {name}:{key}=…")
        options[key] = _value(name, key, value, known[key])
    return options


def _value(name: str, key: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise OptionError(f"{name}:{key} is true or false, not {value!r}")
        return value.lower() == "true"
    try:
        return kind(value)
    except ValueError:
        raise OptionError(f"{name}:{key} needs a number ({kind.__name__}), not {value!r}") from None
