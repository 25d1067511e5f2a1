"""Pruning what was pruned before: cutting twice is cutting once with both plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from depthprune.export import check_many, expect, export
from depthprune.model import Model, wrap
from depthprune.plan import Plan, Reference
from depthprune.surgery import drop, without
from depthprune.units import parse
from families import example, tiny

CUTS = {
    "sublayers of several blocks": (["0.attention"], ["3.mlp"]),
    "a block after a sublayer": (["0.attention"], ["1"]),
    "the rest of a block": (["1", "0.attention"], ["0.mlp"]),
    "the block with the tombstone": (["3.attention"], ["3.mlp", "1"]),
}


def units(model: Model, names: list[str]) -> tuple[str, ...]:
    """Units by kind, so that one table serves every family."""
    found = []
    for name in names:
        block, _, kind = name.partition(".")
        sublayers = [s.name for s in model.layout.blocks[int(block)].sublayers if s.kind == kind]
        found.append(f"{block}.{sublayers[0]}" if kind else block)
    return tuple(found)


def cut(model: Model, names: tuple[str, ...]) -> Model:
    smaller = drop(model, Plan(Reference(model.reference.id), parse(names)))
    return replace(smaller, reference=Reference("smaller"), plan=None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt2", "opt"])
def test_cutting_twice_is_cutting_once(family: str, tmp_path: Path) -> None:
    whole = wrap(tiny(family), None, family)
    tokens = example(whole.net)["input_ids"]
    folders = {}
    for number, (first, second) in enumerate(CUTS.values()):
        one, two = units(whole, first), units(whole, second)
        once = cut(whole, one)
        moved = sum(1 for name in one if "." not in name)  # one block before those of the second plan is gone
        two_there = tuple(f"{int(n.split('.')[0]) - (moved if int(n.split('.')[0]) > 1 else 0)}{n[1:]}" for n in two)
        twice = cut(once, two_there)
        with torch.no_grad(), without(whole, (*one, *two)):
            want = whole.net(input_ids=tokens, use_cache=False).logits
        with torch.no_grad():
            assert torch.equal(twice.net(input_ids=tokens, use_cache=False).logits, want)
        assert twice.parameters == whole.parameters - whole.layout.freed(parse((*one, *two)))
        folder = tmp_path / str(number)
        export(twice, folder)
        folders[folder] = expect(once, Plan(once.reference, parse(two_there)))
    for proofs in check_many(folders).values():
        assert all(proof.passed for proof in proofs), proofs
