"""The options that all training recoverers share: each written once, checked once. No torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from depthprune.errors import OptionError, unknown

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
PRECISIONS = ("auto", "float32", "bfloat16")
LOGS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}

Recoverer = Callable[..., dict[str, Any]]
S = TypeVar("S", bound="Settings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train: AdamW with a warm-up, a schedule and early stopping.

    ``tokens`` (``2M``, ``500k``, ``8e6``, ``1B``) is how much to train on: more than the data hold is several passes,
    each in another order, fewer a part. ``rate`` is the peak learning rate, 0 for one that suits the number of trained
    parameters. ``batch`` counts the sequences of an optimizer step over all processes, ``micro`` those that a process
    takes at a time (0: 4 on a CPU, up to 16 on a GPU). ``warmup`` is the share of the steps in which the rate rises;
    ``schedule`` (cosine, linear, constant) is what it does afterwards. ``decay`` is the weight decay, ``beta2`` Adam's
    second decay rate, ``clip`` the largest gradient norm (0: any). The held-out loss is measured ``evaluations`` times;
    after ``patience`` without a better one training stops (0: never). ``log`` is none, tensorboard, wandb or mlflow.
    ``precision`` is that of the arithmetic: float32, bfloat16 (autocast), or auto: bfloat16 where the device has it and
    the model is stored in it, or has over a billion parameters on a GPU. Trained weights are float32 in any case.
    ``checkpointing`` computes activations twice to hold fewer of them.
    """

    tokens: str = "2M"
    rate: float = 0.0
    batch: int = 16
    micro: int = 0
    warmup: float = 0.03
    schedule: str = "cosine"
    decay: float = 0.0
    beta2: float = 0.95
    clip: float = 1.0
    evaluations: int = 8
    patience: int = 3
    log: str = "none"
    precision: str = "auto"
    checkpointing: bool = False

    @property
    def budget(self) -> int:
        """The tokens to train on, as a number."""
        return count(self.tokens)


def takes(kind: type[Settings]) -> Callable[[Recoverer], Recoverer]:
    """Give a function that is written with ``**options`` the signature that the fields of its settings make."""

    def sign(function: Recoverer) -> Recoverer:
        repair, *_ = inspect.signature(function).parameters.values()
        only = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(field.name, only, default=field.default, annotation=field.type)
            for field in dataclasses.fields(kind)
        ]
        signature = inspect.Signature([repair, *options], return_annotation="dict[str, Any]")
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return sign


def settled(kind: type[S], presets: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> S:
    """The settings: defaults, then those of the preset that ``options`` name, then what ``options`` say.

    Raises ``OptionError`` for an option or a preset that there is not, or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    preset = str(options.get("preset", ""))
    if preset and preset not in presets:
        raise unknown("preset", preset, presets)
    chosen = kind(**{**presets.get(preset, {}), **options})
    _check(chosen)
    return chosen


def count(text: str) -> int:
    """Read a number of tokens, such as ``2M``, ``500k`` or ``8e6``. Raises ``OptionError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmgb]?)", text.strip().lower())
    number = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}[match[2]] if match else 0.0
    if not 1 <= number <= 1e15:
        raise OptionError(f"tokens is a number such as 500k, 2M or 1B, not {text!r}")
    return round(number)


def _check(s: Settings) -> None:
    count(s.tokens)
    wrong = {
        "rate is a finite number, 0 or more": not 0 <= s.rate < math.inf,
        "batch is at least 1": s.batch < 1,
        "micro is at least 0": s.micro < 0,
        "warmup is a share from 0 to 1": not 0 <= s.warmup <= 1,
        "decay and clip are finite numbers, 0 or more": not (0 <= s.decay < math.inf and 0 <= s.clip < math.inf),
        "beta2 is from 0 to below 1": not 0 <= s.beta2 < 1,
        "evaluations is at least 1": s.evaluations < 1,
        "patience is at least 0": s.patience < 0,
    }
    for rule, broken in wrong.items():
        if broken:
            have = ", ".join(str(getattr(s, word)) for word in re.findall(r"\w+", rule) if hasattr(s, word))
            raise OptionError(f"{rule}, not {have}")
    if s.schedule not in SCHEDULES:
        raise unknown("schedule", s.schedule, SCHEDULES)
    if s.precision not in PRECISIONS:
        raise unknown("precision", s.precision, PRECISIONS)
    if s.log != "none":
        if s.log not in LOGS:
            raise unknown("log", s.log, ["none", *LOGS])
        if not any(importlib.util.find_spec(package) for package in LOGS[s.log]):
            raise OptionError(f"log={s.log} needs a package that is not installed: pip install {LOGS[s.log][0]}")
