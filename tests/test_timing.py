"""Milliseconds per unit: by a clock that the test turns, so that every figure is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import naive
from depthprune.model import Model
from depthprune.oracle import ModelOracle
from depthprune.timing import LEAST, unit_milliseconds
from depthprune.units import Unit, parse
from invariants import cases


class Clock:
    """Stands still until parts of the network move it: each called module of a name takes its own time."""

    def __init__(self, model: Model, seconds: dict[str, float]) -> None:
        self.now, self.calls = 0.0, 0
        for block in naive.stack_of(model.net):
            for name, cost in seconds.items():
                part = block.get_submodule(name)
                part.register_forward_hook(lambda *_, cost=cost: self.move(cost))

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.calls += 1

    def __call__(self) -> float:
        return self.now


# Within the parts that are muted, so that a muted sublayer takes none of their time.
SECONDS = {"self_attn.q_proj": 0.003, "mlp.down_proj": 0.005, "input_layernorm": 0.001}


def test_units_take_the_time_of_their_parts() -> None:
    model = cases.model("llama")
    clock = Clock(model, SECONDS)
    units = (*model.layout.units("any"), *model.layout.units("block"))
    found = unit_milliseconds(model, cases.text(rows=2), units, clock=clock)
    assert tuple(found) == units
    for unit in units:
        wanted = {"self_attn": 3.0, "mlp": 5.0, "": 9.0}[unit.sublayer]
        assert found[unit] == pytest.approx(wanted)


def test_units_alike_are_measured_once() -> None:
    model = cases.model("llama")
    clock = Clock(model, {"mlp.down_proj": 0.001})
    unit_milliseconds(model, cases.text(), model.layout.units("block"), clock=clock, repeats=3)
    assert clock.calls == 1 + 3  # one to warm up
    clock.calls = 0
    unit_milliseconds(model, cases.text(), model.layout.units("any"), clock=clock, repeats=3)
    assert clock.calls == (1 + 3 * 2) + (1 + 3)  # without the attention the MLP runs, without the MLP it does not


def test_units_of_other_sizes_are_measured_apart() -> None:
    model = cases.model("qwen3_moe")  # block 1 has a plain MLP, the others have experts
    clock = Clock(model, {})
    counted: list[int] = []
    for index, block in enumerate(naive.stack_of(model.net)):
        block.mlp.register_forward_hook(lambda *_, index=index: counted.append(index))
    unit_milliseconds(model, cases.text(), model.layout.units("mlp"), clock=clock, repeats=1)
    assert set(counted) == {0, 1}
    found = unit_milliseconds(model, cases.text(), model.layout.units("block"), clock=clock)
    assert set(found.values()) == {LEAST}


def test_no_unit_is_free() -> None:
    """A clock that is too coarse, or runs backwards, gives a price that one can divide by."""
    model = cases.model("gpt2")
    ticks = iter(range(100_000, 0, -1))
    for clock in (lambda: 0.0, lambda: float(next(ticks))):
        found = unit_milliseconds(model, cases.text(), model.layout.units("any"), clock=clock)
        assert all(value >= LEAST > 0 for value in found.values())


def test_the_median_ignores_a_hiccup() -> None:
    model = cases.model("llama")
    clock = Clock(model, {"mlp.down_proj": 0.002})
    slow = [0]

    def hiccup(*_: Any) -> None:
        slow[0] += 1
        clock.now += 10.0 if slow[0] == 3 else 0.0

    naive.stack_of(model.net)[0].register_forward_hook(hiccup)
    assert unit_milliseconds(model, cases.text(), parse(["0"]), clock=clock)[Unit("", 0)] == pytest.approx(2.0)


def test_a_forward_over_one_sequence_is_timed() -> None:
    model, data = cases.model("llama"), cases.text(rows=3, padded=True)
    shapes: list[torch.Size] = []
    naive.stack_of(model.net)[0].mlp.register_forward_hook(lambda _, given, out: shapes.append(out.shape))
    unit_milliseconds(model, data, parse(["0"]), repeats=1)
    assert set(shapes) == {torch.Size((1, 20, 32))}
    assert all("forward" not in vars(module) for module in model.net.modules())


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "mixtral", "bloom"])
def test_real_clocks_give_positive_times(family: str) -> None:
    model = cases.model(family)
    found = unit_milliseconds(model, cases.text(), model.layout.units("any"), repeats=1)
    assert set(found) == set(model.layout.units("any")) and all(value > 0 for value in found.values())


@contextmanager
def counting(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    from depthprune import oracle as module

    calls: list[int] = []
    own: Callable[..., Any] = unit_milliseconds
    patch.setattr(module, "unit_milliseconds", lambda *args: calls.append(1) or own(*args))
    yield calls


def test_an_oracle_times_once(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = ModelOracle(cases.model("llama"), cases.text(), metric="cosine")
    with counting(monkeypatch) as calls:
        first = oracle.milliseconds()
        assert oracle.milliseconds() == first == oracle.asking("loss").milliseconds() and calls == [1]
    assert set(first) == set(oracle.units)
