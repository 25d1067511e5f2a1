"""Learned gates equal a plain implementation: hooks, one backward through the whole network, and torch's Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import naive
from depthprune import demo
from depthprune.data import Data, calibrate, digest
from depthprune.errors import LayoutError, OptionError
from depthprune.metrics import gates as learned
from depthprune.metrics.gates import gates
from depthprune.model import Model, load
from depthprune.oracle import ModelOracle
from depthprune.scores import Scores
from depthprune.surgery import without
from depthprune.units import Unit

# What has to be scaled to scale a sublayer's update, by hand, where it is not the sublayer.
AFTER = {
    "gemma2": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "olmo2": {"self_attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
    "opt": {"fc1+fc2": "fc2"},
}


def text(padded: bool = False, rows: int = 3, length: int = 20) -> Data:
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[1, 13:] = False
        mask[2, 3:] = False
    return Data(tokens, mask, "random", digest(tokens, mask), 3, ())


def score(model: Model, data: Data, units: Sequence[Unit], *, memory: int | None = None, **options: Any) -> Scores:
    return gates(ModelOracle(model, data, units=units, memory=memory), units, **options)


@contextmanager
def hooked(stack: nn.ModuleList, names: Sequence[str], after: dict[str, str], values: Sequence[Any]) -> Iterator[None]:
    """Gates by forward hooks: on a whole block between what goes in and what comes out, else on a child's output."""

    def scale(gate: Any) -> Any:
        def hook(_: nn.Module, given: Any, out: Any) -> Any:
            return (out[0] * gate, *out[1:]) if isinstance(out, tuple) else out * gate

        return hook

    def mix(gate: Any) -> Any:
        def hook(_: nn.Module, given: Any, out: Any) -> Any:
            end = out[0] if isinstance(out, tuple) else out
            mixed = (1 - gate) * given[0] + gate * end
            return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

        return hook

    hooks = []
    for name, gate in zip(names, values, strict=True):
        index, _, child = name.partition(".")
        block = stack[int(index)]
        place = block.get_submodule(after.get(child, child)) if child else block
        hooks.append(place.register_forward_hook(scale(gate) if child else mix(gate)))
    yield
    for hook in hooks:
        hook.remove()


def mean_loss(net: Any, data: Data, rows: Sequence[int]) -> Tensor:
    chosen = torch.tensor(list(rows))
    tokens, mask = data.tokens[chosen], data.mask[chosen]
    extra = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    logits = net(input_ids=tokens, **extra, use_cache=False).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = mask[:, 1:] & mask[:, :-1]
    return (nll * counted).sum() / counted.sum()


def plainly(
    model: Model,
    stack: Any,
    data: Data,
    units: Sequence[Unit],
    order: Sequence[Unit],
    *,
    keep: float,
    steps: int,
    rate: float,
    batch: int,
    temperature: float,
) -> list[float]:
    """The docstring of ``gates``, written out on the whole network at once. ``order`` ranks the units by Taylor."""
    names, after = [str(unit) for unit in units], AFTER.get(model.reference.id, {})
    sizes = torch.tensor([float(model.layout.freed((unit,))) for unit in units], dtype=torch.float64)
    weight = sizes / sizes.sum()
    begin = [keep + (order.index(unit) / (len(units) - 1) - 0.5) * min(keep, 1 - keep) for unit in units]
    a = torch.tensor([math.log(g / (1 - g)) for g in begin], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([a], lr=rate)
    generator, dice = (torch.Generator().manual_seed(data.seed) for _ in range(2))
    queue: list[int] = []
    for parameter in model.net.parameters():
        parameter.requires_grad_(False)
    for _ in range(steps):
        while len(queue) < batch:
            queue += torch.randperm(len(data.tokens), generator=generator).tolist()
        rows, queue = queue[:batch], queue[batch:]
        even = torch.rand(len(units), generator=dice, dtype=torch.float64)
        g = ((a + (even / (1 - even)).log()) / temperature).sigmoid()
        with hooked(stack, names, after, list(g)):
            total = mean_loss(model.net, data, rows)
        total = total + 100 * ((weight * a.sigmoid()).sum() - keep) ** 2
        adam.zero_grad()
        total.backward()
        adam.step()
    for parameter in model.net.parameters():
        parameter.requires_grad_(True)
    return [float(value) for value in a.sigmoid().detach()]


def compare(model: Model, stack: Any, data: Data, units: Sequence[Unit], **options: Any) -> Scores:
    order = ModelOracle(model, data, metric="taylor", units=units).scored().ranked()
    want = plainly(model, stack, data, units, order, **options)
    got = score(model, data, units, **options)
    assert got.metric == "gates" and tuple(got.values) == tuple(units)
    assert list(got.values.values()) == pytest.approx(want, rel=1e-4)
    return got


OPTIONS: dict[str, Any] = {"keep": 0.7, "steps": 6, "rate": 0.2, "batch": 3, "temperature": 0.5}


@pytest.mark.parametrize("kind", ["any", "block"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "opt", "mixtral", "cohere", "jamba"])
def test_gates_are_a_plain_descent(name: str, padded: bool, kind: str, subject: Callable[..., Model]) -> None:
    model = subject(name)
    got = compare(model, naive.stack_of(model.net), text(padded), model.layout.units(kind), **OPTIONS)
    values = sorted(got.values.values())
    assert 0 < values[0] < values[-1] < 1


def test_batches_are_shuffles_under_the_seed(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text(rows=5)
    units = model.layout.units("attention")
    got = compare(model, naive.stack_of(model.net), data, units, **(OPTIONS | {"batch": 2}))
    assert score(model, data, units, **(OPTIONS | {"batch": 2})) == got
    other = Data(data.tokens, data.mask, "random", data.digest, 4, ())
    assert score(model, other, units, **(OPTIONS | {"batch": 2})).values != got.values


def test_gates_on_real_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load(demo.unpack(tmp_path_factory.mktemp("demo")))
    data = calibrate(str(demo.CALIBRATION), model.tokenizer, sequences=3, length=48)
    got = compare(model, model.net.model.layers, data, model.layout.units("any"), **(OPTIONS | {"steps": 3}))
    assert max(got.values.values()) - min(got.values.values()) > 0.2


def test_a_longer_descent_keeps_the_budget_and_finds_what_is_missed_least(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    units = model.layout.units("any")
    scores = score(model, data, units, keep=0.6, steps=60, rate=0.2)
    size = {unit: model.layout.freed((unit,)) for unit in units}
    mean = sum(size[unit] * value for unit, value in scores.values.items()) / sum(size.values())
    assert mean == pytest.approx(0.6, abs=0.05)

    def loss(gone: Sequence[Unit]) -> float:
        with naive.removed(model.net, gone):
            return float(naive.loss(model.net, data.tokens, data.mask).sum()) / data.predicted

    ranked = scores.ranked()
    assert loss(ranked[:3]) < loss(ranked[-3:]) - 0.1


def test_memory_bounds_how_many_sequences_run_together(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = subject("llama"), text(True)
    units = model.layout.units("any")
    taylor = ModelOracle(model, data, metric="taylor", units=units).scored()
    together: list[tuple[int, int]] = []
    own = learned.sweep
    monkeypatch.setattr(learned, "sweep", lambda *given, **named: (together.append(given[4]), own(*given, **named))[1])
    plenty = score(model, data, units, **OPTIONS)
    assert set(together) == {(3, 3)}
    monkeypatch.setattr(learned, "taylor", lambda *given: taylor)  # it needs more room than the gates
    least = next(memory for memory in range(1 << 14, 1 << 24, 1 << 13) if _fits(model, data, units, memory))
    together.clear()
    tight = score(model, data, units, memory=least, **OPTIONS)
    assert set(together) == {(1, 1)}
    assert dict(tight.values) == pytest.approx(dict(plenty.values), rel=1e-5)
    with pytest.raises(OptionError, match="gradients block by block need about"):
        score(model, data, units, memory=1000, **OPTIONS)


def _fits(model: Model, data: Data, units: Sequence[Unit], memory: int) -> bool:
    try:
        score(model, data, units, memory=memory, steps=1)
    except OptionError:
        return False
    return True


def test_the_model_is_as_it_was(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = subject("gemma2"), text()
    before = {name: weight.clone() for name, weight in model.net.named_parameters()}

    def unchanged() -> bool:
        return all(
            torch.equal(weight, before[name]) and weight.requires_grad and weight.grad is None
            for name, weight in model.net.named_parameters()
        ) and not any("forward" in vars(module) for module in model.net.modules())

    score(model, data, model.layout.units("any"), **OPTIONS)
    assert unchanged()
    calls: list[int] = []
    own = torch.autograd.grad

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(model, data, model.layout.units("any"), **OPTIONS)
    assert unchanged()


def test_gates_while_other_units_are_muted(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    units = [unit for unit in model.layout.units("any") if unit not in (Unit("", 1, "mlp"), Unit("", 2, "self_attn"))]
    with without(model, ["1.mlp", "2.self_attn"]):
        order = ModelOracle(model, data, metric="taylor", units=units).scored().ranked()
        got = score(model, data, units, **OPTIONS)
    with naive.removed(model.net, [Unit("", 1, "mlp"), Unit("", 2, "self_attn")]):
        want = plainly(model, naive.stack_of(model.net), data, units, order, **OPTIONS)
    assert list(got.values.values()) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "opt", "granite", "cohere", "mixtral"])
def test_what_scales_an_update_is_found(name: str, dtype: torch.dtype, subject: Callable[..., Model]) -> None:
    model = subject(name)
    model.net.to(dtype)
    for unit in model.layout.units("any"):
        block = naive.stack_of(model.net)[unit.block]
        expected = AFTER.get(name, {}).get(unit.sublayer, unit.sublayer)
        assert learned._scaling(model, unit) is block.get_submodule(expected)


def test_the_comparison_sees_a_gate_in_the_wrong_place(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject("gemma2")

    def itself(model: Model, unit: Unit) -> nn.Module:
        return naive.stack_of(model.net)[unit.block].get_submodule(unit.sublayer)

    monkeypatch.setattr(learned, "_scaling", itself)
    with pytest.raises(AssertionError, match="comparison failed"):
        compare(model, naive.stack_of(model.net), text(), model.layout.units("any"), **OPTIONS)


def test_a_sublayer_that_nothing_scales_is_refused(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    block: Any = naive.stack_of(model.net)[2]
    own = block.forward

    def forward(
        hidden_states: Tensor, **kwargs: Any
    ) -> Tensor:  # half an output takes the stream as far as a whole one
        after: Tensor = own(hidden_states, **kwargs)
        return hidden_states + torch.sign(after - hidden_states)

    block.forward = forward
    with pytest.raises(LayoutError, match=r"no gate can be put on 2\.mlp: .* the output of mlp, post_attention"):
        learned._scaling(model, Unit("", 2, "mlp"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 1.0}, "keep between 0 and 1"),
        ({"keep": math.nan}, "keep between 0 and 1"),
        ({"steps": 0}, "steps and batch of at least 1"),
        ({"batch": 0}, "steps and batch of at least 1"),
        ({"rate": 0.0}, "a finite rate and temperature above 0"),
        ({"rate": float("inf")}, "a finite rate and temperature above 0"),
        ({"temperature": 0.0}, "a finite rate and temperature above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str, subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with pytest.raises(OptionError, match=says):
        score(model, text(), model.layout.units("any"), **options)


def test_a_block_and_its_own_sublayers_are_refused(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with pytest.raises(OptionError, match=r"of its own sublayers multiply: ask for 1 or 1\.mlp"):
        score(model, text(), [Unit("", 0, "mlp"), Unit("", 1), Unit("", 1, "mlp")])
    mixed = [Unit("", 0, "mlp"), Unit("", 1), Unit("", 2, "self_attn")]
    compare(model, naive.stack_of(model.net), text(), mixed, **OPTIONS)


def test_progress_is_shown(subject: Callable[..., Model]) -> None:
    shown: list[tuple[str, float, float]] = []
    model = subject("llama")
    oracle = ModelOracle(
        model, text(), metric="gates:steps=3", units=model.layout.units("block"), show=lambda *seen: shown.append(seen)
    )
    oracle.scored()
    assert [seen for seen in shown if seen[0] == "learning gates"] == [
        ("learning gates", n, 3.0) for n in (1.0, 2.0, 3.0)
    ]
