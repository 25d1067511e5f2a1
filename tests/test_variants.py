"""The engine's bookkeeping: shared prefixes, work done, bounded memory, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import naive
from depthprune import variants as engine
from depthprune.data import Data, digest
from depthprune.errors import DataError, PlanError
from depthprune.model import Model
from depthprune.units import parse
from depthprune.variants import losses, trie


def text(rows: int = 3, length: int = 12, vocabulary: int = 96) -> Data:
    tokens = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Data(tokens, mask, "random", digest(tokens, mask), 0, ())


def brute(model: Model, gone: list[Any]) -> tuple[list[int], float]:
    """The same count from the paths themselves, written down in full."""
    alive, work = [], 0
    paths: list[tuple[Any, ...]] = [() for _ in gone]
    for index in range(len(model.layout.blocks)):
        modes = ["gone" if one.get(index, ()) is None else one.get(index, frozenset()) for one in gone]
        paths = [(*path, mode) for path, mode in zip(paths, modes, strict=True)]
        work += len({path for path in paths if path[-1] != "gone"})
        alive.append(len(set(paths)))
    return alive, work


@pytest.mark.parametrize(
    "variants",
    [
        [[]],
        [[], []],
        [["0"], ["1"], ["2"], ["3"]],
        [[], ["0.mlp"], ["0.self_attn"], ["0"], ["0.self_attn", "0.mlp"], ["1.mlp", "3"]],
        [["1", "2"], ["1", "3"], ["1", "2", "3.mlp"], []],
    ],
)
def test_prefixes_are_shared(variants: list[list[str]], subject: Callable[..., Model]) -> None:
    model = subject("llama")
    gone = [model.layout.gone(parse(units)) for units in variants]
    assert trie(model.layout, gone) == brute(model, gone)


def test_each_block_is_called_once_for_all_variants(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    losses(model, data, [()])
    calls: dict[Any, int] = {}
    for block in naive.stack_of(model.net):
        block.mlp.down_proj.register_forward_hook(  # type: ignore[union-attr]
            lambda module, *_: calls.update({module: calls.get(module, 0) + 1})
        )
    losses(model, data, [parse([str(index)]) for index in range(4)])
    assert list(calls.values()) == [1, 2, 2, 1]  # together those that lost a block before; and those yet to


def test_variants_share_what_a_sublayer_computes(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    losses(model, data, [()])
    calls: list[int] = []
    block: Any = naive.stack_of(model.net)[0]
    block.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(0))
    block.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    losses(model, data, [(), parse(["0.mlp"]), parse(["0.self_attn"])])
    assert sorted(calls) == [0, 1, 1]


def test_the_answer_is_summed_nats(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    got = losses(model, data, [(), parse(["1"])])
    assert got.nll.shape == (2, 3) and got.tokens.tolist() == [11, 11, 11] and got.nll.dtype == np.float64
    assert got.mean()[0] == pytest.approx(float(naive.loss(model.net, data.tokens, data.mask).sum()) / 33, abs=1e-5)
    assert losses(model, data, []).nll.shape == (0, 3)


def test_the_head_runs_in_chunks(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = subject("gemma2"), text(rows=4, length=20)
    chosen = [(), parse(["2.mlp"])]
    whole = losses(model, data, chosen)
    widths: list[int] = []
    net: Any = model.net
    net.lm_head.register_forward_hook(lambda _, given, out: widths.append(out.shape[0] * out.shape[1]))
    losses(model, data, chosen)
    assert widths == [4 * 19] * 2
    monkeypatch.setattr(engine, "LOGITS", {"cpu": 1})
    widths.clear()
    np.testing.assert_allclose(losses(model, data, chosen).nll, whole.nll, rtol=1e-6)
    assert widths == [64, 64, 12, 12]


def test_units_and_text_that_do_not_fit_are_refused(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with pytest.raises(PlanError, match="no unit 7"):
        losses(model, text(), [parse(["7"])])
    with pytest.raises(DataError, match="128"):
        losses(model, text(length=140), [()])
    with pytest.raises(DataError, match="96 embeddings"):
        losses(model, text(vocabulary=400), [()])


def test_nothing_is_left_replaced(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    losses(model, data, [(), *(parse([str(unit)]) for unit in model.layout.units("any"))])
    assert all("forward" not in vars(module) for module in model.net.modules())
    assert not any(parameter.grad is not None for parameter in model.net.parameters())


def test_losses_that_are_not_numbers_come_out(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with torch.no_grad():
        model.net.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    got = losses(model, text(), [(), parse(["1.mlp"])])
    assert np.isnan(got.nll[0]).all() and np.isfinite(got.nll[1]).all()
