"""The training loop: transformers' Trainer, told how to count, to measure, to remember the best, and to go on.

A checkpoint holds the trained weights alone, the best ones so far where these are others, and a list of its files
with their sizes, written last: a checkpoint without it, or with a file of another size, is not one.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from depthprune.data import Data
from depthprune.dist import rank, world
from depthprune.dist import total as sum_over_all
from depthprune.errors import DepthpruneError
from depthprune.record import inputs
from depthprune.recover.feed import IGNORED, Batch, labels, together
from depthprune.recover.weights import restore, snapshot

NUMBERS = 1 << 24  # logits that are float32 at a time
_MARK = "complete.json"

Loss = Callable[[nn.Module, Batch], Tensor]


def forward(net: nn.Module, batch: Batch) -> Tensor:
    """The logits (B, T, V) of a batch."""
    logits: Tensor = net(**inputs(batch["input_ids"], batch["attention_mask"]), use_cache=False).logits
    return logits


def targets(batch: Batch) -> Tensor:
    """What each position is to predict (B, T): the label of the token after it, -100 where that does not count."""
    return torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def by_parts(each: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The sum of ``each`` over parts of the rows, the first of which are logits (B, T, V).

    No part has more than 2**24 logits, and where there are several each is computed anew for its gradient, so that
    float32 copies of all logits never lie side by side.
    """
    flat = [tensor.flatten(0, 1) for tensor in rows]
    step = max(1, NUMBERS // flat[0].shape[-1])
    parts = list(zip(*(torch.split(tensor, step) for tensor in flat), strict=True))
    if len(parts) == 1:
        return each(*parts[0])
    total = flat[0].new_zeros((), dtype=torch.float32)
    for part in parts:
        total = total + checkpoint(each, *part, use_reentrant=False)
    return total


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The sum of ``-log p(target)`` in nats, over targets that count."""
    return torch.nn.functional.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum")


def language(net: nn.Module, batch: Batch) -> Tensor:
    """The language-model loss of a batch: the sum of ``-log p(next token)`` over the predictions that count."""
    return by_parts(cross_entropy, forward(net, batch), targets(batch))


@torch.no_grad()
def held_loss(net: nn.Module, data: Data, rows: int, device: torch.device) -> float:
    """The nats per predicted token of some data; several processes share the rows, each as many forwards."""
    net.eval()
    marked, mine = labels(data), torch.arange(rank(), -(-data.sequences // world()) * world(), world())
    total = torch.zeros((), dtype=torch.float64, device=device)
    for some in torch.split(mine, rows):
        at = some % data.sequences
        wanted = torch.where((some < data.sequences)[:, None], marked[at], IGNORED)
        batch = {"input_ids": data.tokens[at], "attention_mask": data.mask[at], "labels": wanted}
        total += language(net, {key: value.to(device) for key, value in batch.items()}).double()
    return sum_over_all(total).item() / data.predicted


@dataclass
class Progress:
    """What a checkpoint remembers besides weights: the curve so far, and which of its points was the best."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0  # evaluations since the best one
    seconds: float = 0.0
    stopped: bool = False


@dataclass(frozen=True)
class Job:
    """What a loop needs to know besides the Trainer's own arguments."""

    loss: Loss
    held: Data
    steps: int
    marks: frozenset[int]  # steps after which the held-out loss is measured
    tokens: Callable[[int], int]  # how many tokens so many steps take
    patience: int
    amp: bool  # bfloat16 arithmetic
    show: Callable[[int], None]
    identity: Mapping[str, Any]  # what must be the same for a run to be gone on with
    keep: bool  # checkpoints


class Loop(Trainer):
    """A Trainer whose loss is a sum over predictions, and which keeps the best trained weights beside the last."""

    def __init__(self, net: nn.Module, arguments: TrainingArguments, rows: Any, job: Job) -> None:
        super().__init__(model=net, args=arguments, train_dataset=rows, data_collator=together)
        self.job, self.progress, self.best = job, Progress(), dict[str, Tensor]()
        self.model_accepts_loss_kwargs = True  # the loss is divided here, by all predictions of a step
        self.loss_is_scaled_for_ga = True
        self._nats: Tensor | None = None
        self._summed, self._counted, self._predicted = 0.0, 0, 1
        self._started = time.monotonic()
        # Where an interrupted run left this off, a sharded optimizer would not be set up before its state is loaded.
        self.accelerator.gradient_state._set_sync_gradients(True)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(_Steps(self))

    @property
    def net(self) -> nn.Module:
        """The network that is trained; sharded, where it is."""
        assert isinstance(self.model, nn.Module)
        return self.model

    @property
    def folder(self) -> Path:
        """Where checkpoints go."""
        return Path(str(self.args.output_dir))

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any) -> tuple[Any, Any]:
        """Take the micro batches of a step, and count the predictions of them all, in every process."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        here = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        self._predicted = max(1, int(self._total(torch.tensor(float(here)))))
        return batches, self._predicted

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro batch, as its part of the mean over all predictions of the step."""
        with self.arithmetic():
            nats = self.job.loss(model, inputs)
        self._nats = nats.detach().double() + (0 if self._nats is None else self._nats)
        return nats * (world() / self._predicted)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16 where that is asked for."""
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16) if self.job.amp else nullcontext()

    def account(self) -> None:
        """Add up the training loss of a step. Raises ``DepthpruneError`` where it is not finite."""
        nats = self._total(self._nats)
        self._nats = None
        if not math.isfinite(nats):
            step = self.state.global_step
            raise DepthpruneError(f"the training loss is not finite at step {step}; try a lower rate, or longer warmup")
        self._summed += nats
        self._counted += self._predicted

    def _total(self, value: Tensor | None) -> float:
        """The sum of a number over all processes."""
        assert value is not None
        return float(sum_over_all(value.to(self.args.device)))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out loss, remember the weights if it is the best so far, and stop if it was long ago."""
        with self.arithmetic():
            loss = held_loss(self.net, self.job.held, self.args.per_device_train_batch_size, self.args.device)
        step, now = self.state.global_step, self.progress
        trained_on = self._summed / max(1, self._counted)
        self._summed, self._counted = 0.0, 0
        now.history.append({"step": step, "tokens": self.job.tokens(step), "held_loss": loss, "train_loss": trained_on})
        if loss < now.best_loss:
            now.best_loss, now.best_step, now.waited = loss, step, 0
            self.best = snapshot(self.net)
        else:
            now.waited += 1
            now.stopped = 0 < self.job.patience <= now.waited
            self.control.should_training_stop |= now.stopped
        metrics = {"eval_loss": loss, "train_loss": trained_on}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def run(self, last: Path | None) -> None:
        """Train, from a checkpoint on if there is one; a run that was done is done."""
        if last is not None:
            self.recall(last)
        history, now = self.progress.history, self.progress
        if not (now.stopped or (history and history[-1]["step"] >= self.job.steps)):
            self.train(resume_from_checkpoint=None if last is None else str(last))

    def seconds(self) -> float:
        """The time trained, in earlier processes too."""
        return self.progress.seconds + time.monotonic() - self._started

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights and the best ones."""
        assert output_dir is not None
        folder, now = Path(output_dir), self.progress
        weights = {} if self.is_fsdp_enabled else snapshot(self.net)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if weights:
            save_file(weights, folder / "trained.safetensors")
        if self.best and (now.best_step != self.state.global_step or not weights):
            save_file(self.best, folder / "best.safetensors")
        (folder / "progress.json").write_text(json.dumps(asdict(now) | {"seconds": self.seconds()}), encoding="utf-8")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark = {"identity": self.job.identity, "files": _sizes(folder)}
            (folder / _MARK).write_text(json.dumps(mark), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(self.net, load_file(Path(resume_from_checkpoint) / "trained.safetensors"))

    def recall(self, folder: Path) -> None:
        """Remember what a checkpoint holds besides the weights to go on with."""
        self.progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        other = folder / "best.safetensors"
        self.best = load_file(other if other.exists() else folder / "trained.safetensors")


class _Steps(TrainerCallback):
    """What happens after a step: the loss is checked and shown, and at some steps measured and saved."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        job = self.loop.job
        self.loop.account()
        job.show(state.global_step)
        if state.global_step in job.marks:
            control.should_evaluate, control.should_save = True, job.keep


def last_checkpoint(folder: Path, identity: Mapping[str, Any]) -> tuple[Path | None, str]:
    """The last whole checkpoint of a run, and a line about those that cannot be used (empty: none)."""
    numbered = [(int(path.name[11:]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    trouble = ""
    for _, path in sorted(numbered, reverse=True):
        try:
            mark = json.loads((path / _MARK).read_text(encoding="utf-8"))
            whole = mark["files"] == {name: size for name, size in _sizes(path).items() if name != _MARK}
            same = mark["identity"] == json.loads(json.dumps(identity))
        except (OSError, ValueError, KeyError, TypeError):
            whole = same = False
        if whole and same:
            return path, trouble and f"{trouble}; going on from {path.name}"
        trouble = trouble or (f"{path.name} is of another run" if whole else f"{path.name} is incomplete")
    return None, trouble and f"{trouble}; starting again"


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
