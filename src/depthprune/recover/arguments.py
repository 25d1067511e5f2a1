"""What a Trainer is told: how many steps, on which rows, in what arithmetic."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from depthprune.data import check_vocabulary
from depthprune.errors import DataError, OptionError
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.recover.feed import Rows, Stream, order
from depthprune.recover.repair import Repair
from depthprune.recover.settings import SCHEDULES, Settings


def fits(repair: Repair) -> None:
    """Check that a model can read its rows and be trained where it is. Raises ``DataError`` and ``OptionError``."""
    model = repair.model
    for rows in (repair.data, repair.held):
        check_vocabulary(rows, model.vocabulary)
        if model.positions is not None and model.positions < rows.length:
            raise DataError(f"{rows.name}: rows of {rows.length} tokens exceed the model's {model.positions} positions")
    if model.device.type == "meta" or len({parameter.device for parameter in model.net.parameters()}) > 1:
        raise OptionError("training needs the whole model on one device; load it with --device cpu or cuda")


def schedule(repair: Repair, settings: Settings, stream: bool) -> tuple[int, Callable[[int], int], Any]:
    """How many steps to make, how many tokens so many steps take, and the rows, in order."""
    data = repair.data
    each = data.length if stream else data.tokens_total / data.sequences
    steps = max(1, round(settings.budget / (settings.batch * each)))
    if stream:
        return steps, lambda step: step * settings.batch * data.length, Stream(repair)
    rows = order(data, steps * settings.batch, repair.seed)
    sizes = data.mask.sum(1)[rows].cumsum(0)
    return steps, lambda step: int(sizes[step * settings.batch - 1]), Rows(data, rows)


def arguments(repair: Repair, settings: Settings, folder: Path, steps: int, fsdp: bool) -> TrainingArguments:
    """The Trainer's arguments: all that prints, reports or saves by itself is off."""
    model, on_gpu = repair.model, repair.model.device.type == "cuda"
    if on_gpu and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(model.device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if fsdp and (world < 2 or not on_gpu):
        start = "torchrun --nproc-per-node GPUS -m depthprune …"
        raise OptionError(f"fsdp=true needs several processes, each with a GPU of its own: start with {start}")
    mine, rest = divmod(settings.batch, world)
    if rest or not mine:
        raise OptionError(f"batch={settings.batch} sequences cannot be shared out evenly over {world} processes")
    room = max(1, (1 << 28) // (repair.data.length * model.vocabulary))  # logits of a micro batch
    limit = settings.micro or (min(16, room) if on_gpu else 4)
    micro = max(size for size in range(1, mine + 1) if mine % size == 0 and size <= limit)
    sharding: dict[str, Any] = {}
    if fsdp:
        classes = sorted({type(block).__name__ for block in blocks_of(model.net, model.layout)})
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": classes}
        sharding = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT", **wrap}}
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=mine // micro,
        weight_decay=settings.decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=min(round(settings.warmup * steps), steps - 1),
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=2,
        logging_strategy="no" if settings.log == "none" else "steps",
        logging_steps=max(1, steps // 200),
        report_to=[] if settings.log == "none" else [settings.log],
        disable_tqdm=True,
        bf16=fsdp and in_bfloat16(model, settings.precision),
        seed=repair.seed % 2**32,
        use_cpu=not on_gpu,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"dispatch_batches": False},
        **sharding,
    )
    if world == 1 and made.n_gpu > 1:
        made._n_gpu = 1  # one process, one device
    return made


@contextlib.contextmanager
def unlaunched() -> Iterator[None]:
    """Hide from accelerate what a launcher or an earlier training set: the options alone say what is sharded."""
    names = ("ACCELERATE_", "FSDP_")
    before = {name: value for name, value in os.environ.items() if name.startswith(names)}
    try:
        for name in before:
            del os.environ[name]
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(names)]:
            del os.environ[name]
        os.environ.update(before)


def in_bfloat16(model: Model, precision: str) -> bool:
    """Whether to compute in bfloat16. Raises ``OptionError`` where that is asked for and the device cannot."""
    on_gpu = model.device.type == "cuda"
    able = not on_gpu or torch.cuda.is_bf16_supported()
    if precision == "bfloat16" and not able:
        raise OptionError("this GPU has no bfloat16; use precision=float32")
    stored = next(model.net.parameters()).dtype == torch.bfloat16
    large = on_gpu and model.parameters > 1e9
    return precision == "bfloat16" or (precision == "auto" and able and (stored or large))


def checkpoint(net: Any) -> None:
    """Have activations computed twice instead of kept. Raises ``OptionError`` where the model cannot."""
    try:
        if hasattr(net, "activation_checkpointing_enable"):
            net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise OptionError(f"checkpointing=true: this model cannot ({' '.join(str(error).split())})") from None
