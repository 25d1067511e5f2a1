"""The walk: its order, its bookkeeping, and that what it replays is what was computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import naive
from depthprune import walk as walking
from depthprune.data import Data, digest
from depthprune.model import Model
from depthprune.record import once
from depthprune.units import Unit
from depthprune.walk import walk


def text(rows: int = 5, length: int = 12) -> Data:
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Data(tokens, mask, "random", digest(tokens, mask), 0, ())


def test_all_batches_pass_a_block_before_the_next(subject: Callable[..., Model]) -> None:
    progress: list[tuple[float, float]] = []
    seen = list(walk(subject("llama"), text(), tokens_per_call=24, progress=lambda *step: progress.append(step)))
    order = [(one.block.index, one.rows.start, one.rows.stop) for one in seen]
    assert order == [(block, *rows) for block in range(4) for rows in ((0, 2), (2, 4), (4, 5))]
    assert progress == [(float(done), 12.0) for done in range(1, 13)]
    assert all(one.mask.shape == one.streams[0].shape[:2] for one in seen)


def test_each_weight_is_used_once_per_batch(subject: Callable[..., Model]) -> None:
    model, data = subject("granitemoeshared"), text(2)
    calls: dict[torch.nn.Module, int] = {}
    for block in naive.stack_of(model.net):
        for part in (block.get_submodule("self_attn.q_proj"), block.get_submodule("shared_mlp.output_linear")):
            part.register_forward_hook(lambda module, *_: calls.update({module: calls.get(module, 0) + 1}))
    list(walk(model, data))
    assert list(calls.values()) == [1] * 8


@pytest.mark.parametrize("name", ["llama", "granitemoeshared", "gptj", "opt"])
def test_the_stream_after_a_sublayer_is_the_block_with_the_later_ones_swapped_out(
    name: str, subject: Callable[..., Model]
) -> None:
    model, data = subject(name), text(2)
    for one in list(walk(model, data)):
        index, sublayers = one.block.index, one.block.sublayers
        for position in range(1, len(sublayers) + 1):
            later = [Unit("", index, s.name) for s in sublayers[position:]]
            heard: list[Any] = []
            block: torch.nn.Module = naive.stack_of(model.net)[index]
            hook = block.register_forward_hook(lambda _, given, out, heard=heard: heard.append(out))
            with naive.removed(model.net, later):
                naive.logits(model.net, data.tokens)
            hook.remove()
            out = heard[-1][0] if isinstance(heard[-1], tuple) else heard[-1]
            assert torch.equal(one.streams[position], out)


def test_a_block_without_sublayers_has_two_streams(subject: Callable[..., Model]) -> None:
    assert {len(one.streams) for one in walk(subject("bloom"), text(2))} == {2}


def test_the_comparison_sees_a_stale_replay(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = subject("llama"), text(4)
    want = naive.logits(model.net, data.tokens)
    shelf: dict[Any, Any] = {}
    own = once
    # Keeps what it computed from one batch to the next.
    monkeypatch.setattr(walking, "once", lambda module, key, kept: own(module, (module, key), shelf))
    seen = list(walk(model, data, tokens_per_call=24))
    final = torch.cat([one.streams[-1] for one in seen if one.block.index == 3])
    net: Any = model.net
    assert not torch.allclose(net.lm_head(net.model.norm(final)), want, atol=1e-3)
