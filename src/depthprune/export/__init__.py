"""Writing pruned models, and proving that what was written loads and runs."""

from __future__ import annotations

from depthprune.export.check import check, check_many, expect, expect_as_it_is
from depthprune.export.proof import Proof
from depthprune.export.write import export, ready

__all__ = ["Proof", "check", "check_many", "expect", "expect_as_it_is", "export", "ready"]
