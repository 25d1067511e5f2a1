"""With all its proven sublayers gone, a block is the identity: bit by bit, on every family."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn

import naive
from depthprune.discover import discover
from depthprune.errors import LayoutError
from depthprune.model import Model
from families import names, tiny

ONE_STACK = names("decoder") + names("encoder")


@torch.no_grad()
def changes(subject: Model) -> dict[int, float]:
    """How far each block with proven sublayers moves its stream when all of them are swapped for zeros."""
    blocks = naive.stack_of(subject.net)
    proven = {block.index for block in subject.layout.blocks if block.sublayers}
    seen: dict[int, float] = {}

    def watch(index: int) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], options: dict[str, Any], answer: Any) -> None:
            before = next(value for value in (*given, *options.values()) if isinstance(value, Tensor))
            after = answer if isinstance(answer, Tensor) else answer[0]
            seen[index] = 0.0 if torch.equal(before, after) else float((before - after).abs().max())

        return hook

    with naive.removed(subject.net, [unit for unit in subject.layout.units("any") if unit.sublayer]) as net:
        hooks = [blocks[index].register_forward_hook(watch(index), with_kwargs=True) for index in proven]
        naive.logits(net, cases.text().tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ONE_STACK)
def test_a_block_without_its_sublayers_is_the_identity(name: str) -> None:
    subject = cases.model(name)
    proven = [block.index for block in subject.layout.blocks if block.sublayers]
    assert changes(subject) == dict.fromkeys(proven, 0.0)
    if name not in cases.NO_SUBLAYERS:
        assert proven == list(range(len(subject.layout.blocks)))
        assert not any(block.reason for block in subject.layout.blocks)
    else:
        reasons = [block.reason for block in subject.layout.blocks if not block.sublayers]
        assert reasons and all(cases.NO_SUBLAYERS[name] in reason and "\n" not in reason for reason in reasons)
        assert bool(proven) == (name in cases.SOME_SUBLAYERS)


def test_a_reason_names_the_part_of_the_block() -> None:
    for name in sorted(set(cases.NO_SUBLAYERS) & set(ONE_STACK)):
        subject = cases.model(name)
        for block, module in zip(subject.layout.blocks, naive.stack_of(subject.net), strict=True):
            parts = {part for part, _ in module.named_children()}
            assert not block.reason or any(part in block.reason for part in parts), (name, block.reason)


def test_most_families_have_proven_sublayers() -> None:
    assert len([name for name in names("decoder") if name not in cases.NO_SUBLAYERS]) >= 70


@pytest.mark.parametrize("name", names("encoder-decoder"))
def test_two_stacks_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(LayoutError, match=r"^encoder-decoder models are not supported yet[^\n]*$"):
        discover(tiny(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba"])
def test_the_sweep_sees_a_block_that_adds_a_little(name: str) -> None:
    subject = cases.model(name)
    block: Any = naive.stack_of(subject.net)[2]
    own = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        return out + 1e-3 if isinstance(out, Tensor) else (out[0] + 1e-3, *out[1:])

    block.forward = forward
    assert changes(subject)[2] == pytest.approx(1e-3, rel=0.01)
    found = discover(subject.net)
    assert [len(b.sublayers) > 0 for b in found.blocks] == [True, True, False, True]
    assert "still changes the stream by 0.001" in found.blocks[2].reason
