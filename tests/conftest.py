"""Fixtures for every test: one thread, no gradients asked for, and a quiet transformers."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers

from command import desk, unproven, workshop  # noqa: F401
from depthprune.model import Model, wrap
from families import tiny

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> Iterator[None]:
    """Interrupts stop what runs, as in a shell: what is started in the background, or under nohup, ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def subject() -> Callable[..., Model]:
    """``subject("llama")`` is a tiny model of that family, found and proven."""
    return lambda name, seed=0: wrap(tiny(name, seed=seed), None, name)
