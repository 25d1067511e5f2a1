"""Magnitude equals its formula in numpy and never touches the data; the baselines are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import naive
from depthprune import demo
from depthprune.data import Data, digest
from depthprune.errors import OptionError
from depthprune.metrics import weight
from depthprune.metrics.baseline import last, random
from depthprune.metrics.weight import magnitude
from depthprune.model import Model, load
from depthprune.oracle import ModelOracle
from depthprune.scores import Scores
from depthprune.units import Unit
from test_gradient import NORMS, every


class Blind:
    """An oracle that has no data to look at."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shown: list[tuple[float, float]] = []

    @property
    def data(self) -> Any:
        raise AssertionError("the data was touched")

    def progress(self, what: str) -> Callable[[float, float], None]:
        return lambda done, total: self.shown.append((done, total))


def score(model: Model, units: Sequence[Unit] = (), **options: Any) -> Scores:
    oracle: Any = Blind(model)
    return magnitude(oracle, tuple(units) or every(model.layout), **options)


def text(seed: int) -> Data:
    tokens = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Data(tokens, mask, "random", digest(tokens, mask), seed, ())


def formula(stack: Any, norms: dict[str, str], power: float, tensors: str) -> dict[str, float]:
    units: dict[str, float] = {}
    for name, parameter in stack.named_parameters():
        array, leaf = parameter.detach().double().numpy(), name.split(".")[-1]
        if leaf.endswith("bias") or (array.ndim < 2 and (tensors == "matrices" or leaf != "weight")):
            continue
        block, child, *_ = name.split(".")
        owners = norms.get(child, "").split() if "norm" in child or child.startswith("ln_") else [child]
        for unit in (block, *(f"{block}.{owner}" for owner in owners)):
            units[unit] = units.get(unit, 0) + float(np.sum(np.abs(array) ** power))
    return units


@pytest.mark.parametrize("tensors", ["matrices", "weights"])
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "cohere", "jamba"])
def test_magnitude_is_the_formula(name: str, power: float, tensors: str, subject: Callable[..., Model]) -> None:
    model = subject(name)
    got = score(model, power=power, tensors=tensors)
    want = formula(naive.stack_of(model.net), NORMS[name], power, tensors)
    assert got.metric == "magnitude" and not got.data
    for unit, value in got.values.items():
        assert value == pytest.approx(want[str(unit)], rel=1e-6)
        assert sum(got.detail[unit].values()) == pytest.approx(value)


def test_magnitude_is_the_formula_on_real_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load(demo.unpack(tmp_path_factory.mktemp("demo")))
    got, want = score(model, tensors="weights"), formula(model.net.model.layers, NORMS["demo"], 1.0, "weights")
    assert {str(unit) for unit in got.values} == set(want)
    for unit, value in got.values.items():
        assert value == pytest.approx(want[str(unit)], rel=1e-6)
    plus = score(model, plus=True).values
    assert {unit.block for unit, value in plus.items() if value == math.inf} == {0, 1, 2, 3, 14, 15}


def test_the_sum_does_not_depend_on_the_pieces(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("mixtral")
    whole = score(model)
    monkeypatch.setattr(weight, "PIECE", 77)
    assert dict(score(model).values) == pytest.approx(dict(whole.values), rel=1e-6)


def test_large_sums_keep_their_digits() -> None:
    """A float32 running sum of these would stop growing."""
    ones = torch.full((1 << 12, 1 << 13), 1.0 + 2**-10)
    assert weight._size(ones, 1.0) == pytest.approx((1 << 25) * (1.0 + 2**-10), rel=1e-12)


def test_weights_in_low_precision(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    want = score(model)
    model.net.to(torch.bfloat16)
    assert dict(score(model).values) == pytest.approx(dict(want.values), rel=1e-3)


def test_weights_that_are_not_numbers_come_out(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with torch.no_grad():
        model.net.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    assert math.isnan(score(model).values[Unit("", 1)]) and math.isfinite(score(model).values[Unit("", 2)])


def test_progress_counts_blocks(subject: Callable[..., Model]) -> None:
    oracle: Any = Blind(subject("llama"))
    magnitude(oracle, [Unit("", 1), Unit("", 1, "mlp"), Unit("", 3)])
    assert oracle.shown == [(1.0, 2.0), (2.0, 2.0)]


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_wrong_options_are_refused(power: float, subject: Callable[..., Model]) -> None:
    with pytest.raises(OptionError, match="magnitude needs a power above 0, not"):
        score(subject("llama"), power=power)
    with pytest.raises(OptionError, match=r"unknown tensors='all'\. Available: matrices, weights"):
        score(subject("llama"), tensors="all")


def test_random_scores_depend_on_the_seed_and_the_unit_alone(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    units = every(model.layout)
    oracle = ModelOracle(model, text(4))
    whole = random(oracle, units).values
    assert all(0 <= value < 1 for value in whole.values()) and len(set(whole.values())) == len(units)
    assert dict(random(oracle, units[5:2:-1]).values) == {unit: whole[unit] for unit in units[3:6]}
    assert random(oracle, units, seed=4).values == whole
    assert random(ModelOracle(model, text(5)), units).values == random(oracle, units, seed=5).values != whole
    blind: Any = Blind(model)
    assert random(blind, units, seed=4).values == whole
    many = [random(blind, units, seed=seed).values[units[0]] for seed in range(2000)]
    assert np.mean(many) == pytest.approx(0.5, abs=0.03) and np.std(many) == pytest.approx(12**-0.5, abs=0.01)


def test_last_drops_the_deepest_but_the_final_block(subject: Callable[..., Model]) -> None:
    blind: Any = Blind(subject("llama"))
    layout = blind.model.layout
    assert [str(unit) for unit in last(blind, layout.units("block")).ranked()] == ["2", "1", "0", "3"]
    ranked = [str(unit) for unit in last(blind, layout.units("any")).ranked()]
    assert ranked[:4] == ["2.mlp", "2.self_attn", "1.mlp", "1.self_attn"] and ranked[6:] == ["3.self_attn", "3.mlp"]
    values = last(blind, every(layout)).values
    assert {str(unit) for unit, value in values.items() if value == math.inf} == {"3", "3.self_attn", "3.mlp"}
    assert values[Unit("", 2)] == 1 and values[Unit("", 1, "self_attn")] == 2.5
