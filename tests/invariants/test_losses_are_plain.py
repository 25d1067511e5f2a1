"""The engine's losses are those of plain forwards of really thinned models, for every unit of every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cases
import numpy as np
import numpy.typing as npt
import pytest
from torch import Tensor

import naive
from depthprune import variants as engine
from depthprune.data import Data
from depthprune.errors import LayoutError
from depthprune.model import Model, wrap
from depthprune.record import Call
from depthprune.units import Unit
from depthprune.variants import losses
from families import names, tiny

pytestmark = pytest.mark.filterwarnings("ignore:the blocks of .* cannot be called one by one")
Variant = tuple[Unit, ...]
NATS = 1e-5  # per token


def every(subject: Model) -> list[Variant]:
    """The dense model, each unit and each block alone, the plans of the sweeps, and a few larger sets."""
    single = [*subject.layout.units("any"), *subject.layout.units("block")]
    ends = [Unit("", block.index, s.name) for block in subject.layout.blocks[1:2] for s in block.sublayers[::2]]
    several = [*cases.plans(subject.layout).values(), single[1:4], single[:-2:2], ends]
    without = cases.NOT_WITHOUT.get(subject.reference.id, set())
    chosen: list[Variant] = [(), *((unit,) for unit in dict.fromkeys(single)), *map(tuple, several)]
    return [variant for variant in chosen if not {unit.block for unit in variant} & without]


def plainly(name: str, data: Data, variants: Sequence[Variant]) -> npt.NDArray[np.float64]:
    """The same from a model of its own, with modules swapped."""
    net = tiny(name)
    rows = []
    for variant in variants:
        with naive.removed(net, variant):
            rows.append(naive.loss(net, data.tokens, data.mask).numpy())
    return np.stack(rows)


def gap(subject: Model, data: Data, variants: Sequence[Variant], **options: Any) -> float:
    """The largest difference to the plain computation, in nats per token."""
    got = losses(subject, data, variants, **options)
    assert np.array_equal(got.tokens, (data.mask[:, 1:] & data.mask[:, :-1]).sum(1).numpy())
    want = plainly(subject.reference.id, data, variants)
    assert np.ptp(want.sum(1)) > 0.1 * data.predicted, "the variants must differ for this to mean anything"
    return float((np.abs(got.nll - want) / got.tokens).max())


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("name", names("decoder"))
def test_each_unit_and_some_sets(name: str, padded: bool) -> None:
    subject = cases.model(name)
    assert gap(subject, cases.text(padded=padded), every(subject)) < NATS
    assert engine._EXACT[subject.net][not padded] == (name not in cases.PLAIN_FORWARDS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "granitemoeshared", "falcon_alibi", "opt"])
def test_small_calls_shards_and_large_calls_agree(name: str) -> None:
    subject, data = cases.model(name), cases.text(padded=True, rows=5)
    chosen = every(subject)
    whole = losses(subject, data, chosen, tokens_per_call=1 << 16)
    small: tuple[dict[str, Any], ...] = ({"tokens_per_call": 1}, {"memory": 1}, {"tokens_per_call": 45, "memory": 1})
    for options in small:
        other = losses(subject, data, chosen, **options)
        np.testing.assert_allclose(other.nll, whole.nll, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "olmo2", "mistral"])
def test_equal_shapes_are_bit_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, data = cases.model(name), cases.text(rows=1)
    chosen = every(subject)
    mine = losses(subject, data, chosen, tokens_per_call=1)
    monkeypatch.setitem(engine._EXACT, subject.net, {True: False})
    plain = losses(subject, data, chosen, tokens_per_call=1)
    assert np.array_equal(mine.nll, plain.nll)
    np.testing.assert_allclose(plain.nll, plainly(name, data, chosen), rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"memory": 1}, {"tokens_per_call": 1}], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["engine", "plain"])
def test_progress_rises_to_the_total(exact: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    subject, data = cases.model("llama"), cases.text(rows=5)
    if not exact:
        monkeypatch.setitem(engine._EXACT, subject.net, {True: False})
    seen: list[tuple[float, float]] = []
    losses(subject, data, every(subject), progress=lambda done, total: seen.append((done, total)), **options)
    done = [one for one, _ in seen]
    assert done == sorted(done) and 0 < done[0] < done[-1]
    assert len({total for _, total in seen}) == 1
    assert done[-1] == seen[-1][1]


def entangled(name: str) -> Any:
    """A network whose third block adds what the first one made: its blocks cannot be called alone."""
    net = tiny(name)
    first, third = naive.stack_of(net)[0], naive.stack_of(net)[2]
    made: list[Tensor] = []
    own = third.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        times = (out if isinstance(out, Tensor) else out[0]).shape[0] / made[-1].shape[0]
        more = made[-1].repeat(max(1, int(times)), 1, 1)  # lenient: nothing fails, it is just wrong
        return out + more if isinstance(out, Tensor) else (out[0] + more, *out[1:])

    first.register_forward_hook(lambda _, given, out: made.append(out if isinstance(out, Tensor) else out[0]))
    third.forward = forward
    return net


@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_that_need_each_other_fall_back_to_plain_forwards(
    name: str, dense_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = wrap(entangled(name), None, name), cases.text()
    chosen: list[Variant] = [(), *((unit,) for unit in model.layout.units("any") if unit.block != 2)]
    if dense_first:  # what is found out once is kept: it must not be found out on too little
        with pytest.warns(UserWarning, match="one by one"):
            losses(model, data, [()])
    with pytest.warns(UserWarning, match=r"cannot be called one by one; using plain forwards"):
        got = losses(model, data, chosen)
    net, rows = entangled(name), []
    for variant in chosen:
        with naive.removed(net, variant):
            rows.append(naive.loss(net, data.tokens, data.mask).numpy())
    assert float((np.abs(got.nll - np.stack(rows)) / got.tokens).max()) < NATS
    assert engine._EXACT[model.net][True] is False
    # Twin: believing it exact gives wrong losses, and the comparison sees that.
    monkeypatch.setitem(engine._EXACT, model.net, {True: True})
    wrong = losses(model, data, chosen)
    assert float((np.abs(wrong.nll - np.stack(rows)) / got.tokens).max()) > 100 * NATS


def test_a_block_that_a_family_cannot_run_without_is_named() -> None:
    subject = cases.model("gemma3n_text")
    for index in sorted(cases.NOT_WITHOUT["gemma3n_text"]):
        with pytest.raises(LayoutError, match=rf"^this model does not run with units of block {index} dropped [^\n]*$"):
            losses(subject, cases.text(), [(Unit("", index),)])


def test_the_comparison_sees_a_wrong_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(module: Any, key: Any, kept: dict[Any, Any]) -> Any:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:  # forgets which sublayers before it are gone
            if key[0] not in kept:
                kept[key[0]] = own(*args, **kwargs)
            return kept[key[0]]

        return forward

    subject = cases.model("granitemoeshared")
    monkeypatch.setitem(engine._EXACT, subject.net, {True: True, False: True})
    assert gap(subject, cases.text(), every(subject)) < NATS
    monkeypatch.setattr(engine, "once", once)
    assert gap(subject, cases.text(), every(subject)) > 100 * NATS


def test_the_comparison_sees_a_wrong_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, data = cases.model("llama"), cases.text(padded=True)
    assert gap(subject, data, every(subject)) < NATS
    own = Call.tiled

    def tiled(self: Call, times: int, rows: Sequence[bool]) -> Call:  # other rows' masks for the second variant
        call = own(self, times, rows)
        call.kwargs["attention_mask"] = call.kwargs["attention_mask"].roll(1, 0)
        return call

    monkeypatch.setattr(Call, "tiled", tiled)
    assert gap(subject, data, every(subject)) > 100 * NATS
