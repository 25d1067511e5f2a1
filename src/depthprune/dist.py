"""Several processes as one: who am I, which rows are mine, and the sum over all. One process is its own sum."""

from __future__ import annotations

import os

import torch
import torch.distributed as distributed
from torch import Tensor

from depthprune.data import Data
from depthprune.errors import DataError


def start(device: str) -> str:
    """Join the other processes where ``torchrun`` started several; the device this one is to use."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(data: Data) -> Data:
    """The rows of this process: every so-manieth. Raises ``DataError`` where there are fewer rows than processes."""
    if world() == 1:
        return data
    if data.sequences < world():
        raise DataError(
            f"{data.name}: {data.sequences} rows cannot be shared among {world()} processes; give more text"
        )
    return data.rows(slice(rank(), None, world()))


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same in each."""
    if world() > 1:
        distributed.all_reduce(tensor)
    return tensor
