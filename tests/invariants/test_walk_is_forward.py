"""The walk, block by block, is the plain forward: bit by bit where the batches agree, on every family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import naive
from depthprune.layout import blocks_of
from depthprune.model import Model
from depthprune.record import head
from depthprune.walk import Seen, walk
from families import names


def walked(subject: Model, seen: list[Seen]) -> Tensor:
    arities = [block.arity for block in subject.layout.blocks]
    return head(subject.net, blocks_of(subject.net, subject.layout), arities, seen[-1].streams[-1])


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("name", names("decoder") + names("encoder"))
def test_the_last_stream_gives_the_logits(name: str, padded: bool) -> None:
    subject, data = cases.model(name), cases.text(padded=padded)
    seen = list(walk(subject, data))
    assert [one.block.index for one in seen] == list(range(len(subject.layout.blocks)))
    assert all(len(one.streams) == max(1, len(one.block.sublayers)) + 1 for one in seen)
    for one, following in pairwise(seen):
        assert following.streams[0] is one.streams[-1]
    assert torch.equal(walked(subject, seen)[data.mask], naive.logits(subject.net, data.tokens, data.mask)[data.mask])


# The input of this module is the stream between attention and MLP, in the model's own forward.
BETWEEN: dict[str, Callable[[Any], nn.Module]] = {
    "llama": lambda block: block.post_attention_layernorm,
    "qwen3_sliding": lambda block: block.post_attention_layernorm,
    "gemma2": lambda block: block.pre_feedforward_layernorm,
    "olmo2": lambda block: block.mlp,
    "gpt2": lambda block: block.ln_2,
    "opt": lambda block: block.final_layer_norm,
}


@torch.no_grad()
def middles(subject: Model, tokens: Tensor, mask: Tensor, between: Callable[[Any], nn.Module]) -> list[Tensor]:
    """The streams between the sublayers of each block, overheard in a plain forward."""
    found: list[Tensor] = []
    hooks = [
        between(block).register_forward_pre_hook(lambda _, given: found.append(given[0].clone()))
        for block in naive.stack_of(subject.net)
    ]
    naive.logits(subject.net, tokens, mask)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("name", sorted(BETWEEN))
def test_the_stream_between_sublayers_is_the_real_one(name: str, padded: bool) -> None:
    subject, data = cases.model(name), cases.text(padded=padded)
    real = middles(subject, data.tokens, data.mask, BETWEEN[name])
    for one, middle in zip(walk(subject, data), real, strict=True):
        assert torch.equal(one.streams[1].reshape(-1), middle.reshape(-1))
        assert not torch.equal(one.streams[1], one.streams[0])


def test_the_comparison_sees_another_stream() -> None:
    subject, data = cases.model("llama"), cases.text()
    real = middles(subject, data.tokens, data.mask, lambda block: block.input_layernorm)
    assert not any(torch.equal(one.streams[1], other) for one, other in zip(walk(subject, data), real, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "jamba", "opt"])
def test_batches_do_not_matter(name: str) -> None:
    subject, data = cases.model(name), cases.text(padded=True)
    whole = list(walk(subject, data))
    parts = list(walk(subject, data, tokens_per_call=data.length))
    assert len(parts) == data.sequences * len(whole)
    for one in whole:
        mine = [part for part in parts if part.block.index == one.block.index]
        assert [part.rows.start for part in mine] == [0, 1, 2]
        for position, stream in enumerate(one.streams):
            joined = torch.cat([part.streams[position] for part in mine])
            torch.testing.assert_close(joined[data.mask], stream[data.mask], rtol=1e-4, atol=1e-4)
