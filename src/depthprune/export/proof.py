"""One thing that was looked at in a folder, and what was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Proof:
    """One thing that was checked, whether it held, and what was seen."""

    name: str
    passed: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """The proof as plain values for ``check.json``."""
        return vars(self).copy()
