"""Sizes such as ``4GB``, and how much memory the weights of a model may take where. No torch."""

from __future__ import annotations

from depthprune.errors import OptionError, unknown

PLACES = ("whole", "auto")


def size(written: str, option: str) -> int:
    """A size such as ``4GB`` in bytes; ``option`` is where it was written. Raises ``OptionError`` for anything else."""
    number, scale = written.strip().upper().removesuffix("B"), 1.0
    for letter, factor in {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.items():
        if number.endswith(letter):
            number, scale = number[:-1], factor
    try:
        amount = int(float(number) * scale)
    except (ValueError, OverflowError):
        raise OptionError(f"{option} {written!r} is no size; write 4GB or 500MB") from None
    if amount <= 0:
        raise OptionError(f"{option} {written!r} must be more than nothing")
    return amount


def budgets(place: str) -> dict[str, int] | None:
    """The bytes that weights may take by kind of device, as ``--place`` says; None for a model that is loaded whole.

    ``auto`` names none, ``auto:cuda=10GB,cpu=20GB`` some. Raises ``OptionError`` for anything else.
    """
    name, _, rest = place.partition(":")
    if name not in PLACES or (name == "whole" and rest):
        raise unknown("place", place, (*PLACES, "auto:cuda=10GB,cpu=20GB"))
    if name == "whole":
        return None
    found: dict[str, int] = {}
    for part in rest.split(",") if rest else ():
        kind, equals, written = part.strip().partition("=")
        if not kind or not equals or kind in found:
            raise OptionError(f"--place {place!r}: {part!r} is no DEVICE=SIZE; write auto:cuda=10GB,cpu=20GB")
        found[kind] = size(written, f"--place {kind}=")
    return found
