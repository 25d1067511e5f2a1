"""What a unit's damage is weighed against: nothing, or what dropping it saves. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from depthprune.budget import Budget, Ledger
from depthprune.errors import OptionError
from depthprune.units import Unit

PER = ("none", "parameters", "kv", "time")


def prices(
    selector: str,
    per: str,
    units: Sequence[Unit],
    ledger: Ledger,
    milliseconds: Callable[[], Mapping[Unit, float]],
) -> dict[Unit, float]:
    """What dropping each unit saves: parameters, bytes of KV cache per token, milliseconds; 1 for ``none``.

    A unit's price is that of the unit alone, and stays as others go. Raises ``OptionError`` for another ``per``.
    """
    one_of(f"{selector}:per", per, PER)
    if per == "time":
        times = milliseconds()
        return {unit: float(times[unit]) for unit in units}
    if per == "parameters":
        return {unit: float(ledger.freed(frozenset((unit,)))) for unit in units}
    if per == "kv":
        return {unit: float(ledger.kv_freed(frozenset((unit,)))) for unit in units}
    return dict.fromkeys(units, 1.0)


def shares(budget: Budget, units: Sequence[Unit], gone: Sequence[Unit], ledger: Ledger) -> dict[Unit, float]:
    """What each unit brings of what a budget still needs once others are gone, in what the budget counts.

    ``min(what the unit frees, what is still needed)``: more than the budget asks for is worth nothing. Where the budget
    is on the loss, the parameters it frees.
    """
    need = float("inf") if budget.measure == "loss" else budget.amount - budget.spent(ledger, frozenset(gone))
    return {unit: min(float(budget.spent(ledger, frozenset((unit,)))), need) for unit in units}


def rank(damage: float, price: float) -> tuple[bool, float]:
    """The place in line of a unit: low goes first.

    ``damage / price`` where damage is positive. Damage below zero is a gain, and a gain is no better for being spread
    over less: it is taken as it is, so that gains go first, the largest ahead, and none is outdone by the price. Units
    that save nothing come last. For one price the place only rises with the damage, so a bound on one bounds the other.
    """
    return price <= 0, damage / price if damage > 0 and price > 0 else damage


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """Raise ``OptionError`` unless an option has one of the values that it can have."""
    if value not in known:
        raise OptionError(f"{option} is one of {', '.join(known)}, not {value!r}")


def at_least(option: str, value: int, least: int) -> None:
    """Raise ``OptionError`` for an option that is too small."""
    if value < least:
        raise OptionError(f"{option} must be at least {least}, not {value}")
