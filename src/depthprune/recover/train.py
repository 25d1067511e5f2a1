"""Recovery by training: all weights, stand-ins alone, or the last blocks.

``train`` is what every recoverer that trains goes through. It trains a second set of modules (see ``weights.py``) in a
Trainer (see ``loop.py``) on rows in a fixed order (see ``feed.py``), and ends with the weights of the evaluation whose
held-out loss was best, or with those from before where none was better.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from depthprune.discover import PROBE
from depthprune.dist import rank
from depthprune.errors import DepthpruneError, OptionError, unknown
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.record import answer, first, inputs
from depthprune.recover.arguments import arguments, checkpoint, fits, in_bfloat16, schedule, unlaunched
from depthprune.recover.feed import whole
from depthprune.recover.loop import Job, Loop, Loss, held_loss, language, last_checkpoint
from depthprune.recover.repair import Repair
from depthprune.recover.settings import Settings, settled, takes
from depthprune.recover.weights import install, own, reinstall, restore, trained
from depthprune.skip import is_skip
from depthprune.standin import parameters
from depthprune.surgery import clone

# Shortened LLaMA's card: continued pretraining on 8 H100s, AdamW (0.9, 0.95), on 37 to 271 billion tokens of SlimPajama
# (the number of tokens is left to you, and its schedule is not said). LoRA's own presets are in lora.py.
presets: dict[str, dict[str, Any]] = {
    "shortened-llama-cpt": {"rate": 1e-4, "decay": 0.1, "beta2": 0.95, "batch": 512},
}

ONLY = ("all", "stand-ins")


@dataclasses.dataclass(frozen=True)
class Full(Settings):
    """What ``full`` takes besides."""

    preset: str = ""
    only: str = "all"
    fsdp: bool = False
    stream: bool = False


@dataclasses.dataclass(frozen=True)
class Tail(Settings):
    """What ``tail`` takes besides."""

    blocks: int = 3
    head: str = "auto"


@takes(Full)
def full(repair: Repair, **options: Any) -> dict[str, Any]:
    """Train all weights to predict the next token, as in pretraining.

    ``only=stand-ins`` trains those of the stand-ins alone. ``stream`` reads text from its source instead of the rows in
    memory, for more of it than they hold. ``fsdp`` shards weights, gradients and optimizer over the processes of
    torchrun (FSDP2). ``preset=shortened-llama-cpt`` takes that paper's rate, decay and batch; what you set wins. The
    other options are those of ``Settings``. Raises ``OptionError`` where there are no stand-ins to train.
    """
    settings = settled(Full, presets, options)
    names = chosen(repair.model, settings.only)
    return train(repair, language, settings, names, fsdp=settings.fsdp, stream=settings.stream)


@takes(Tail)
def tail(repair: Repair, **options: Any) -> dict[str, Any]:
    """Train the last blocks, the norm after them and the head to predict the next token; the rest stays as it is.

    ``blocks`` is how many. A head that is tied to the embeddings stays frozen under ``head=auto``, because embeddings
    that move under frozen blocks cost more than the head gains; ``true`` trains it with them, ``false`` never trains a
    head. The other options are those of ``Settings``.
    Source: Lu et al., arXiv 2411.15558: dropping the last quarter, then tuning the head and the last three blocks.
    """
    settings = settled(Tail, {}, options)
    model, net = repair.model, repair.model.net
    if settings.head not in ("auto", "true", "false"):
        raise unknown("head", settings.head, ("auto", "true", "false"))
    count = len(model.layout.blocks)
    if not 1 <= settings.blocks <= count:
        raise OptionError(f"tail trains 1 to {count} blocks of this model, not {settings.blocks}")
    blocks = blocks_of(net, model.layout)[-settings.blocks :]
    ids = {id(parameter) for block in blocks for parameter in block.parameters()}
    output = net.get_output_embeddings()
    head = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    tied = id(net.get_input_embeddings().weight) in head
    ids |= _after(model) - head
    if settings.head == "true" or (settings.head == "auto" and not tied):
        ids |= head
    elif tied:
        repair.say("the head is tied to the embeddings, so it stays frozen (head=true trains both)")
    return train(repair, language, settings, {name for name, p in net.named_parameters() if id(p) in ids})


def chosen(model: Model, only: str) -> set[str]:
    """The names of the parameters to train: all, or those of stand-ins. Raises ``OptionError`` where there is none."""
    if only not in ONLY:
        raise unknown("choice of weights", only, ONLY)
    named = {name: p for name, p in model.net.named_parameters() if p.is_floating_point()}
    if only == "all":
        return {name for name, parameter in named.items() if parameter.requires_grad} or set(named)
    names = {
        f"{path}.{name}"
        for path, module in model.net.named_modules()
        if is_skip(module)
        for name, parameter in module.named_parameters()
        if parameter.numel()
    }.union(parameters(model))
    if not names & set(named):
        raise OptionError("only=stand-ins, but no stand-in of this model has weights; drop with --stand-in first")
    return names & set(named)


def train(
    repair: Repair,
    loss: Loss,
    settings: Settings,
    names: Collection[str],
    *,
    adapt: Callable[[nn.Module], None] | None = None,
    merge: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    fsdp: bool = False,
    stream: bool = False,
) -> dict[str, Any]:
    """Train some parameters of a repair's model under a loss, and install the best weights in it.

    ``loss(net, batch)`` is a sum over the predictions of a batch that count; a step follows the gradient of their mean
    over ``settings.batch`` sequences. ``names`` are the parameters to train. ``adapt`` may put further parameters that
    take gradients into the network; ``merge`` then says which weights of the model they amount to.
    Raises ``DataError`` for rows that are not this model's, ``OptionError`` for settings that cannot be, and
    ``DepthpruneError`` where a loss is not finite; the model is then as it was.
    """
    repair = dataclasses.replace(repair, data=whole(repair.data), held=whole(repair.held))
    model, data, held = repair.model, repair.data, repair.held
    fits(repair)
    with contextlib.ExitStack() as stack:
        stack.enter_context(unlaunched())
        folder = repair.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        steps, tokens_at, feed = schedule(repair, settings, stream)
        told = arguments(repair, settings, folder, steps, fsdp)
        device = told.device
        say = repair.say if rank() == 0 else lambda text: None
        show = repair.show if rank() == 0 else None
        before = _finite(held_loss(model.net, held, told.per_device_train_batch_size, model.device), "before")
        amp = in_bfloat16(model, settings.precision)
        set_seed(repair.seed)
        net = clone(model.net)
        own(net, names, torch.device("cpu") if fsdp else device, wide=fsdp or not amp)
        if adapt is not None:
            adapt(net)
        weights = sum(parameter.numel() for parameter in trained(net).values())
        rate = settings.rate or (3e-4 if weights < 200e6 else 1e-4 if weights < 2e9 else 2e-5)
        told.learning_rate = rate
        if settings.checkpointing:
            checkpoint(net)
        job = Job(
            loss=loss,
            held=held,
            steps=steps,
            marks=frozenset(max(1, round(steps * (i + 1) / settings.evaluations)) for i in range(settings.evaluations)),
            tokens=tokens_at,
            patience=settings.patience,
            amp=amp,
            show=lambda step: None if show is None else show("training", float(step), float(steps)),
            identity=_identity(repair, settings, names),
            keep=repair.folder is not None,
        )
        loop = Loop(net, told, feed, job)
        last = None
        if repair.resume and repair.folder is not None:
            last, trouble = last_checkpoint(folder, job.identity)
            if trouble:
                say(trouble)
        elif rank() == 0:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)
        passes = tokens_at(steps) / data.tokens_total
        say(
            f"training {weights:,} weights on {tokens_at(steps):,} tokens ({passes:.2g} times the rows in memory): "
            f"{steps} steps of {settings.batch} sequences, peak rate {rate:g}"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop.run(last)
    history = loop.progress.history
    values = loop.best
    if merge is not None:
        restore(net, loop.best)
        values = dict(merge(net))
    seconds = loop.seconds()
    previous = install(model.net, values)
    after = held_loss(model.net, held, told.per_device_train_batch_size, model.device)
    kept = "best" if after < before else "before"
    if kept == "before":
        reinstall(previous)
        say(f"training made the held-out loss no better ({before:.4f} before, {after:.4f} after): the weights stay")
    model.net.eval()
    return {
        "tokens": history[-1]["tokens"],
        "seconds": seconds,
        "steps": history[-1]["step"],
        "trainable": weights,
        "held_loss_before": before,
        "held_loss_after": after if kept == "best" else before,
        "best_step": loop.progress.best_step,
        "stopped_early": loop.progress.stopped,
        "kept": kept,
        "history": history,
        "settings": {
            **dataclasses.asdict(settings),
            "rate": rate,
            "micro": told.per_device_train_batch_size,
            "precision": "bfloat16" if amp else "float32",
        },
    }


def _identity(repair: Repair, settings: Settings, names: Collection[str]) -> dict[str, Any]:
    options = {key: value for key, value in dataclasses.asdict(settings).items() if key != "log"}
    texts = {"data": repair.data.digest, "held": repair.held.digest, "source": repair.source}
    fingerprint = repair.model.reference.fingerprint
    return {
        "kind": type(settings).__name__,
        "options": options,
        "model": fingerprint,
        "trained": sorted(names),
        **texts,
    }


def _finite(loss: float, when: str) -> float:
    if not abs(loss) < float("inf"):
        raise DepthpruneError(f"the held-out loss is not finite {when} training: the model's weights are damaged")
    return loss


def _after(model: Model) -> set[int]:
    """The ids of parameters that act after the last block: those that a gradient from the logits to there meets."""
    blocks = blocks_of(model.net, model.layout)
    arity = model.layout.blocks[-1].arity

    def cut(module: nn.Module, given: Any, output: Any) -> Any:
        return answer(first(output).detach(), arity)

    inside = {id(parameter) for parameter in model.net.get_submodule(model.layout.path).parameters()}
    outside = [p for p in model.net.parameters() if id(p) not in inside and p.is_floating_point() and p.requires_grad]
    tokens = torch.zeros(PROBE, dtype=torch.long, device=model.device)
    handle = blocks[-1].register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model.net(**inputs(tokens, None), use_cache=False).logits
            found = torch.autograd.grad(logits.float().sum(), outside, allow_unused=True)
    finally:
        handle.remove()
    return {id(parameter) for parameter, gradient in zip(outside, found, strict=True) if gradient is not None}


__all__ = ["Full", "Tail", "chosen", "full", "presets", "tail", "train"]
