"""Recovery by name: from a cut model and its dense teacher to the same structure with better weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthprune.data import Data, Mixture, check_vocabulary
from depthprune.dist import share, total, world
from depthprune.errors import DataError, DepthpruneError, PlanError
from depthprune.evaluate import Windows, perplexity
from depthprune.layout import blocks_of
from depthprune.model import Model, fingerprint
from depthprune.offload import numbers, swap
from depthprune.oracle import Show
from depthprune.recover.pair import kept_blocks, steps
from depthprune.recover.repair import Repair, silent
from depthprune.registry import find, ways
from depthprune.surgery import clone

HELD = 8  # one row in so many is held out
MOST_HELD = 128  # rows


def recover(
    model: Model,
    teacher: Model,
    data: Data | Mixture,
    how: str | Callable[..., Any] = "refit",
    *,
    show: Show | None = None,
    say: Callable[[str], None] = silent,
    memory: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    source: str | None = None,
    field: str = "text",
) -> Model:
    """Win back what a cut cost: the same structure with other weights, in the model that is returned.

    ``model`` is what ``drop`` made of ``teacher``, or that loaded again with its plan; it stays as it is. ``how`` names
    a recoverer, or several in turn with ``+`` between: ``refit+distill:tokens=2M``. One row of ``data`` in eight is
    held out; a recoverer that makes the loss on these rows worse is undone. ``recovery`` of the result says what was
    done, with the losses in nats per token. ``folder`` keeps checkpoints of training, from which ``resume`` goes on.

    Raises ``PlanError`` where the two do not belong together, ``DataError`` for text that is too short or for another
    tokenizer, ``OptionError`` for unknown names, ``DepthpruneError`` where a model computes NaN.
    """
    names = [how] if callable(how) else ways(how)
    chosen = [(str(name), *find("recoverers", name)[1:]) for name in names]
    plan = fitting(model, teacher)
    if model.recovery is None and (where := _other(model, teacher)):
        say(f"{where} is not as in the dense model, so it was trained in between, or cut by another plan")
    if not plan.drop:
        say("the plan drops nothing, so there is nothing to recover")
        return model
    rows = share(readable(data, model))
    fit, held = split(rows)
    dense, before = held_loss(teacher, held), held_loss(model, held)
    for which, loss in (("dense", dense), ("pruned", before)):
        if not math.isfinite(loss):
            raise DepthpruneError(
                f"the loss of the {which} model is not finite (NaN or infinite) on rows held out of {data.name}, so "
                "nothing can be recovered; check that the model is whole, and try --dtype float32"
            )
    record: dict[str, Any] = {
        "format": 1,
        "data": data.describe(),
        "held_rows": held.sequences * world(),
        "held_loss": {"dense": dense, "before": before},
        "stages": [],
    }
    if model.recovery is not None:
        record["earlier"] = dict(model.recovery)
    for name, function, options in chosen:
        mine = replace(model, net=clone(model.net))
        kept = folder / f"{len(record['stages'])}" if folder is not None else None
        repair = Repair(mine, teacher, fit, held, show, say, memory, seed, kept, resume, source, field)
        began = time.perf_counter()
        found = function(repair, **options)
        seconds = time.perf_counter() - began
        mine.net.eval()
        _as_saved(mine)
        after = held_loss(mine, held)
        stage = {"how": name, "tokens": fit.tokens_total * world(), "seconds": round(seconds, 3), "held_loss": after}
        stage |= found
        if math.isfinite(after) and after <= before:
            model, before = mine, after
        else:
            stage["undone"] = f"the loss on held-out rows is {after:.4f} nats with it and {before:.4f} without"
            say(f"{name}: {stage['undone']}, so it is undone")
        record["stages"].append(stage)
    record["held_loss"]["after"] = before
    own = replace(model.reference, fingerprint=fingerprint(model.net))
    return replace(model, reference=own, recovery=record)


@torch.no_grad()
def _as_saved(model: Model) -> None:
    """Round weights that changed to the type that they are saved in, so what is measured is what is written.

    Tied weights stay tied.
    """
    known: dict[int, tuple[Tensor, Tensor]] = {}  # the weight itself too, so that no other gets its id
    for module in model.net.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in known:
                setattr(module, name, known[id(weight)][1])
                continue
            now = numbers(weight)
            rounded = now.to(model.dtype).to(now.dtype)
            if weight.is_floating_point() and not torch.equal(rounded, now):
                swap(module, name, rounded)
                known[id(weight)] = (weight, getattr(module, name))


def fitting(model: Model, teacher: Model) -> Any:
    """The plan by which a model was cut from its teacher. Raises ``PlanError`` where it was not."""
    if model.plan is None:
        raise PlanError(f"{model.reference.id} has no plan: recovery needs a model that was cut, with its plan.json")
    model.plan.fits(teacher.reference)
    steps(teacher, model)
    a, b = (m.net.get_input_embeddings().weight.shape for m in (model, teacher))
    if a != b:
        raise PlanError(
            f"the pruned model's embeddings have the shape {tuple(a)}, the teacher's {tuple(b)}: not one model"
        )
    return model.plan


@torch.no_grad()
def _other(model: Model, teacher: Model) -> str:
    """The first weight of a kept block that is not as in the dense model, by its name; empty if there is none."""
    pairs = zip(blocks_of(model.net, model.layout), kept_blocks(teacher, model), strict=True)
    dense = blocks_of(teacher.net, teacher.layout)
    for number, (block, index) in enumerate(pairs):
        mine, theirs = (dict(module.named_parameters()) for module in (block, dense[index]))
        for name in mine.keys() & theirs.keys():
            a, b = (numbers(weight) for weight in (mine[name], theirs[name]))
            if a.shape != b.shape or not torch.equal(a, b.to(a)):
                return f"{model.layout.path}.{number}.{name}"
    return ""


def readable(data: Data | Mixture, model: Model) -> Data:
    """The rows to recover on. Raises ``DataError`` for tasks, for rows too few or too long, and for other tokens."""
    if isinstance(data, Mixture) or data.scored is not None:
        raise DataError(f"recovery reads plain text, and {data.name} is or holds a task; give text")
    check_vocabulary(data, model.vocabulary)
    if data.sequences < 2 * world():
        raise DataError(
            f"{data.name}: {data.sequences} row{'s' * (data.sequences != 1)} of {data.length} tokens are too few to "
            f"recover on, as some are held out; give more text or a smaller --length"
        )
    if model.positions is not None and data.length > model.positions:
        raise DataError(f"rows of {data.length} tokens exceed the model's {model.positions} positions; use --length")
    return data


def split(data: Data) -> tuple[Data, Data]:
    """The rows to fit on, and one in eight (128 at most) that are held out."""
    held = max(1, min(MOST_HELD, data.sequences // HELD))
    return data.head(data.sequences - held), data.tail(held)


def held_loss(model: Model, data: Data) -> float:
    """The mean loss in nats over the predictions of some rows, over all processes; infinite where it is not finite."""
    scored = torch.zeros_like(data.mask)
    scored[:, 1:] = data.counted
    measured = perplexity(model, Windows(data, scored, data.length))
    sums = total(torch.tensor([measured.loss * measured.tokens, measured.tokens], dtype=torch.float64).to(model.device))
    loss = float(sums[0] / sums[1])
    return loss if math.isfinite(loss) else math.inf
