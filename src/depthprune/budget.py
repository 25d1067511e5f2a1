"""Budgets: how much to drop. No torch.

25%            at least this share of the parameters in the stack of blocks
8 blocks       that many units of a kind: blocks, attention, mlp, mixer, or units of any kind
params<=6e9    at most this many parameters are left in the whole model
kv<=50%        at most this share of the KV cache is left (a number: bytes per token)
loss<=+5%      as much as the loss allows: at most this share above the dense model's (a number: the loss itself)
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from depthprune.errors import BudgetError
from depthprune.units import Unit

FORMS = "'25%', '8 blocks', '12 attention', '6 mlp', 'params<=6e9', 'kv<=50%' or 'loss<=+5%'"
_COUNT = re.compile(r"(\d+)\s*(blocks?|attentions?|mlps?|mixers?|units?|sublayers?)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_LIMIT = re.compile(r"(params|kv)\s*<=\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*(%|[kmbg])?")
_LOSS = re.compile(r"loss\s*<=\s*(\+?)\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(%?)")
_WHAT = {"count": "units", "parameters": "parameters", "kv": "bytes of KV cache per token"}
_SLACK = 1e-6  # of a parameter or a byte: shares are no binary fractions
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}


class Ledger(Protocol):
    """What a budget counts with; a ``Layout`` is one."""

    @property
    def blocks(self) -> Sequence[object]:
        """The blocks of the stack, in order."""

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

    ``kind`` is the kind that a count is of (``block``, ``attention``, …), or None. Where ``measure`` is ``loss`` the
    amount is the highest loss that is allowed, or with ``relative`` its rise as a share of the dense model's. No
    removal ever meets such a budget, as more might go: selectors stop before the one that would break it.
    """

    text: str
    measure: str
    amount: float
    kind: str | None = None
    relative: bool = False

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
        if match := _LOSS.fullmatch(given):
            if bool(match[1]) != bool(match[3]):
                raise BudgetError(f"--drop {text!r}: write loss<=+5% (above the dense model's) or loss<=2.5 (the loss)")
            return cls(text, "loss", float(match[2]) / (100 if match[3] else 1), relative=bool(match[1]))
        if given.startswith("latency"):
            raise BudgetError(f"--drop {text!r}: budgets on latency do not exist yet; write {FORMS}")
        if re.fullmatch(r"\d+(\.\d+)?", given):
            nothing = "drops nothing and " if float(given) == 0 else ""
            raise BudgetError(f"--drop {text!r} {nothing}has no measure; write {FORMS}")
        raise BudgetError(f"--drop {text!r} is no budget; write {FORMS}")

    def spent(self, ledger: Ledger, gone: frozenset[Unit]) -> float:
        """How much of the measure dropping these units frees; for a budget on the loss, of the parameters."""
        if self.measure == "count":
            return len(gone)
        return ledger.kv_freed(gone) if self.measure == "kv" else ledger.freed(gone)

    def met(self, ledger: Ledger, gone: Collection[Unit]) -> bool:
        """Whether dropping these units is enough; under a budget on the loss, more might always go."""
        return self.measure != "loss" and self.spent(ledger, frozenset(gone)) >= self.amount - _SLACK

    def limit(self, dense: float) -> float:
        """The highest loss that is allowed where the dense model's is ``dense``: infinite unless it is on the loss.

        Raises ``BudgetError`` for a share of a loss that is zero, as a divergence from the dense model is.
        """
        if self.measure != "loss":
            return math.inf
        if self.relative and dense <= 0:
            raise BudgetError(
                f"--drop {self.text!r} is a share of the dense model's loss, which is {dense:g} under this metric; "
                "write a number, such as loss<=0.1"
            )
        return dense * (1 + self.amount) if self.relative else self.amount

    def broken(self, dense: float, gone: Collection[Unit], loss: float) -> BudgetError:
        """Build the error for a budget on the loss that the first removal breaks already."""
        return BudgetError(
            f"--drop {self.text!r} cannot be met: it allows a loss of {self.limit(dense):.4f}, the dense model has "
            f"{dense:.4f}, and dropping {', '.join(map(str, gone))} leaves {loss:.4f}"
        )

    def most(self, ledger: Ledger, units: Collection[Unit]) -> int:
        """The most removals that it can take, one by one and in any order, until it is met.

        Sets of units free at least the sum of what each frees, so this many of the smallest are enough of any.
        """
        if self.measure == "loss":
            return len(units)
        total, sizes = 0.0, sorted(self.spent(ledger, frozenset((unit,))) for unit in units)
        for count, size in enumerate(sizes):
            if total >= self.amount - _SLACK:
                return count
            total += size
        return len(units)

    def insist(self, ledger: Ledger, gone: Collection[Unit], stuck: Collection[Unit] = ()) -> None:
        """Raise ``BudgetError`` where these units are not enough, as when the rest is what makes it a model.

        ``stuck`` are units that were left because their score is infinite.
        """
        if self.met(ledger, gone) or (self.measure == "loss" and gone):
            return
        if stuck:
            some = ", ".join(map(str, list(stuck)[:3])) + (", …" if len(stuck) > 3 else "")
            asks = "anything" if self.measure == "loss" else f"{self.amount:,.0f} {_WHAT[self.measure]}"
            raise BudgetError(
                f"--drop {self.text!r} asks for {asks}, but only {self.spent(ledger, frozenset(gone)):,.0f} can go: "
                f"{len(stuck)} units must stay, as their score is infinite ({some})"
            )
        raise BudgetError(
            f"--drop {self.text!r} cannot be met: it would take every block, or every attention; ask for less"
        )

    def candidates(self, ledger: Ledger, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """The units that can help to meet the budget, if together they can.

        Raises ``BudgetError`` with the arithmetic where all of them are not enough.
        """
        able = tuple(u for u in units if self.measure != "kv" or ledger.kv_freed(frozenset((u,))) > 0)
        if self.measure == "loss":
            if not able:
                raise BudgetError(f"--drop {self.text!r}: there are no units that may be dropped")
            return able
        most = self.spent(ledger, frozenset(able))
        if most < self.amount - _SLACK or not able:
            raise BudgetError(
                f"--drop {self.text!r} asks for {self.amount:,.0f} {_WHAT[self.measure]}, "
                f"but the {len(able)} units that may be dropped have {most:,.0f}"
            )
        return able
