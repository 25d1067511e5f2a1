"""Taylor importance equals its formula on plain backwards, and the backward by blocks keeps its promises."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import naive
from depthprune import demo
from depthprune.data import Data, calibrate, digest
from depthprune.errors import LayoutError, OptionError
from depthprune.layout import Layout
from depthprune.metrics import gradient
from depthprune.metrics.gradient import taylor
from depthprune.model import Model, load
from depthprune.oracle import ModelOracle
from depthprune.scores import Scores
from depthprune.surgery import without
from depthprune.units import Unit

FAMILIES = ("llama", "gemma2", "gpt2", "mixtral", "cohere", "jamba")
# Which of a block's norms go with which sublayer, by hand; a norm that both use goes with the block alone.
LLAMA = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
NORMS: dict[str, dict[str, str]] = {
    "llama": LLAMA,
    "mixtral": LLAMA,
    "demo": LLAMA,
    "gemma2": {
        "input_layernorm": "self_attn",
        "post_attention_layernorm": "self_attn",
        "pre_feedforward_layernorm": "mlp",
        "post_feedforward_layernorm": "mlp",
    },
    "gpt2": {"ln_1": "attn", "ln_2": "mlp"},
    "cohere": {},
    "jamba": {"input_layernorm": "mamba self_attn", "pre_ff_layernorm": "feed_forward"},
}


def text(padded: bool = False, rows: int = 3, length: int = 20) -> Data:
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        mask[1, 13:] = mask[2, 3:] = False
    return Data(tokens, mask, "random", digest(tokens, mask), 0, ())


def every(layout: Layout) -> tuple[Unit, ...]:
    return (*layout.units("block"), *(unit for unit in layout.units("any") if unit.sublayer))


def score(model: Model, data: Data, units: Sequence[Unit] = (), *, memory: int | None = None, **options: Any) -> Scores:
    oracle = ModelOracle(model, data, units=tuple(units) or every(model.layout), memory=memory)
    return taylor(oracle, oracle.units, **options)


def formula(
    net: Any, stack: nn.Module, data: Data, norms: dict[str, str], *, accumulate: str, tensors: str
) -> tuple[dict[str, float], dict[str, float]]:
    """One plain backward per sequence through the whole network, and products of ``.grad`` and ``.data``.

    Gives the score of every unit and the sum of every tensor, by names.
    """
    counted = data.mask[:, 1:] & data.mask[:, :-1]
    if data.scored is not None:
        counted &= data.scored[:, 1:]
    sums: dict[str, Tensor] = {}
    for row in range(len(data.tokens)):
        net.zero_grad()
        extra = {} if bool(data.mask[row].all()) else {"attention_mask": data.mask[row, None].long()}
        logits = net(input_ids=data.tokens[row, None], **extra, use_cache=False).logits[0, :-1]
        nll = F.cross_entropy(logits, data.tokens[row, 1:], reduction="none")
        (nll[counted[row]].sum() / counted.sum()).backward()
        for name, weight in stack.named_parameters():
            leaf = name.split(".")[-1]
            chosen = (weight.dim() > 1 or (tensors == "weights" and leaf == "weight")) and not leaf.endswith("bias")
            if chosen:
                grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                product = grad.double() * weight.data.double()
                sums[name] = sums.get(name, 0 * product) + (product.abs() if accumulate == "absolute" else product)
    net.zero_grad()
    parts = {name: float(product.abs().sum()) for name, product in sums.items()}
    units: dict[str, float] = {}
    for name, part in parts.items():
        block, child, *_ = name.split(".")
        units[block] = units.get(block, 0) + part
        for owner in norms.get(child, "").split() if "norm" in child or child.startswith("ln_") else [child]:
            units[f"{block}.{owner}"] = units.get(f"{block}.{owner}", 0) + part
    return units, parts


@pytest.mark.parametrize("tensors", ["matrices", "weights"])
@pytest.mark.parametrize("accumulate", ["absolute", "signed"])
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_is_the_formula(
    name: str, padded: bool, accumulate: str, tensors: str, subject: Callable[..., Model]
) -> None:
    model, data = subject(name), text(padded)
    got = score(model, data, accumulate=accumulate, tensors=tensors)
    stack, norms = naive.stack_of(model.net), NORMS[name]
    units, parts = formula(model.net, stack, data, norms, accumulate=accumulate, tensors=tensors)
    assert got.metric == "taylor" and got.data == data.describe() and len(got.values) >= 12
    for unit, value in got.values.items():
        assert value == pytest.approx(units[str(unit)], rel=1e-4), unit
        assert sum(got.detail[unit].values()) == pytest.approx(value)
        for tensor, part in got.detail[unit].items():
            assert part == pytest.approx(parts[f"{unit.block}.{tensor}"], rel=1e-4, abs=1e-9), tensor
    assert len({round(value, 7) for value in got.values.values()}) == len(got.values)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(demo.unpack(tmp_path_factory.mktemp("demo")))


@pytest.mark.parametrize("accumulate", ["absolute", "signed"])
def test_taylor_is_the_formula_on_real_weights(accumulate: str, real: Model) -> None:
    data = calibrate(str(demo.CALIBRATION), real.tokenizer, sequences=3, length=64)
    got = score(real, data, accumulate=accumulate, tensors="weights")
    units, _ = formula(real.net, real.net.model.layers, data, NORMS["demo"], accumulate=accumulate, tensors="weights")
    assert {str(unit) for unit in got.values} == set(units) and len(units) == 48
    for unit, value in got.values.items():
        assert value == pytest.approx(units[str(unit)], rel=1e-4)


def test_the_comparison_sees_what_differs(subject: Callable[..., Model]) -> None:
    """Absolute and signed, norms or none, counted or not: each is another number."""
    model, data = subject("llama"), text(True)
    first = score(model, data).values[Unit("", 1)]
    signed = score(model, data, accumulate="signed").values[Unit("", 1)]
    norms = score(model, data, tensors="weights").values[Unit("", 1)]
    whole = Data(data.tokens, torch.ones_like(data.mask), "all real", "", 0, ())
    assert signed < 0.95 * first and norms > 1.01 * first
    assert score(model, whole).values[Unit("", 1)] != pytest.approx(first, rel=1e-2)


def test_only_scored_tokens_of_a_task_count(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text(True)
    scored = torch.zeros_like(data.mask)
    scored[:, 2] = scored[0, 11:] = True
    task = Data(data.tokens, data.mask, "task", "", 0, (), scored)
    stack = naive.stack_of(model.net)
    units, _ = formula(model.net, stack, task, LLAMA, accumulate="absolute", tensors="matrices")
    for unit, value in score(model, task).values.items():
        assert value == pytest.approx(units[str(unit)], rel=1e-4)


def test_biases_never_count_and_experts_do(subject: Callable[..., Model]) -> None:
    for name, tensors in (("gpt_oss", "matrices"), ("gpt_oss", "weights"), ("llama_bias", "weights")):
        detail = score(subject(name), text(), tensors=tensors).detail[Unit("", 0)]
        assert not any("bias" in tensor for tensor in detail)
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= set(
        score(subject("gpt_oss"), text(), tensors="weights").detail[Unit("", 0, "mlp")]
    )


def test_units_need_not_all_be_asked_for(subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    whole, units = score(model, data).values, (Unit("", 2, "mlp"), Unit("", 1))
    assert dict(score(model, data, units).values) == {unit: whole[unit] for unit in units}


def test_plus_keeps_the_first_four_and_the_last_two(real: Model) -> None:
    data = calibrate(str(demo.CALIBRATION), real.tokenizer, sequences=1, length=16)
    plain, plus = score(real, data), score(real, data, plus=True)
    for unit, value in plus.values.items():
        assert value == (math.inf if unit.block in (0, 1, 2, 3, 14, 15) else plain.values[unit])
    assert plus.detail == plain.detail


def test_the_model_is_as_it_was(subject: Callable[..., Model]) -> None:
    model, data = subject("gpt2"), text(True)
    parameters = dict(model.net.named_parameters())
    parameters["transformer.h.1.mlp.c_fc.weight"].requires_grad_(False)
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in parameters.items()}

    def unchanged() -> bool:
        return all(
            torch.equal(weight, before[name][0]) and weight.requires_grad == before[name][1] and weight.grad is None
            for name, weight in model.net.named_parameters()
        ) and not any("forward" in vars(module) for module in model.net.modules())

    score(model, data)
    assert unchanged()
    for error in (KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError):
        for call in (1, 9, 14):
            calls = 0
            own = torch.autograd.grad

            def interrupted(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:  # noqa: B023
                    raise error  # noqa: B023
                return own(*args, **kwargs)  # noqa: B023

            with pytest.MonkeyPatch.context() as patch, pytest.raises((error, LayoutError)):
                patch.setattr(torch.autograd, "grad", interrupted)
                score(model, data)
            assert calls == call and unchanged()
    parameters["transformer.h.0.mlp.c_fc.weight"].requires_grad_(False)
    assert not unchanged()  # the check sees a flag that is lost


class Watch:
    """Counts the bytes of gradients alive, by overhearing ``torch.autograd.grad``."""

    def __init__(self) -> None:
        self.alive = self.most = 0
        self.own = torch.autograd.grad

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.own(*args, **kwargs)
        for tensor in found[1:]:  # the first is that of the stream
            if tensor is not None:
                self.alive += tensor.nbytes
                weakref.finalize(tensor, self.free, tensor.nbytes)
        self.most = max(self.most, self.alive)
        return found

    def free(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize("accumulate", ["absolute", "signed"])
def test_one_blocks_gradients_are_alive_at_a_time(
    accumulate: str, subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, watch = subject("llama"), Watch()
    monkeypatch.setattr(torch.autograd, "grad", watch)
    score(model, text(), accumulate=accumulate)
    block = sum(weight.nbytes for weight in naive.stack_of(model.net)[0].parameters() if weight.dim() > 1)
    assert watch.most == block and watch.alive == 0
    kept: list[Any] = []
    own = gradient._products
    monkeypatch.setattr(gradient, "_products", lambda *given: (kept.append(given), own(*given))[1])
    score(model, text(), accumulate=accumulate)
    assert watch.most >= 3 * block  # the watch sees gradients that are kept


def test_the_head_runs_in_chunks(subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = subject("gemma2"), text(rows=2, length=100)
    whole = score(model, data, accumulate="signed")
    widths: list[int] = []
    model.net.lm_head.register_forward_hook(lambda _, given, out: widths.append(out.shape[0] * out.shape[1]))
    monkeypatch.setattr(gradient.variants, "LOGITS", {"cpu": 1})
    chunked = score(model, data, accumulate="signed")
    assert widths[2:] == [64, 64, 64, 6]  # after the two of the proof
    assert dict(chunked.values) == pytest.approx(dict(whole.values), rel=1e-5)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many sequences went through all blocks, and through one block, at a time."""
    found: list[tuple[int, int]] = []
    own = gradient.room

    def heard(*args: Any, **kwargs: Any) -> tuple[int, int]:
        found.append(own(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(gradient, "room", heard)
    return found


def needed(model: Model, data: Data, **options: Any) -> int:
    """The least memory that is not refused, within a twentieth."""
    memory = 1 << 14
    while True:
        with suppress(OptionError):
            score(model, data, memory=memory, **options)
            return memory
        memory += memory // 20


def test_fewer_sequences_at_a_time_where_memory_is_short(
    subject: Callable[..., Model], shares: list[tuple[int, int]]
) -> None:
    model, data = subject("llama"), text(True, rows=7, length=24)
    for accumulate, alone in (("absolute", (1, 1)), ("signed", (7, 1))):
        least = needed(model, data, accumulate=accumulate)
        plenty = score(model, data, accumulate=accumulate)
        assert shares[-1] == (7, 1 if accumulate == "absolute" else 7)
        tight = score(model, data, accumulate=accumulate, memory=least)
        assert shares[-1] == alone
        assert dict(tight.values) == pytest.approx(dict(plenty.values), rel=1e-5)
        shares.clear()
        score(model, data, accumulate=accumulate, memory=int(least * 1.4))
        assert alone < shares[-1] < (7, 7)


def test_what_does_not_fit_is_refused_before_it_starts(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = subject("llama"), text()
    score(model, data)
    monkeypatch.setattr(gradient, "sweep", lambda *_, **__: pytest.fail("it started"))
    monkeypatch.setattr(gradient, "_free", lambda _: 10 << 10)
    with pytest.raises(OptionError, match=r"need about \d+ MiB beyond the weights, but 0 MiB are free; use shorter"):
        score(model, data)
    with pytest.raises(OptionError, match=r"for 3 sequences together, but 0 MiB are free; use fewer or shorter"):
        score(model, data, accumulate="signed")
    with pytest.raises(OptionError, match=r"but 0 MiB are allowed"):
        score(model, data, memory=5)


def test_the_estimate_of_activations_grows_with_the_text(
    subject: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on 31 tokens, it is close to what is measured on all 124, with and without squares of the length."""
    model = subject("llama")
    for kind, grown in (("sdpa", 4), ("eager", 5)):
        model.net.set_attn_implementation(kind)
        (s1, a1), (s2, a2) = (gradient._per_sequence(model, text(length=length)) for length in (31, 124))
        assert s2 > 3.5 * s1 and a2 >= 3.9 * a1 * grown / 4
        with monkeypatch.context() as patch:
            patch.setattr(gradient, "PROBE", 124)
            assert gradient._per_sequence(model, text(length=124)) == (s2, pytest.approx(a2, rel=0.3))


def test_muted_units_and_all_others(subject: Callable[..., Model]) -> None:
    """Scores taken while other units are muted are those of the model without them."""
    model, data = subject("llama"), text(True)
    with without(model, ["1", "2.mlp"]):
        got = score(model, data)
    with naive.removed(model.net, [Unit("", 1), Unit("", 2, "mlp")]):
        stack = naive.stack_of(model.net)
        units, _ = formula(model.net, stack, data, LLAMA, accumulate="absolute", tensors="matrices")
    for unit, value in got.values.items():
        muted = unit.block == 1 or unit == Unit("", 2, "mlp")
        assert value == (0 if muted else pytest.approx(units[str(unit)], rel=1e-4)), unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_close(dtype: torch.dtype, subject: Callable[..., Model]) -> None:
    model, data = subject("llama"), text()
    want = {how: score(model, data, accumulate=how) for how in ("absolute", "signed")}
    model.net.to(dtype)
    for how, scores in want.items():
        assert dict(score(model, data, accumulate=how).values) == pytest.approx(dict(scores.values), rel=0.1)


def test_what_is_not_a_number_comes_out(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    with torch.no_grad():
        model.net.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    assert math.isnan(score(model, text()).values[Unit("", 1)])


def test_blocks_that_share_more_than_the_stream_are_refused(subject: Callable[..., Model]) -> None:
    with pytest.raises(LayoutError, match=r"Gemma3nForCausalLM cannot be taken block by block: its stream has"):
        score(subject("gemma3n_text"), text())


def test_a_hidden_path_for_gradients_is_found_out(subject: Callable[..., Model]) -> None:
    """A forward that is right block by block, with a gradient that takes another way."""
    model = subject("llama")
    blocks: Any = naive.stack_of(model.net)
    hidden: list[Tensor] = []

    blocks[0].mlp.register_forward_hook(lambda module, given, out: hidden.__setitem__(slice(None), [out]))
    blocks[3].mlp.register_forward_hook(lambda module, given, out: out + hidden[0])
    with pytest.raises(LayoutError, match=r"its blocks hand each other more than the stream; use a metric without"):
        score(model, text())


def test_weights_without_gradients_are_refused(subject: Callable[..., Model]) -> None:
    model = subject("llama")
    down = model.net.model.layers[2].mlp.down_proj
    own = down.weight
    down.weight = nn.Parameter(own.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(OptionError, match=r"model\.layers\.2\.mlp\.down_proj\.weight is quantized \(torch\.int8\)"):
        gradient.check(model, text())
    down.weight = nn.Parameter(own.detach().to("meta"))
    with pytest.raises(OptionError, match="is not in memory"):
        gradient.check(model, text())


def test_wrong_options_are_refused(subject: Callable[..., Model]) -> None:
    with pytest.raises(OptionError, match=r"unknown accumulate='sum' for taylor\. Available: absolute, signed"):
        score(subject("llama"), text(), accumulate="sum")
    with pytest.raises(OptionError, match=r"unknown tensors='all'\. Available: matrices, weights"):
        score(subject("llama"), text(), tensors="all")


def test_progress_ends_at_its_end(subject: Callable[..., Model]) -> None:
    shown: list[tuple[str, float, float]] = []
    oracle = ModelOracle(subject("llama"), text(), metric="taylor", show=lambda *seen: shown.append(seen))
    oracle.scored()
    assert shown[-1] == ("taking gradients", 12.0, 12.0) and [done for _, done, _ in shown] == list(range(1, 13))
