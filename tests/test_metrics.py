"""One-pass metrics equal their formulas, written out in numpy on streams overheard in a plain forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import naive
from depthprune import demo
from depthprune.data import Data, calibrate, digest
from depthprune.errors import OptionError
from depthprune.metrics.stream import DISTANCES, last_token, spans, stream_scores
from depthprune.model import Model, load
from depthprune.oracle import ModelOracle
from depthprune.units import Unit

Array = npt.NDArray[np.float64]
# The module whose input is the stream between attention and MLP.
BETWEEN = {
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "gpt2": "ln_2",
}


def text(padded: bool) -> Data:
    tokens = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[1, 13:] = False
        mask[2, 3:] = False
    return Data(tokens, mask, "random", digest(tokens, mask), 0, ())


@torch.no_grad()
def streams(model: Model, data: Data, family: str = "") -> list[tuple[Array, Array, Array]]:
    """The stream before, inside and after each block (B, T, D), overheard."""
    seen: dict[str, list[Array]] = {"in": [], "mid": [], "out": []}

    def keep(where: str, value: Any) -> None:
        stream: Tensor = value[0] if isinstance(value, tuple) else value
        seen[where].append(stream.reshape(*data.tokens.shape, -1).double().numpy())

    hooks = []
    blocks = model.net.model.layers if family else naive.stack_of(model.net)
    for block in blocks:
        middle: nn.Module = getattr(block, BETWEEN[family or model.reference.id])
        hooks += [
            block.register_forward_pre_hook(lambda _, given: keep("in", given)),
            middle.register_forward_pre_hook(lambda _, given: keep("mid", given)),
            block.register_forward_hook(lambda _, given, out: keep("out", out)),
        ]
    naive.logits(model.net, data.tokens, data.mask)
    for hook in hooks:
        hook.remove()
    return list(zip(*seen.values(), strict=True))


def formula(metric: str, x: Array, y: Array) -> Array:
    cosine = (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    l1, l2 = np.abs(y - x).sum(-1), np.sqrt(((y - x) ** 2).sum(-1))
    result: Array = {
        "cosine": 1 - cosine,
        "angular": np.arccos(cosine) / np.pi,
        "l1": l1,
        "l2": l2,
        "relative_l1": l1 / np.abs(x).sum(-1),
        "relative_l2": l2 / np.sqrt((x * x).sum(-1)),
    }[metric]
    return result


def average(values: Array, data: Data, tokens: str) -> float:
    mask = data.mask.numpy()
    if tokens == "all":
        return float(values[mask].mean())
    return float(np.mean([values[row, mask[row].nonzero()[0].max()] for row in range(len(mask))]))


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("name", sorted(BETWEEN))
def test_scores_equal_the_formulas(name: str, padded: bool, tokens: str, subject: Callable[..., Model]) -> None:
    model, data = subject(name), text(padded)
    got = stream_scores(model, data, tokens=tokens)
    assert set(got) == set(DISTANCES)
    heard = streams(model, data)
    for metric, scores in got.items():
        assert scores.metric == metric and len(scores.values) == 12
        for index, (before, middle, after) in enumerate(heard):
            first, second = (s.name for s in model.layout.blocks[index].sublayers)
            pairs = {"": (before, after), first: (before, middle), second: (middle, after)}
            for sublayer, (x, y) in pairs.items():
                want = average(formula(metric, x, y), data, tokens)
                assert scores.values[Unit("", index, sublayer)] == pytest.approx(want, rel=1e-5), (metric, index)


def test_scores_of_a_real_model_equal_the_formulas(tmp_path: Path) -> None:
    model = load(demo.unpack(tmp_path))
    data = calibrate(str(demo.CALIBRATION), model.tokenizer, sequences=2, length=32)
    assert isinstance(data, Data)
    got = stream_scores(model, data)
    for index, (before, middle, after) in enumerate(streams(model, data, "llama")):
        first, second = (s.name for s in model.layout.blocks[index].sublayers)
        for sublayer, x, y in (("", before, after), (first, before, middle), (second, middle, after)):
            for metric, scores in got.items():
                want = average(formula(metric, x, y), data, "all")
                assert scores.values[Unit("", index, sublayer)] == pytest.approx(want, rel=1e-4), (metric, index)


def test_the_comparison_sees_padding_that_is_counted(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text(True)
    wrong = Data(data.tokens, torch.ones_like(data.mask), "all real", "", 0, ())
    before, _, after = streams(model, data)[1]
    want = average(formula("l2", before, after), data, "all")
    assert stream_scores(model, wrong, ["l2"])["l2"].values[Unit("", 1)] != pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_spans_equal_the_formula(length: int, tokens: str, subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text(True)
    heard = streams(model, data)
    got = spans(model, data, "angular", length, tokens=tokens)
    want = {
        first: average(formula("angular", heard[first][0], heard[first + length - 1][2]), data, tokens)
        for first in range(5 - length)
    }
    assert got.keys() == want.keys()
    for first, value in want.items():
        assert got[first] == pytest.approx(value, rel=1e-5)
    assert len({round(value, 6) for value in want.values()}) == len(want)


def test_a_span_of_one_is_the_score_of_the_block(subject: Callable[..., Model]) -> None:
    model, data = subject("gpt2"), text(False)
    scores = stream_scores(model, data, ["cosine"])["cosine"]
    for first, value in spans(model, data, "cosine", 1).items():
        assert value == pytest.approx(scores.values[Unit("", first)], rel=1e-9)


def test_the_last_token_is_the_last_real_one() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]]).bool()
    assert last_token(mask).nonzero().tolist() == [[0, 3], [1, 1], [2, 2]]


def test_a_wrong_choice_of_tokens_is_refused(subject: Callable[..., Model]) -> None:
    with pytest.raises(OptionError, match=r"unknown tokens='first' for l2\. Available: all, last"):
        stream_scores(subject("llama"), text(False), ["l2"], tokens="first")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_loss_metric_is_the_rise_of_the_loss(name: str, subject: Callable[..., Model]) -> None:
    model, data = subject(name), text(True)
    units = (*model.layout.units("any")[:3], Unit("", 2))
    scores = ModelOracle(model, data, metric="loss", units=units).scored()
    tokens = int(data.predicted)
    dense = float(naive.loss(model.net, data.tokens, data.mask).sum()) / tokens
    assert scores.dense == pytest.approx(dense, abs=1e-5)
    for unit in units:
        with naive.removed(model.net, [unit]):
            loss = float(naive.loss(model.net, data.tokens, data.mask).sum()) / tokens
        assert scores.values[unit] == pytest.approx(loss - dense, abs=1e-5)
        assert scores.errors[unit] > 0
