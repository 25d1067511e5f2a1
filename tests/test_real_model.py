"""The engine and the search on the real model that comes with depthprune, against a naive implementation.

The naive one knows nothing of the package: it deletes parts of a fresh copy of the network, runs a plain forward, and
takes the mean negative log-likelihood.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from depthprune import demo
from depthprune.data import Data, calibrate
from depthprune.model import Model, load
from depthprune.planning import candidates, select
from depthprune.units import Unit
from depthprune.variants import losses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(demo.unpack(tmp_path_factory.mktemp("demo")))


def text(model: Model, sequences: int, length: int) -> Data:
    return calibrate(str(demo.CALIBRATION), model.tokenizer, sequences=sequences, length=length)


class Nothing(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NothingMlp(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def naive_loss(model: Model, data: Data, units: Sequence[str]) -> float:
    """Drop, plain forward, mean NLL."""
    memo = {id(tensor): tensor for tensor in model.net.parameters()}
    net = copy.deepcopy(model.net, memo)
    layers = net.model.layers
    whole = {int(unit) for unit in units if "." not in unit}
    for unit in units:
        if "." in unit:
            index, name = unit.split(".")
            setattr(layers[int(index)], name, Nothing() if name == "self_attn" else NothingMlp())
    net.model.layers = nn.ModuleList([layer for index, layer in enumerate(layers) if index not in whole])
    net.config.num_hidden_layers = len(net.model.layers)
    total = 0.0
    for row in data.tokens:
        logits = net(row[None], use_cache=False).logits[0]
        total += nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").item()
    return total / (data.tokens.numel() - len(data.tokens))


def naive_greedy(model: Model, data: Data, count: int) -> list[str]:
    """Measure every sublayer left at every step, and drop the one that leaves the lowest loss."""
    names = [str(unit) for unit in candidates(model.layout, "any")]
    gone: list[str] = []
    for _ in range(count):
        left = [name for name in names if name not in gone]
        measured = [naive_loss(model, data, [*gone, name]) for name in left]
        gone.append(left[measured.index(min(measured))])
    return gone


def test_every_variant_has_the_loss_of_a_plain_forward(model: Model) -> None:
    data = text(model, 2, 192)
    variants = [(unit,) for unit in (*model.layout.units("any"), *model.layout.units("block"))]
    mixed = [("3", "7.self_attn", "0.mlp"), ("2.self_attn", "2.mlp"), ("0.self_attn", "15"), ()]
    every = [*variants, *(tuple(Unit.parse(name) for name in names) for names in mixed)]
    found = losses(model, data, every).mean()
    for units, loss in zip(every, found, strict=True):
        assert loss == pytest.approx(naive_loss(model, data, [str(unit) for unit in units]), abs=1e-5)
    assert found.max() - found.min() > 0.5  # the comparison above is not one of equals


def test_exact_greedy_chooses_what_the_naive_search_chooses(model: Model) -> None:
    data = text(model, 2, 96)
    plan = select(model, "3 units", data=data, select="greedy:exact=true")
    assert [str(unit) for unit in plan.drop] == naive_greedy(model, data, 3)


@pytest.mark.slow
def test_exact_greedy_of_eight_sublayers(model: Model) -> None:
    data = text(model, 8, 512)
    plan = select(model, "8 units", data=data, select="greedy:exact=true")
    assert [str(unit) for unit in plan.drop] == naive_greedy(model, data, 8)


def test_the_demo_is_deterministic(model: Model, tmp_path: Path) -> None:
    data = text(model, 2, 96)
    first, second = (select(model, "2 units", data=data) for _ in range(2))
    assert first == second and first.to_json() == second.to_json()
