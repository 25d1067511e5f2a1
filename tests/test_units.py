"""Unit names: what they mean, their order, and what is no unit."""

from __future__ import annotations

import random

import pytest

from depthprune.errors import PlanError
from depthprune.units import KINDS, Unit, parse


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("12", Unit("", 12)),
        ("0", Unit("", 0)),
        ("12.self_attn", Unit("", 12, "self_attn")),
        ("decoder.3.mlp", Unit("decoder", 3, "mlp")),
        ("decoder.3", Unit("decoder", 3)),
        ("3.self_attn+mlp", Unit("", 3, "self_attn+mlp")),
        ("7.layer.0.SelfAttention", Unit("", 7, "layer.0.SelfAttention")),
        ("  12.mlp\n", Unit("", 12, "mlp")),
    ],
)
def test_names_are_read(text: str, unit: Unit) -> None:
    assert Unit.parse(text) == unit
    assert str(unit) == text.strip()
    assert repr(unit) == f"Unit({text.strip()!r})"
    assert Unit.parse(str(unit)) == unit


@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "1.5", "12.", ".12", "12 mlp", "12..mlp", "self_attn", "a.b.3", "12.self-attn", "1,2"]
)
def test_what_is_no_unit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Unit.parse(text)
    assert str(caught.value) == f"{text!r} is no unit; write a block as '12' or a sublayer as '12.self_attn'"


def test_a_unit_knows_its_block() -> None:
    assert Unit.parse("decoder.3.mlp").whole == Unit.parse("decoder.3")
    assert Unit.parse("3").whole == Unit.parse("3")


def test_blocks_sort_by_number_and_stand_before_their_sublayers() -> None:
    expected = ["2", "9", "9.mlp", "9.self_attn", "10", "10.mlp", "encoder.1"]
    shuffled = expected.copy()
    random.Random(0).shuffle(shuffled)
    assert shuffled != expected
    assert [str(unit) for unit in sorted(parse(shuffled))] == expected


def test_parse_leaves_units_as_they_are() -> None:
    mine = Unit("", 3, "mlp")
    assert parse(["1", mine]) == (Unit("", 1), mine)
    both: list[str | Unit] = ["1", mine]
    assert parse(iter(both))[1] is mine
    assert parse([]) == ()


def test_units_are_values() -> None:
    assert len({Unit.parse("3.mlp"), Unit("", 3, "mlp"), Unit("", 3)}) == 2
    with pytest.raises(AttributeError):
        Unit("", 3).block = 4  # type: ignore[misc]


def test_kinds() -> None:
    assert KINDS == ("block", "attention", "cross_attention", "mlp", "mixer")
