"""Budgets: how much to drop. No torch.

25%            at least this share of the parameters in the stack of blocks
8 blocks       that many units of a kind: blocks, attention, mlp, mixer, or units of any kind
params<=6e9    at most this many parameters are left in the whole model
kv<=50%        at most this share of the KV cache is left (a number: bytes per token)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from depthprune.errors import BudgetError
from depthprune.units import Unit

FORMS = "'25%', '8 blocks', '12 attention', '6 mlp', 'params<=6e9' or 'kv<=50%'"
_COUNT = re.compile(r"(\d+)\s*(blocks?|attentions?|mlps?|mixers?|units?|sublayers?)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_LIMIT = re.compile(r"(params|kv)\s*<=\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(%|[kmbg])?")
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}


class Ledger(Protocol):
    """What a budget counts with; a ``Layout`` is one."""

    @property
    def parameters(self) -> int:
        """Parameters in the stack."""

    @property
    def outside(self) -> int:
        """Parameters outside the stack."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token of the dense model."""

    def freed(self, units: frozenset[Unit]) -> int:
        """Parameters that dropping these units frees."""

    def kv_freed(self, units: frozenset[Unit]) -> int:
        """Bytes of KV cache per token that dropping these units frees."""

    def viable(self, units: frozenset[Unit]) -> bool:
        """Whether a model is left: not every block gone, and not every attention."""


@dataclass(frozen=True)
class Budget:
    """An amount to drop: ``measure`` is ``parameters``, ``kv`` or ``count``, ``amount`` how much of it must go.

    ``kind`` is the kind that a count is of (``block``, ``attention``, …), or None.
    """

    text: str
    measure: str
    amount: float
    kind: str | None = None

    @classmethod
    def parse(cls, text: str, ledger: Ledger) -> Budget:
        """Read a budget for one model. Raises ``BudgetError`` for text that is none, or asks for nothing or all."""
        given = text.strip().lower()
        if match := _COUNT.fullmatch(given):
            kind = match[2].rstrip("s")
            count = int(match[1])
            if count == 0:
                raise BudgetError(f"--drop {text!r} drops nothing; ask for at least 1")
            return cls(text, "count", count, None if kind in ("unit", "sublayer") else kind)
        if match := _SHARE.fullmatch(given):
            share = float(match[1]) / 100
            if share >= 1:
                raise BudgetError(f"--drop {text!r} leaves nothing of the model; ask for less than 100%")
            if share == 0:
                raise BudgetError(f"--drop {text!r} drops nothing; ask for more than 0%")
            return cls(text, "parameters", share * ledger.parameters)
        if match := _LIMIT.fullmatch(given):
            what, number, unit = match[1], float(match[2]), match[3] or ""
            if what == "kv" and unit not in ("", "%"):
                raise BudgetError(f"--drop {text!r}: kv takes a share or bytes per token; write kv<=50% or kv<=512")
            have = ledger.parameters + ledger.outside if what == "params" else ledger.kv_bytes_per_token
            left = number / 100 * have if unit == "%" else number * _SCALE[unit]
            if left >= have:
                raise BudgetError(f"--drop {text!r} drops nothing: the model has {have:,} already")
            return cls(text, "parameters" if what == "params" else "kv", have - left)
        if given.startswith(("latency", "loss")):
            raise BudgetError(f"--drop {text!r}: budgets on latency and loss do not exist yet; write {FORMS}")
        if re.fullmatch(r"\d+(\.\d+)?", given):
            nothing = "drops nothing and " if float(given) == 0 else ""
            raise BudgetError(f"--drop {text!r} {nothing}has no measure; write {FORMS}")
        raise BudgetError(f"--drop {text!r} is no budget; write {FORMS}")

    def spent(self, ledger: Ledger, gone: frozenset[Unit]) -> float:
        """How much of the measure dropping these units frees."""
        if self.measure == "count":
            return len(gone)
        return ledger.freed(gone) if self.measure == "parameters" else ledger.kv_freed(gone)

    def met(self, ledger: Ledger, gone: Collection[Unit]) -> bool:
        """Whether dropping these units is enough."""
        return self.spent(ledger, frozenset(gone)) >= self.amount - 1e-6

    def insist(self, ledger: Ledger, gone: Collection[Unit]) -> None:
        """Raise ``BudgetError`` where these units are not enough, as when the rest is what makes it a model."""
        if not self.met(ledger, gone):
            raise BudgetError(
                f"--drop {self.text!r} cannot be met: it would take every block, or every attention; ask for less"
            )

    def candidates(self, ledger: Ledger, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """The units that can help to meet the budget, if together they can.

        Raises ``BudgetError`` with the arithmetic where all of them are not enough.
        """
        able = tuple(u for u in units if self.measure != "kv" or ledger.kv_freed(frozenset((u,))) > 0)
        most = self.spent(ledger, frozenset(able))
        if most < self.amount - 1e-6 or not able:
            what = {"count": "units", "parameters": "parameters", "kv": "bytes of KV cache per token"}[self.measure]
            raise BudgetError(
                f"--drop {self.text!r} asks for {self.amount:,.0f} {what}, "
                f"but the {len(able)} units that may be dropped have {most:,.0f}"
            )
        return able
