"""Fixtures for every test: one thread, no gradients asked for, and a quiet transformers."""

from __future__ import annotations

from collections.abc import Callable

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


@pytest.fixture
def subject() -> Callable[..., Model]:
    """``subject("llama")`` is a tiny model of that family, found and proven."""
    return lambda name, seed=0: wrap(tiny(name, seed=seed), None, name)
