"""Recordings: what a model passes to its blocks, caught and replayed; nothing is left replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
from depthprune.errors import LayoutError
from depthprune.layout import Layout, blocks_of
from depthprune.model import Model
from depthprune.record import Call, answer, change, first, forwards, head, inputs, leaves, once, record, slices

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def caught(model: Model, tokens: Tensor = TOKENS, mask: Tensor | None = None) -> Any:
    arities = [block.arity for block in model.layout.blocks]
    return record(model.net, blocks_of(model.net, model.layout), arities, tokens, mask)


def dense_logits(net: nn.Module, layout: Layout, tokens: Tensor) -> Tensor:
    """The logits of a plain forward made block by block."""
    modules, arities = blocks_of(net, layout), [block.arity for block in layout.blocks]
    recording = record(net, modules, arities, tokens, None)
    stream = recording.stream
    for module, call in zip(modules, recording.calls, strict=True):
        stream = call.run(module, stream)
    return head(net, modules, arities, stream)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "opt", "falcon_alibi", "mamba", "qwen3_next"])
def test_the_arguments_are_those_of_a_real_forward(name: str, subject: Callable[..., Model]) -> None:
    model = subject(name)
    real: list[tuple[Tensor, list[Tensor]]] = []

    def note(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        found = list(leaves((given, options)))
        real.append((found[0].clone(), [leaf.clone() for leaf in found[1:]]))

    hooks = [b.register_forward_pre_hook(note, with_kwargs=True) for b in naive.stack_of(model.net)]
    naive.logits(model.net, TOKENS)
    for hook in hooks:
        hook.remove()
    recording = caught(model)
    assert torch.equal(recording.stream, real[0][0])
    for call, (_, others) in zip(recording.calls, real, strict=True):
        mine = list(leaves((call.args, call.kwargs)))
        assert len(mine) == len(others) and all(map(torch.equal, mine, others))


def test_no_block_and_no_head_runs(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    ran: list[nn.Module] = []
    for module in model.net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    caught(model)
    assert ran == []
    dense_logits(model.net, model.layout, TOKENS)
    assert len(ran) == 4 * 7 + 1


def test_rows_that_grow_with_the_batch_are_found_and_tiled(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, 8:] = False
    one, two = caught(model, TOKENS, mask), caught(model, TOKENS.repeat(2, 1), mask.repeat(2, 1))
    flags = one.rows_of(two)
    for call, twice, rows in zip(one.calls, two.calls, flags, strict=True):
        tiled = call.tiled(2, rows)
        pairs = zip(leaves((tiled.args, tiled.kwargs)), leaves((twice.args, twice.kwargs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert call.tiled(1, rows) is call
    assert any(any(rows) for rows in flags) and not all(all(rows) for rows in flags)


def test_the_stream_may_come_by_keyword() -> None:
    class Scale(nn.Module):
        def forward(self, factor: float, hidden: Tensor) -> tuple[Tensor, None]:
            return hidden * factor, None

    assert Call((3.0,), {}, "hidden").run(Scale(), torch.ones(2)).tolist() == [3.0, 3.0]


def test_blocks_out_of_order_are_refused(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    blocks = blocks_of(model.net, model.layout)
    with pytest.raises(LayoutError, match=r"once each and in order \(block \d\)$"):
        record(model.net, [blocks[1], blocks[0], *blocks[2:]], [0] * 4, TOKENS, None)
    with pytest.raises(LayoutError, match="called 4 of its 5 blocks"):
        record(model.net, [*blocks, nn.Linear(1, 1)], [0] * 5, TOKENS, None)
    assert all("forward" not in vars(block) for block in blocks)


def test_forwards_come_back_whatever_happens() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    own = vars(two)["forward"] = lambda stream: stream
    with pytest.raises(ZeroDivisionError), forwards([(one, lambda x: x * 0), (two, lambda x: x * 2), (one, abs)]):
        assert one(torch.full((2,), -1.0)).tolist() == [1.0, 1.0]
        assert two(torch.ones(2)).tolist() == [2.0, 2.0]
        raise ZeroDivisionError
    assert "forward" not in vars(one) and vars(two)["forward"] is own


def test_once_computes_once() -> None:
    layer, kept = nn.Linear(2, 2), {}  # type: ignore[var-annotated]
    forward = once(layer, "key", kept)
    a = forward(torch.ones(2))
    assert forward(torch.zeros(2)) is a and once(layer, "other", kept)(torch.zeros(2)) is not a


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "opt", "gpt2"])
def test_the_head_is_the_models_own(name: str, subject: Callable[..., Model]) -> None:
    model = subject(name)
    want = naive.logits(model.net, TOKENS)
    assert torch.equal(dense_logits(model.net, model.layout, TOKENS), want)
    last: list[Tensor] = []
    hook = naive.stack_of(model.net)[-1].register_forward_hook(lambda _, given, out: last.append(first(out)))
    naive.logits(model.net, TOKENS)
    hook.remove()
    blocks, arities = blocks_of(model.net, model.layout), [block.arity for block in model.layout.blocks]
    assert torch.equal(head(model.net, blocks, arities, last[0]), want)
    part = head(model.net, blocks, arities, last[0][1:, 3:7])
    torch.testing.assert_close(part, want[1:, 3:7], rtol=1e-5, atol=1e-5)
    assert all("forward" not in vars(block) for block in blocks)


def test_small_helpers() -> None:
    tree = {"a": (torch.ones(1), [torch.zeros(1), 3]), "b": None}
    assert [leaf.item() for leaf in leaves(tree)] == [1.0, 0.0]
    changed = change(tree, lambda leaf: leaf + 1)
    assert [leaf.item() for leaf in leaves(changed)] == [2.0, 1.0] and changed["a"][1][1] == 3
    assert [(s.start, s.stop) for s in slices(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    stream = torch.ones(1)
    assert answer(stream, 0) is stream and answer(stream, 3) == (stream, None, None)
    assert "attention_mask" not in inputs(TOKENS, torch.ones_like(TOKENS).bool())
    assert inputs(TOKENS, TOKENS > 50)["attention_mask"].dtype == torch.int64
