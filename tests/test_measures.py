"""Distances from the dense model's predictions, and wrong answers, against their formulas on plain forwards.

The reference takes two plain forwards, one of a network with modules swapped, and writes the formula down with
probabilities in float64. It knows nothing of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import naive
from depthprune import demo
from depthprune import measures as module
from depthprune import variants as engine
from depthprune.data import Choices, Data, calibrate
from depthprune.errors import CheckpointError, OptionError
from depthprune.model import Model, load, wrap
from depthprune.oracle import ModelOracle
from depthprune.scores import Array, paired
from depthprune.units import Unit, parse
from depthprune.variants import losses
from families import tiny
from invariants import cases

DISTANCES = ("kl", "js", "logit_distance")
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox", "mixtral")
Variant = tuple[Unit, ...]


def formula(name: str, dense: Tensor, thin: Tensor, wanted: Tensor) -> Tensor:
    """One number for every position (…, T) from logits (…, T, V), written as in a textbook."""
    dense, thin = dense.double(), thin.double()
    p, q = dense.exp() / dense.exp().sum(-1, keepdim=True), thin.exp() / thin.exp().sum(-1, keepdim=True)
    middle = (p + q) / 2
    if name == "loss":
        return -q.gather(-1, wanted[..., None])[..., 0].log()
    if name == "kl":
        return (p * (p / q).log()).sum(-1)
    if name == "js":
        return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    return ((dense - thin) ** 2).sum(-1).sqrt()


def plainly(net: torch.nn.Module, data: Data, variants: Sequence[Variant], name: str) -> Array:
    """What each variant measures on each sequence (variants, sequences)."""
    counts = data.mask[:, 1:] & data.mask[:, :-1]
    if data.scored is not None:
        counts &= data.scored[:, 1:]
    dense = naive.logits(net, data.tokens, data.mask)[:, :-1]
    found = []
    for variant in variants:
        with naive.removed(net, variant):
            thin = naive.logits(net, data.tokens, data.mask)[:, :-1]
        each = formula(name, dense, thin, data.tokens[:, 1:])
        found.append(torch.where(counts, each, 0.0).sum(1).numpy())
    return np.stack(found)


def some(model: Model) -> list[Variant]:
    """The dense model, every unit alone, every block alone, and a few together."""
    single = [*model.layout.units("any"), *model.layout.units("block")]
    without = cases.NOT_WITHOUT.get(model.reference.id, set())
    several = [(single[0], single[-2]), tuple(single[1:4]), tuple(single[::3])]
    chosen: list[Variant] = [(), *((unit,) for unit in dict.fromkeys(single)), *several]
    return [variant for variant in chosen if not {unit.block for unit in variant} & without]


def answers(rows: int = 6, seed: int = 3) -> Data:
    """Rows of which only the last few real tokens count, as in a task; three to a question."""
    text = cases.text(rows=rows, padded=True, seed=seed)
    scored = torch.zeros_like(text.mask)
    for row, length in enumerate(text.mask.sum(1).tolist()):
        scored[row, max(1, length - 2) : length] = True
    item = torch.arange(rows) // 3
    right = torch.arange(rows) % 3 == item % 3
    return replace(text, scored=scored, choices=Choices(item, right))


# The engine


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_distances_are_those_of_plain_forwards(family: str, padded: bool) -> None:
    model, data = cases.model(family), cases.text(padded=padded)
    chosen, net = some(model), tiny(family)
    for name in DISTANCES:
        found, want = losses(model, data, chosen, measure=name), plainly(net, data, chosen, name)
        np.testing.assert_allclose(found.nll[1:], want[1:], rtol=1e-4)
        assert (np.abs(found.nll[0]) < 1e-4 * want[1:].mean()).all(), "the dense model is no distance from itself"
        assert found.tokens.tolist() == data.counted.sum(1).tolist()
        assert np.ptp(want[1:].sum(1)) > 0.5 * want[1:].sum(1).mean()  # or the comparison would be one of equals


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("family", sorted(cases.PLAIN_FORWARDS))
def test_distances_on_the_slow_path(family: str, padded: bool) -> None:
    model, data = cases.model(family), cases.text(padded=padded)
    chosen, net = some(model), tiny(family)
    for name in DISTANCES:
        with pytest.warns(UserWarning, match="using plain forwards"):
            found = losses(model, data, chosen, measure=name)
        np.testing.assert_allclose(found.nll[1:], plainly(net, data, chosen, name)[1:], rtol=1e-4)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(demo.unpack(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The naive side looks for stacks of four or six blocks; the real model has sixteen."""
    monkeypatch.setattr(naive, "stack_of", lambda net: net.model.layers)
    yield


@pytest.mark.usefixtures("layers")
def test_distances_of_the_real_model(real: Model) -> None:
    data = calibrate(str(demo.CALIBRATION), real.tokenizer, sequences=3, length=24)
    assert isinstance(data, Data)
    chosen = [(), *(tuple(parse(names)) for names in (["0"], ["3.mlp"], ["7.self_attn"], ["15"], ["2", "9.mlp"]))]
    for name in DISTANCES:
        found = losses(real, data, chosen, measure=name)
        np.testing.assert_allclose(found.nll[1:], plainly(real.net, data, chosen, name)[1:], rtol=1e-4)


@pytest.mark.parametrize("options", [{"memory": 1}, {"tokens_per_call": 1}, {"tokens_per_call": 45, "memory": 1}])
def test_the_dense_model_comes_along_in_every_shard(options: dict[str, int]) -> None:
    model, data = cases.model("llama"), cases.text(padded=True, rows=5)
    chosen = some(model)[::-1]  # the dense model last, so that its place in the answer is seen to be right
    for name in DISTANCES:
        whole, cut = (losses(model, data, chosen, measure=name, **each).nll for each in ({}, options))
        np.testing.assert_allclose(cut[:-1], whole[:-1], rtol=1e-5)
        np.testing.assert_allclose(cut[-1], 0, atol=1e-4)


def test_small_head_chunks_keep_their_own_dense_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = cases.model("gemma2"), cases.text(rows=6)
    chosen = some(model)[1:]
    whole = losses(model, data, chosen, measure="kl")
    monkeypatch.setattr(engine, "LOGITS", {"cpu": 1})
    np.testing.assert_allclose(losses(model, data, chosen, measure="kl").nll, whole.nll, rtol=1e-5)


def test_only_positions_that_count_are_measured() -> None:
    model, net = cases.model("llama"), tiny("llama")
    data = answers()
    for name in ("loss", *DISTANCES):
        found, want = losses(model, data, some(model), measure=name), plainly(net, data, some(model), name)
        np.testing.assert_allclose(found.nll[1:], want[1:], rtol=1e-4)
        assert found.tokens.tolist() == data.counted.sum(1).tolist() and found.tokens.max() == 2
        everything = losses(model, replace(data, scored=None), some(model), measure=name)
        assert (everything.nll[1:].sum(1) > 1.5 * found.nll[1:].sum(1)).all()


def test_another_measure_is_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown measure 'kll'\. Did you mean 'kl'"):
        losses(cases.model("llama"), cases.text(), [()], measure="kll")


# What is true of any logits


def test_bounds_of_the_distances() -> None:
    logits = 30 * torch.randn((2, 400, 50), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(400, dtype=torch.long)
    near = logits[0] + 1e-3 * logits[1]
    for z in (logits[1], near, -logits[0]):
        kl, js, far = (module.MEASURES[name](z, wanted, logits[0]) for name in DISTANCES)
        assert (kl >= -1e-5).all() and (far >= 0).all()
        assert (js >= -1e-6).all() and (js <= math.log(2) + 1e-6).all()
    assert module.MEASURES["js"](-logits[0], wanted, logits[0]).max() > 0.99 * math.log(2)  # the bound is reached
    for name in DISTANCES:
        measured = module.MEASURES[name]
        torch.testing.assert_close(measured(logits[0], wanted, logits[0]), torch.zeros(400), atol=1e-6, rtol=0)
    js = module.MEASURES["js"]
    torch.testing.assert_close(js(logits[0], wanted, logits[1]), js(logits[1], wanted, logits[0]))


@pytest.mark.parametrize("defect", ["swapped", "one term", "squared"])
def test_a_wrong_formula_is_seen(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = cases.model("llama"), cases.text()
    own = module.MEASURES.copy()
    name, wrong = {
        "swapped": ("kl", lambda z, w, dense: own["kl"](dense, w, z)),
        "one term": ("js", lambda z, w, dense: own["kl"](torch.logaddexp(z, dense), w, dense)),
        "squared": ("logit_distance", lambda z, w, dense: own["logit_distance"](z, w, dense) ** 2),
    }[defect]
    want = plainly(tiny("llama"), data, some(model), name)
    np.testing.assert_allclose(losses(model, data, some(model), measure=name).nll[1:], want[1:], rtol=1e-4)
    monkeypatch.setitem(module.MEASURES, name, wrong)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(losses(model, data, some(model), measure=name).nll[1:], want[1:], rtol=1e-4)


# As metrics


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_metrics_are_means_over_positions(family: str, name: str) -> None:
    model, data = cases.model(family), cases.text(padded=True)
    found = ModelOracle(model, data, metric=name).scored()
    units = model.layout.units("any")
    want = plainly(tiny(family), data, [(), *((unit,) for unit in units)], name)
    for row, unit in enumerate(units, start=1):
        mean, error = paired(want[row], want[0], data.counted.sum(1).numpy())
        assert found.values[unit] == pytest.approx(mean, rel=1e-4)
        assert found.errors[unit] == pytest.approx(error, rel=1e-3)
    assert found.dense == pytest.approx(0, abs=1e-5) and found.metric == name


def test_searches_go_by_the_distance() -> None:
    """``losses`` of an oracle under a distance measures that, in ``rows`` too."""
    model, data = cases.model("llama"), cases.text(rows=4)
    oracle = ModelOracle(model, data, metric="kl")
    units = parse(["1", "2.mlp"])
    want = plainly(tiny("llama"), data, [units[:1], units], "kl")
    asked = [frozenset(units[:1]), frozenset(units)]
    assert oracle.measure == "kl"
    np.testing.assert_allclose(oracle.losses(asked, rows=2).nll, want[:, :2], rtol=1e-4)
    np.testing.assert_allclose(oracle.losses(asked).nll, want, rtol=1e-4)
    assert ModelOracle(model, data, metric="cosine").measure == "loss"


# Wrong answers


def judged(net: torch.nn.Module, data: Data, variants: Sequence[Variant]) -> Array:
    """1 where a question is answered wrongly (variants, questions): another choice has the lowest summed loss."""
    assert data.choices is not None
    sums = plainly(net, data, variants, "loss")
    found = np.zeros((len(variants), int(data.choices.item.max()) + 1))
    for item in range(found.shape[1]):
        rows = [row for row in range(data.sequences) if data.choices.item[row] == item]
        for variant in range(len(variants)):
            best = min(rows, key=lambda row: sums[variant, row])
            found[variant, item] = not data.choices.right[best]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_the_share_of_wrong_answers(family: str) -> None:
    model, data, net = cases.model(family), answers(rows=36), tiny(family)
    chosen = some(model)
    want = judged(net, data, chosen)
    oracle = ModelOracle(model, data, metric="error")
    found = oracle.losses([frozenset(variant) for variant in chosen])
    assert found.nll.tolist() == want.tolist() and found.tokens.tolist() == [1.0] * 12
    assert oracle.sequences == 12 and 0 < want.mean() < 1
    assert len({tuple(row) for row in want.tolist()}) > 3  # units do change answers
    scores = oracle.scored()
    for unit in model.layout.units("any"):
        row = chosen.index((unit,))
        assert scores.values[unit] == pytest.approx((want[row] - want[0]).mean())
    assert scores.dense == pytest.approx(want[0].mean())


def test_error_on_some_questions_only() -> None:
    model, data = cases.model("llama"), answers(rows=36)
    chosen = some(model)
    want = judged(tiny("llama"), data, chosen)
    oracle = ModelOracle(model, data, metric="error")
    asked = [frozenset(variant) for variant in chosen]
    assert oracle.losses(asked, rows=5).nll.tolist() == want[:, :5].tolist()
    assert oracle.losses(asked).nll.tolist() == want.tolist()


def test_a_unit_that_moves_tokens_to_the_right_answer_is_seen(real: Model, tmp_path: Path) -> None:
    """On the real model, with a task read from a file: dense it prefers English to noise."""
    choices = '["and the old man sat down by the fire", "zq zq xx vv qq jj", "fire fire the of and of of"]'
    lines = [f'{{"prompt": "It was late, and {who} came home", "choices": {choices}, "answer": 0}}' for who in "ABCD"]
    (tmp_path / "task.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = calibrate(f"task:{tmp_path / 'task.jsonl'}", real.tokenizer, sequences=4, length=64)
    assert isinstance(data, Data)
    net = real.net
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive, "stack_of", lambda net: net.model.layers)
        chosen = [(), parse(["0"]), parse(["1", "2", "3", "4", "5", "6"]), parse(["15"])]
        want = judged(net, data, chosen)
    found = ModelOracle(real, data, metric="error").losses([frozenset(variant) for variant in chosen])
    assert found.nll.tolist() == want.tolist() and found.nll[0].tolist() == [0, 0, 0, 0]


def test_error_needs_choices() -> None:
    for data in (cases.text(), replace(answers(), choices=None)):
        with pytest.raises(OptionError, match=r"^the metric error needs questions with choices; random has none$"):
            ModelOracle(cases.model("llama"), data, metric="error").scores()


def test_tied_answers_and_losses_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from depthprune import oracle as asked

    model, data = cases.model("llama"), answers(rows=6)
    planned: list[list[float]] = []

    def told(model: Model, data: Data, gone: Sequence[frozenset[Unit]], **_: object) -> object:
        return replace(own(model, data, gone), nll=np.array([planned[len(units)] for units in gone]))

    own: Callable[..., object] = losses
    monkeypatch.setattr(asked, "losses", told)
    ties, broken = [1.0, 1.0, 2.0, 3.0, 1.0, 1.0], [1.0, 2.0, np.nan, 3.0, 1.0, 1.0]
    planned[:] = [ties, broken]
    oracle = ModelOracle(model, data, metric="error", units=parse(["1"]))
    found = oracle.losses([frozenset(), frozenset(parse(["1"]))])
    assert found.nll[0].tolist() == [0, 0]  # the right answer wins ties
    assert np.isnan(found.nll[1, 0]) and found.nll[1, 1] == 0
    assert oracle.scores() == {Unit("", 1): math.inf}  # a unit without which nothing can be computed must stay
    planned[0] = broken
    with pytest.raises(CheckpointError, match="the loss is not a number"):
        ModelOracle(model, data, metric="error").losses([frozenset()])


def test_dense_errors_of_a_damaged_model_are_refused() -> None:
    net = tiny("llama")
    with torch.no_grad():
        net.get_parameter("lm_head.weight").view(-1)[5] = torch.nan
    for metric in (*DISTANCES, "error"):
        with pytest.raises(CheckpointError, match="is not a number"):
            ModelOracle(wrap(net, None, "damaged"), answers(), metric=metric).scores()
