"""The recover command: one recovery from folder to folder, proven, or several from the same cut in one table."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from depthprune import dist, prompts, selfwritten
from depthprune.console import Console
from depthprune.data import Data, Mixture, calibrate, overlap, warn_overlap
from depthprune.errors import DepthpruneError, OptionError
from depthprune.evaluate import Windows, perplexity
from depthprune.export import Proof, expect_as_it_is, export
from depthprune.files import read_json, write_json
from depthprune.model import Model
from depthprune.plan import Plan, with_stand_ins
from depthprune.recover.apply import recover
from depthprune.runtimes import prove_written
from depthprune.surgery import drop

TOKENS = {"cpu": 1 << 16, "cuda": 1 << 20}  # of text to recover on, unless told otherwise
CARRIED = 0.5  # of the gain on rows held out, on another text, is as little as passes without a warning
STAND_INS = {"bias": "mean", "lowrank": "lstsq"}  # ways that are a stand-in and what fills it
COMPARED = ("refit", "linear", "scale", "bias", "lowrank:16")


@dataclass(frozen=True)
class Asked:
    """What a recovery was asked to do."""

    data: str
    sequences: int | None = None
    length: int = 512
    field: str = "text"
    seed: int = 0
    memory: int | None = None


def reopen(model: Model, folder: Path) -> Model:
    """A model that was loaded from a folder, with the plan by which it was cut and what was recovered already.

    Raises ``PlanError`` where the folder has no plan.
    """
    before = read_json(folder / "recovery.json") if (folder / "recovery.json").is_file() else None
    return replace(model, plan=Plan.load(folder / "plan.json"), recovery=before)


def text_of(asked: Asked, model: Model, console: Console | None = None, keep: Path | None = None) -> Data | Mixture:
    """Rows to recover on: as many as were asked for, else a million tokens for a GPU, and 64 thousand for a CPU.

    ``model`` is the dense one: of ``self:`` it writes the text, a quarter as much, which the file ``keep`` then holds.
    """
    length = min(asked.length, model.positions or asked.length)
    if prompts.asked(asked.data):
        told: dict[str, Any] = {"show": console.show, "say": console.say} if console and dist.rank() == 0 else {}
        rows: dict[str, Any] = {"sequences": asked.sequences, "length": length, "seed": asked.seed}
        return selfwritten.write(model, asked.data, field=asked.field, memory=asked.memory, keep=keep, **rows, **told)
    most = asked.sequences or max(2, TOKENS.get(model.device.type, TOKENS["cpu"]) // length)
    with warnings.catch_warnings():
        if asked.sequences is None:  # less text than that is fine
            warnings.filterwarnings("ignore", message=".* not the .* asked for", category=UserWarning)
        options: dict[str, Any] = {"sequences": most, "length": length, "seed": asked.seed, "field": asked.field}
        return calibrate(asked.data, model.tokenizer, **options)


def recovered(
    model: Model, teacher: Model, data: Data | Mixture, how: str, asked: Asked, console: Console, **more: Any
) -> Model:
    """Recover by name; a way that is a stand-in cuts the teacher again, with it in place.

    Raises ``OptionError`` for a stand-in where weights were recovered before, as the cut then is another.
    """
    name = how.partition("+")[0].partition(":")[0]
    if name in STAND_INS and model.plan is not None:
        if model.recovery is not None or model.plan.stand_in:
            raise OptionError(f"{how} starts from a plain cut, and {model.reference.id} was recovered or has stand-ins")
        form, *rest = how.split("+", 1)
        model, how = drop(teacher, with_stand_ins(model.plan, form)), "+".join((STAND_INS[name], *rest))
    told: dict[str, Any] = {"show": console.show, "say": console.say} if dist.rank() == 0 else {}
    options: dict[str, Any] = {"memory": asked.memory, "seed": asked.seed, "source": asked.data, "field": asked.field}
    return recover(model, teacher, data, how, **told, **options, **more)


def write(model: Model, out: Path, form: str, say: Callable[[str], None]) -> list[Proof]:
    """Write a recovered model and prove it in a fresh process, against itself in memory."""
    export(model, out, form)
    return prove_written(out, model, expect_as_it_is(model), say)


def measure(models: Mapping[str, Model], texts: Mapping[str, Windows], console: Console) -> list[dict[str, Any]]:
    """The loss of models on texts, in nats per token."""
    found = []
    for name, text in texts.items():
        losses = {which: perplexity(model, text, show=console.show).loss for which, model in models.items()}
        found.append({"text": name, "digest": text.data.digest, "tokens": int(text.scored.sum()), "loss": losses})
    return found


def carried_over(recovery: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning for every other text on which less than half of the gain on the rows held out shows."""
    held = recovery["held_loss"]
    gain, lines = held["before"] - held["after"], []
    for entry in found:
        there = entry["loss"]["pruned"] - entry["loss"]["recovered"]
        if gain > 0 and there < CARRIED * gain:
            what = f"{abs(there):.3f} nats {'better' if there >= 0 else 'worse'}"
            lines.append(
                f"the gain does not carry over: {gain:.3f} nats on held-out rows of {recovery['data']['name']}, but "
                f"{entry['text']} is {what}; recover on text like what the model is for"
            )
    return lines


def shared(data: Data | Mixture, texts: Mapping[str, Windows], console: Console) -> dict[str, float]:
    """How much of each text was recovered on, with a warning where it is more than 1 %."""
    for text in texts.values():
        if warning := warn_overlap(data, text.data):
            console.warn(warning.replace("the plan was chosen on", "weights are recovered on"))
    return {name: overlap(data, text.data) for name, text in texts.items()}


def summary(recovery: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a recovery won back, as plain values: losses before and after, held out and on other texts."""
    held = recovery["held_loss"]
    rows = [{"text": f"{recovery['data']['name']} (held out)", "tokens": None, "loss": _three(held)}]
    return {"stages": recovery["stages"], "rows": [*rows, *found]}


def _three(held: Mapping[str, float]) -> dict[str, float]:
    return {"dense": held["dense"], "pruned": held["before"], "recovered": held["after"]}


def compare(
    model: Model,
    teacher: Model,
    data: Data | Mixture,
    ways: Sequence[str],
    texts: Mapping[str, Windows],
    asked: Asked,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Recover in several ways from the same cut, and measure all on the same texts.

    Every row is kept in ``recover.json`` of the folder ``out`` as soon as it is there, so that the same command goes on
    where it was stopped. A way that fails has its error as a row, and is tried again when asked again.
    Raises ``OptionError`` where the folder holds another comparison.
    """
    plan = model.plan
    assert plan is not None
    same = {
        "model": vars(teacher.reference),
        "start": vars(model.reference),
        "drop": [str(unit) for unit in plan.drop],
        "data": data.describe()["digest"],
        "texts": {name: text.data.digest for name, text in texts.items()},
        "seed": asked.seed,
    }
    value: dict[str, Any] = {"format": 1, "asked": same, "rows": []}
    if (out / "recover.json").is_file():
        value = read_json(out / "recover.json")
        if value.get("asked") != same:
            raise OptionError(f"--out {out} holds a comparison of other models, texts or seeds; name another folder")
    else:
        value |= {"data": data.describe(), "base": measure({"dense": teacher, "pruned": model}, texts, console)}
        _keep(out, value)
    value["rows"] = [row for row in value["rows"] if "error" not in row or row["how"] not in ways]
    for how in ways:
        if any(row["how"] == how for row in value["rows"]):
            continue
        console.say(f"recovering: {how}")
        began = time.perf_counter()
        row: dict[str, Any] = {"how": how}
        try:
            made = recovered(model, teacher, data, how, asked, console)
        except DepthpruneError as error:
            row |= {"error": str(error), "loss": {}}
        else:
            assert made.recovery is not None
            losses = measure({"recovered": made}, texts, console)
            row |= {
                "seconds": round(time.perf_counter() - began, 2),
                "tokens": sum(stage["tokens"] for stage in made.recovery["stages"]),
                "held_loss": made.recovery["held_loss"],
                "undone": [stage["how"] for stage in made.recovery["stages"] if "undone" in stage],
                "parameters": made.parameters,
                "loss": {entry["text"]: entry["loss"]["recovered"] for entry in losses},
                "warnings": carried_over(made.recovery, _joined(value["base"], losses)),
            }
            del made
        value["rows"].append(row)
        _keep(out, value)
    return value


def _keep(out: Path, value: Mapping[str, Any]) -> None:
    """Write the comparison so far, from one process."""
    if dist.rank() == 0:
        write_json(out / "recover.json", value)


def _joined(base: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**a, "loss": {**a["loss"], **b["loss"]}} for a, b in zip(base, found, strict=True)]
