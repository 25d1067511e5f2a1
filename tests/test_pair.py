"""Both models side by side: every stream is that of a plain forward, wherever it waits; and the steps of a plan."""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cuts import ADDS, cut, model_of, rows, see, streams_of
from depthprune.errors import DepthpruneError, PlanError
from depthprune.model import Model
from depthprune.plan import Plan
from depthprune.recover import pair as pairing
from depthprune.recover.pair import Pair, Side, Step, Store, batches, join, pair, steps
from depthprune.units import parse
from families import EXACT

IN_PLACE = "falcon"  # parallel, and its code adds in place, so its sublayers' outputs cannot be looked at afterwards
CUTS = {"a block": ["1"], "first and last": ["1.first", "2.last"], "all sorts": ["0.first", "1.last", "2"]}


def units(model: Model, sort: str) -> list[str]:
    found = []
    for text in CUTS[sort]:
        block, _, which = text.partition(".")
        names = [s.name for s in model.layout.blocks[int(block)].sublayers]
        found.append(f"{block}.{names[0 if which == 'first' else -1]}" if which else block)
    return found


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a batch."""
    monkeypatch.setattr(pairing, "TOKENS", {"cpu": 3 * 12})


def streams(both: Pair, side: Side) -> Tensor:
    return torch.cat([side.stream(batch) for batch in range(both.batches)])


def same(have: Tensor, want: Tensor, mask: Tensor) -> bool:
    """Whether two streams are equal at the tokens that count."""
    return bool((have - want)[mask].abs().max() <= EXACT * want[mask].abs().max())


CASES = [
    *((name, "all sorts", 5, 1) for name in ADDS),
    *((name, "first and last", 5, None) for name in ADDS),
    *((name, "a block", 0, None) for name in ("llama", "gpt_neox")),
]


@pytest.mark.parametrize(("name", "sort", "padding", "memory"), CASES)
def test_streams_are_those_of_a_plain_forward(name: str, sort: str, padding: int, memory: int | None) -> None:
    teacher = model_of(name)
    model = cut(teacher, *units(teacher, sort))
    fit, held = rows(7, 12, padding=padding), rows(4, 12, seed=1, padding=padding)
    text = join(fit, held)
    both = pair(teacher, model, fit, held, memory)
    assert [flag for _, flag in batches(both)] == [0, 0, 0, 1, 1] and both.held == 3 and both.batches == 5
    assert torch.equal(torch.cat(both.cut.masks), text.mask)
    try:
        for side, which in ((both.dense, teacher), (both.cut, model)):
            wanted, number = streams_of(which, name, text), 0
            for block in which.layout.blocks:
                for done in range(max(1, len(block.sublayers))):
                    assert (side.at, side.done) == (block.index, done)
                    if block.sublayers:  # else a shell: nothing is left in it
                        assert same(streams(both, side), wanted[number], text.mask)
                        ahead = torch.cat([side.ahead(batch)[0] for batch in range(both.batches)])
                        assert same(ahead, wanted[number + 1], text.mask)
                        idle = torch.cat([side.ahead(batch, idle=True)[0] for batch in range(both.batches)])
                        assert same(idle, wanted[number], text.mask)
                        number += 1
                    side.advance()
            assert number == len(wanted) - 1 and same(streams(both, side), wanted[-1], text.mask)
            assert not same(streams(both, side), wanted[-2], text.mask)  # the twin: one sublayer is seen
    finally:
        both.close()


OTHERS = (IN_PLACE, "falcon_alibi", "falcon_new", "gptj", "codegen", "bloom", "mamba", "jamba", "falcon_h1")


@pytest.mark.parametrize("name", OTHERS)
def test_the_last_stream_is_that_of_a_plain_forward(name: str) -> None:
    """Whatever a family's code does to its tensors in place, looking ahead twice changes nothing."""
    teacher = model_of(name)
    model = cut(teacher, "2")
    fit, held = rows(4, 12), rows(2, 12, seed=1)
    both = pair(teacher, model, fit, held)
    for side in (both.dense, both.cut):
        while side.at < len(side.model.layout.blocks):
            for _ in range(2):
                for batch in range(both.batches):
                    side.ahead(batch)
            side.advance()
        saw = see(side.model.net, join(fit, held))
        want = saw.out(f"{side.model.layout.path}.{len(side.model.layout.blocks) - 1}")
        assert same(streams(both, side), want, torch.ones_like(join(fit, held).mask))


def test_what_a_sublayer_is_given_is_its_input() -> None:
    teacher = model_of("granite")
    model = cut(teacher, "1.mlp")
    fit, held = rows(5, 12, padding=4), rows(3, 12, seed=1)
    text, both = join(fit, held), pair(teacher, cut(teacher, "1.mlp"), fit, held)
    for side, which in ((both.dense, teacher), (both.cut, model)):
        saw = see(which.net, text)
        while side.at < 4:
            sublayer = side.sublayer
            assert sublayer is not None
            given = torch.cat([side.given(batch) for batch in range(both.batches)])
            want = saw.into(f"model.layers.{side.at}.{sublayer.members[0]}")
            assert same(given, want, text.mask) and not same(given, streams(both, side), text.mask)
            side.advance()


@pytest.mark.parametrize("padding", [0, 4])
def test_the_weight_of_a_real_token_is_one_over_the_size_of_its_dense_stream(padding: int) -> None:
    teacher, text = model_of("llama"), rows(2, 12, padding=padding)
    both = pair(teacher, cut(teacher, "1"), text, rows(1, 12, seed=1))
    stream = see(teacher.net, text).into("model.layers.0")[text.mask]
    torch.testing.assert_close(both.weight(0), 1 / stream.pow(2).mean(-1, keepdim=True).sqrt())
    after = torch.randn(2, 12, stream.shape[-1])
    torch.testing.assert_close(both.missing(0, after), (stream - after[text.mask]) * both.weight(0))


def test_both_sides_can_wait_for_each_other() -> None:
    """``until`` counts steps through all blocks, ``reach`` blocks; neither goes back."""
    teacher = model_of("llama")
    both = pair(teacher, cut(teacher, "1"), rows(2, 12), rows(1, 12, seed=1))
    both.dense.until(3)
    assert (both.dense.position, both.dense.at, both.dense.done) == (3, 1, 1)
    both.dense.until(2)
    both.cut.reach(2)
    both.cut.reach(None)
    both.cut.reach(1)
    assert (both.dense.position, both.cut.at, both.cut.done, both.cut.position) == (3, 2, 0, 4)


def test_looking_leaves_no_trace() -> None:
    teacher = model_of("llama")
    model = cut(teacher, "1.mlp")
    before = [{k: v.clone() for k, v in m.net.state_dict().items()} for m in (teacher, model)]
    both = pair(teacher, model, rows(2, 12), rows(1, 12, seed=1))
    both.cut.until(3)
    both.cut.given(0)
    both.cut.ahead(0)
    for m, old in zip((teacher, model), before, strict=True):
        assert all(torch.equal(old[key], tensor) for key, tensor in m.net.state_dict().items())
        assert not any(part._forward_hooks or "forward" in vars(part) for part in m.net.modules())


# Where streams wait


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_streams_in_files_are_those_in_memory_and_go_when_they_are_no_longer_needed(room: Path) -> None:
    tensors = [torch.randn(3, 4), torch.randn(2).bfloat16(), torch.zeros(0, 5)]
    for memory, files in ((1000, 0), (999, 3)):
        store = Store(1000, torch.device("cpu"), memory)
        handles = [store.put(tensor) for tensor in tensors]
        for handle, tensor in zip(handles, tensors, strict=True):
            assert torch.equal(store.get(handle), tensor) and store.get(handle).dtype == tensor.dtype
        assert len(list(room.rglob("*.pt"))) == files
        store.drop(handles[0])
        store.drop(handles[0])
        assert len(list(room.rglob("*.pt"))) == max(0, files - 1)
        assert torch.equal(store.get(handles[1]), tensors[1])
        store.close()
        assert not list(room.iterdir())


def test_no_more_streams_wait_than_the_room_is_counted_for(room: Path) -> None:
    """Files hold ``SIDES * WAITING`` streams a batch at most, whichever sublayer both are at, and none are left."""
    teacher = model_of("falcon_h1")  # three sublayers a block: two answers wait
    both = pair(teacher, cut(teacher, "1.mamba", "2"), rows(4, 12), rows(2, 12, seed=1), 1)
    most = 0
    for side in (both.dense, both.cut):
        while side.at < len(side.model.layout.blocks):
            most = max(most, len(list(room.rglob("*.pt"))))
            side.advance()
    waiting = pairing.SIDES * (pairing.WAITING + 1) * both.batches
    assert 2 * both.batches < most <= waiting
    assert len(list(room.rglob("*.pt"))) == 2 * both.batches
    both.close()
    assert not list(room.iterdir())


@pytest.fixture
def full(room: Path) -> Iterator[Path]:
    """A disk with room for a few hundred bytes: what the system says is the same as where it is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield room
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("error")
def test_a_full_disk_is_one_line_and_leaves_nothing(full: Path) -> None:
    teacher = model_of("llama")
    with pytest.raises(DepthpruneError, match=r"^no room for streams in .*; use less text") as caught:
        pair(teacher, cut(teacher, "1"), rows(2, 12), rows(1, 12, seed=1), 1)
    assert type(caught.value) is DepthpruneError and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not list(full.iterdir())


def test_no_temporary_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DepthpruneError, match=r"no room for streams in .*gone.*: No such file"):
        Store(1000, torch.device("cpu"), 1)
    Store(1000, torch.device("cpu"), 1000)  # which needs none


# The steps of a plan


def listed(teacher: Model, model: Model) -> list[tuple[int, str, int | None]]:
    return [(step.block, step.name, step.at) for step in steps(teacher, model)]


A, M = "self_attn", "mlp"


def test_steps_of_blocks_and_sublayers() -> None:
    teacher = model_of("llama")
    assert listed(teacher, replace(teacher, plan=None)) == [(b, s, b) for b in range(4) for s in (A, M)]
    want = [(0, A, 0), (0, M, 0), (1, A, None), (1, M, None), (2, A, None), (2, M, 1), (3, A, 2), (3, M, None)]
    assert listed(teacher, cut(teacher, "1", "2.self_attn", "3.mlp")) == want
    assert steps(teacher, cut(teacher, "1"))[2] == Step(1, A, None)


def test_steps_of_blocks_without_sublayers() -> None:
    teacher = model_of("bloom")
    assert listed(teacher, cut(teacher, "1")) == [(0, "", 0), (1, "", None), (2, "", 1), (3, "", 2)]


def test_steps_past_shells() -> None:
    """Where a pattern of the configuration cannot be told without a block, it stays as a shell."""
    teacher = model_of("recurrent_gemma")
    model = cut(teacher, "1")
    assert len(model.layout.blocks) == len(teacher.layout.blocks)
    for block, _, at in listed(teacher, model):
        assert at == (None if block == 1 else block)


@pytest.mark.parametrize("form", ["bias", "lowrank:2"])
def test_steps_past_shells_that_hold_a_stand_in(form: str) -> None:
    teacher = model_of("llama")  # the first block has nothing before it to hold its bias
    model = cut(teacher, "0", "2", "3.mlp", form=form)
    shell = [0] if form == "bias" else [0, 2]
    kept = sorted({1, 3, *shell})
    want = [(b, s, None if b in (0, 2) or (b, s) == (3, M) else kept.index(b)) for b in range(4) for s in (A, M)]
    assert listed(teacher, model) == want and len(model.layout.blocks) == len(kept)


def replanned(model: Model, *dropped: str) -> Model:
    assert model.plan is not None
    return replace(model, plan=Plan(model.plan.model, parse(dropped)))


def test_a_model_that_is_not_what_its_plan_says_is_refused() -> None:
    teacher = model_of("llama")
    model = cut(teacher, "1", "2.self_attn")
    steps(teacher, model)
    wrong: list[tuple[Any, str]] = [
        (("1",), r"block 2: the plan leaves self_attn, mlp, the pruned model has mlp"),
        (("1", "2.mlp"), r"block 2: the plan leaves self_attn, the pruned model has mlp"),
        (("2.self_attn",), r"the plan leaves 4 blocks, the pruned model has 3"),
        (("1", "2.self_attn", "3"), r"the plan leaves 2 blocks, the pruned model has 3"),
        (("1", "2", "0.self_attn"), r"the plan leaves 2 blocks, the pruned model has 3"),
        (("1", "2.self_attn", "7"), "no unit 7"),
        (("1", "2.conv"), "block 2 has no droppable sublayer 'conv'"),
    ]
    for dropped, message in wrong:
        with pytest.raises(PlanError, match=message):
            steps(teacher, replanned(model, *dropped))
