"""The real oracle: each set is measured once, a crash loses nothing that was measured, foreign memos are ignored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from depthprune import oracle as module
from depthprune.data import Data, digest
from depthprune.errors import CheckpointError, OptionError
from depthprune.model import Model, wrap
from depthprune.oracle import ModelOracle
from depthprune.plan import Plan
from depthprune.planning import select
from depthprune.scores import Losses, Scores, paired
from depthprune.surgery import drop
from depthprune.units import Unit, parse
from depthprune.variants import losses
from families import tiny


def text(seed: int = 0, *, rows: int = 4, length: int = 12, padded: bool = False) -> Data:
    tokens = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        for row in range(1, rows):
            mask[row, length - 2 * row :] = False
        tokens = tokens * mask
    return Data(tokens, mask, "random tokens", digest(tokens, mask), seed, ())


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(tiny("llama"), None, "tiny-llama")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[frozenset[Unit]]]:
    """The sets that reach the engine, call by call."""
    calls: list[list[frozenset[Unit]]] = []

    def counted(model: Model, data: Data, variants: Sequence[Iterable[Unit]], **options: Any) -> Losses:
        calls.append([frozenset(units) for units in variants])
        return losses(model, data, variants, **options)

    monkeypatch.setattr(module, "losses", counted)
    return calls


def sets(*names: str) -> list[frozenset[Unit]]:
    return [frozenset(parse(part.split())) for part in names]


def test_answers_are_those_of_the_engine_in_the_order_asked(model: Model) -> None:
    asked = sets("2", "", "1.mlp 3.self_attn", "2")
    for data in (text(), text(padded=True)):
        answer = ModelOracle(model, data).losses(asked)
        expected = losses(model, data, asked)
        np.testing.assert_allclose(answer.nll, expected.nll, rtol=1e-6)
        assert answer.tokens.tolist() == expected.tokens.tolist()
        assert answer.tokens.sum() == data.predicted


def test_each_set_is_measured_once(model: Model, measured: list[list[frozenset[Unit]]]) -> None:
    oracle = ModelOracle(model, text())
    first = oracle.losses(sets("", "1", "1", "0.mlp 1"))
    assert measured == [sets("", "1", "0.mlp 1")] and oracle.evaluations == 3
    second = oracle.losses(sets("1", "2.mlp", "1 0.mlp", ""))
    assert measured[1:] == [sets("2.mlp")] and oracle.evaluations == 4
    assert second.nll[[0, 2, 3]].tolist() == first.nll[[1, 3, 0]].tolist()
    oracle.losses(sets("2.mlp"))
    assert len(measured) == 2 and oracle.evaluations == 4


def test_scores_are_measured_once_for_its_units(model: Model, measured: list[list[frozenset[Unit]]]) -> None:
    units = parse(["1", "3", "2.mlp"])
    oracle = ModelOracle(model, text(), units=units)
    scores = oracle.scores()
    assert tuple(scores) == units and oracle.scores() is scores
    assert measured == [sets("", "1", "3", "2.mlp")]
    found = losses(model, text(), sets("", "1", "3", "2.mlp"))
    for row, unit in enumerate(units, start=1):
        rise, error = paired(found.nll[row], found.nll[0], found.tokens)
        assert scores[unit] == pytest.approx(rise, abs=1e-6)
        assert oracle.scored().errors[unit] == pytest.approx(error, abs=1e-6)
    assert oracle.scored().dense == pytest.approx(float(found.mean()[0]), abs=1e-6)
    assert oracle.asking("loss").scores() == scores and len(measured) == 1


def test_without_units_it_scores_all_there_are(model: Model) -> None:
    oracle = ModelOracle(model, text(), metric="cosine")
    assert tuple(oracle.scores()) == model.layout.units("any") and len(oracle.scores()) == 8
    assert oracle.evaluations == 0 and oracle.ledger is model.layout


def test_a_function_is_a_metric_and_a_wrong_name_is_none(model: Model) -> None:
    def backwards(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
        return Scores("backwards", {unit: -float(unit.block) for unit in units})

    oracle = ModelOracle(model, text(), metric=backwards, units=parse(["1", "3"]))
    assert oracle.metric == "backwards" and oracle.scored().ranked() == parse(["3", "1"])
    with pytest.raises(OptionError, match=r"unknown metric 'cosin'\. Did you mean 'cosine'"):
        ModelOracle(model, text(), metric="cosin")
    with pytest.raises(OptionError, match=r"unknown tokens='first' .*Available: all, last"):
        ModelOracle(model, text(), metric="cosine:tokens=first").scores()


# Windows


def block_streams(model: Model, data: Data) -> list[Tensor]:
    """What goes into each block, and what comes out of the last, by hooks on a plain forward."""
    streams: list[Tensor] = []
    layers = model.net.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: streams.append(args[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _module, _args, output: streams.append(output)))
    with torch.no_grad():
        model.net(data.tokens, attention_mask=data.mask.long())
    for hook in hooks:
        hook.remove()
    return streams


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("padded", [False, True])
def test_windows_of_blocks_are_distances_across_them(model: Model, tokens: str, padded: bool) -> None:
    data = text(padded=padded)
    streams = block_streams(model, data)
    windows = [parse(names) for names in (["0"], ["1", "2"], ["2", "3"], ["0", "1", "2", "3"], ["3"])]
    found = ModelOracle(model, data, metric=f"angular:tokens={tokens}").windows(windows)
    for window, value in zip(windows, found, strict=True):
        before, after = streams[window[0].block].double(), streams[window[-1].block + 1].double()
        angles = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1).arccos() / torch.pi
        rows = [row[mask][-1:] if tokens == "last" else row[mask] for row, mask in zip(angles, data.mask, strict=True)]
        assert value == pytest.approx(torch.cat(rows).mean().item(), rel=1e-5)


def test_windows_of_sublayers_are_sums(model: Model) -> None:
    oracle = ModelOracle(model, text(), metric="cosine")
    windows = [parse(["0.mlp"]), parse(["1.self_attn", "1.mlp", "2.self_attn"])]
    scores = oracle.scores()
    assert oracle.windows(windows) == pytest.approx([sum(scores[unit] for unit in window) for window in windows])
    blocks = ModelOracle(model, text(), metric="cosine", units=model.layout.units("block"))
    spans, sums = blocks.windows([parse(["1", "2"])])[0], sum(blocks.scores()[unit] for unit in parse(["1", "2"]))
    assert abs(spans - sums) > 1e-3  # so a sum in place of a span would be seen above


def test_windows_under_loss_are_rises(model: Model, measured: list[list[frozenset[Unit]]]) -> None:
    oracle = ModelOracle(model, text())
    windows = [parse(["1", "2"]), parse(["0.mlp"])]
    found = oracle.windows(windows)
    mean = losses(model, text(), sets("", "1 2", "0.mlp")).mean()
    assert found == pytest.approx([mean[1] - mean[0], mean[2] - mean[0]], abs=1e-6)
    assert measured == [sets("", "1 2", "0.mlp")] and oracle.evaluations == 3


# Memos


def test_a_memo_saves_every_measurement(model: Model, tmp_path: Path, measured: list[list[frozenset[Unit]]]) -> None:
    memo = tmp_path / "losses.jsonl"
    asked = sets("", "1", "0.mlp 2.self_attn")
    first = ModelOracle(model, text(), memo=memo)
    answer = first.losses(asked)
    lines = [json.loads(line) for line in memo.read_text().splitlines()]
    assert lines[0] == {
        "format": 2,
        "fingerprint": model.reference.fingerprint,
        "digest": text().digest,
        "dtype": "torch.float32",
    }
    assert [line["gone"] for line in lines[1:]] == [[], ["1"], ["0.mlp", "2.self_attn"]]
    second = ModelOracle(model, text(), memo=memo)
    assert second.evaluations == 0  # nothing was asked yet
    assert second.losses(asked).nll.tolist() == answer.nll.tolist()  # to the last bit
    assert second.evaluations == 3 and len(measured) == 1
    second.losses(sets("3"))
    assert measured[1:] == [sets("3")] and len(memo.read_text().splitlines()) == 5


def other_memos(model: Model) -> dict[str, tuple[Model, Data]]:
    return {"another model": (wrap(tiny("llama", seed=1), None, "other"), text()), "another text": (model, text(1))}


@pytest.mark.parametrize("case", ["another model", "another text"])
def test_a_memo_of_something_else_is_ignored(
    case: str, model: Model, tmp_path: Path, measured: list[list[frozenset[Unit]]]
) -> None:
    memo = tmp_path / "losses.jsonl"
    other, data = other_memos(model)[case]
    ModelOracle(other, data, memo=memo).losses(sets("", "1"))
    answer = ModelOracle(model, text(), memo=memo).losses(sets("", "1"))
    assert len(measured) == 2
    assert answer.nll.tolist() == losses(model, text(), sets("", "1")).nll.tolist()
    assert json.loads(memo.read_text().splitlines()[0])["fingerprint"] == model.reference.fingerprint
    assert len(memo.read_text().splitlines()) == 3


def test_a_memo_with_a_forged_header_would_give_wrong_answers(model: Model, tmp_path: Path) -> None:
    """The twin: were the header not compared, the losses of the other text would be taken for ours."""
    memo = tmp_path / "losses.jsonl"
    ModelOracle(model, text(1), memo=memo).losses(sets("", "1"))
    memo.write_text(memo.read_text().replace(text(1).digest, text().digest))
    wrong = ModelOracle(model, text(), memo=memo).losses(sets("", "1"))
    assert wrong.nll.tolist() != losses(model, text(), sets("", "1")).nll.tolist()


def test_a_search_resumes_wherever_it_was_cut(
    model: Model, tmp_path: Path, measured: list[list[frozenset[Unit]]]
) -> None:
    """Cut the memo anywhere, in a line too: the plan and its counts are the same, and nothing known is done again."""
    memo = tmp_path / "losses.jsonl"
    plan = select(model, "3 units", data=text(), memo=memo)
    whole = memo.read_bytes()
    total = sum(map(len, measured))
    assert plan.why["evaluations"] == total > 8 and len(whole.splitlines()) == total + 1
    for cut in [0, 1, 90, *range(200, len(whole), 501), len(whole) - 1, len(whole)]:
        memo.write_bytes(whole[:cut])
        kept = max(0, whole[:cut].count(b"\n") - 1) + (cut == len(whole) - 1)
        measured.clear()
        assert select(model, "3 units", data=text(), memo=memo) == plan
        assert sum(map(len, measured)) == total - kept
        assert memo.read_bytes() == whole


def test_junk_after_a_crash_is_dropped(model: Model, tmp_path: Path) -> None:
    """Some file systems fill what was not written with zeros, or with bytes that are no text."""
    memo = tmp_path / "losses.jsonl"
    ModelOracle(model, text(), memo=memo).losses(sets("", "1", "2"))
    whole = memo.read_bytes()
    lines = whole.splitlines(keepends=True)
    for junk in (b"\0" * 100, b"\xff\xfe\n", b"\n\n", b"17\n", b'{"gone": ["1"]}\n', b'{"gone": ["x"], "nll": [1]}\n'):
        memo.write_bytes(b"".join(lines[:-1]) + junk)
        oracle = ModelOracle(model, text(), memo=memo)
        oracle.losses(sets("", "1", "2"))
        assert oracle.evaluations == 3 and memo.read_bytes() == whole


# A model that computes no numbers


def damaged(name: str) -> Model:
    net = tiny("llama")
    with torch.no_grad():
        net.get_parameter(name).view(-1)[5] = torch.nan
    return wrap(net, None, "damaged")


@pytest.mark.parametrize("select_by", ["greedy", "lowest", "contiguous"])
def test_a_model_without_a_loss_is_refused_and_not_remembered(select_by: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        select(damaged("lm_head.weight"), "3 units", data=text(), select=select_by, memo=tmp_path / "losses.jsonl")
    assert str(caught.value).startswith("the loss is not a number for damaged on random tokens: its weights are ")
    assert not (tmp_path / "losses.jsonl").exists()


def test_a_unit_without_a_score_is_refused(model: Model) -> None:
    def half(oracle: ModelOracle, units: Sequence[Unit]) -> Scores:
        return Scores("half", {unit: np.nan if unit.sublayer == "mlp" else np.inf for unit in units})

    with pytest.raises(CheckpointError, match=r"^half of 0\.mlp is not a number for tiny-llama on random tokens: "):
        ModelOracle(model, text(), metric=half).scores()
    assert ModelOracle(model, text(), metric=half, units=parse(["0.self_attn"])).scores()  # infinite damage is damage


# What it tells


def test_progress_and_notes_are_passed_on(model: Model) -> None:
    seen: list[tuple[str, float, float]] = []
    notes: list[str] = []
    oracle = ModelOracle(model, text(), metric="cosine", show=lambda *told: seen.append(told), say=notes.append)
    oracle.losses(sets("", "1"))
    oracle.losses(sets("2"))
    oracle.scores()
    oracle.note("a line")
    assert list(dict.fromkeys(what for what, _, _ in seen)) == [
        "measuring 2 variants",
        "measuring 1 variant",
        "walking through the blocks",
    ]
    for what in {what for what, _, _ in seen}:
        done = [part for told, part, _ in seen if told == what]
        total = {whole for told, _, whole in seen if told == what}
        assert done == sorted(done) and len(total) == 1 and done[-1] == total.pop()
    assert notes == ["a line"]
    ModelOracle(model, text()).note("nobody listens")


# Some of the rows


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[frozenset[Unit]], int, str]]:
    """What reaches the engine: the sets, the number of rows, and the measure."""
    calls: list[tuple[list[frozenset[Unit]], int, str]] = []

    def counted(model: Model, data: Data, variants: Sequence[Iterable[Unit]], **options: Any) -> Losses:
        calls.append(([frozenset(units) for units in variants], data.sequences, options.get("measure", "loss")))
        return losses(model, data, variants, **options)

    monkeypatch.setattr(module, "losses", counted)
    return calls


Pieces = list[tuple[list[frozenset[Unit]], int, str]]


def test_only_the_rows_that_are_missing_are_measured(model: Model, pieces: Pieces) -> None:
    data = text(rows=8, padded=False)
    whole = losses(model, data, sets("", "1", "2"))
    oracle = ModelOracle(model, data)
    first = oracle.losses(sets("", "1"), rows=2)
    np.testing.assert_allclose(first.nll, whole.nll[:2, :2], rtol=1e-6)
    assert first.tokens.tolist() == whole.tokens[:2].tolist()
    second = oracle.losses(sets("2", "1", ""), rows=5)
    np.testing.assert_allclose(second.nll, whole.nll[[2, 1, 0], :5], rtol=1e-6)
    np.testing.assert_allclose(oracle.losses(sets("1", ""), rows=3).nll, whole.nll[[1, 0], :3], rtol=1e-6)
    np.testing.assert_allclose(oracle.losses(sets("", "1")).nll, whole.nll[:2], rtol=1e-6)
    np.testing.assert_allclose(oracle.losses(sets("1"), rows=99).nll, whole.nll[1:2], rtol=1e-6)
    assert pieces == [
        (sets("", "1"), 2, "loss"),
        (sets("2"), 5, "loss"),
        (sets("1", ""), 3, "loss"),
        (sets("", "1"), 3, "loss"),
    ]


def test_work_counts_parts_of_a_pass(model: Model) -> None:
    oracle = ModelOracle(model, text(rows=8))
    oracle.losses(sets("", "1"), rows=2)
    assert (oracle.evaluations, oracle.work) == (2, 0.5)
    oracle.losses(sets("1", "2"), rows=4)
    assert (oracle.evaluations, oracle.work) == (3, 0.25 + 0.5 + 0.5)
    oracle.losses(sets("1"))
    oracle.losses(sets("1"), rows=3)
    assert (oracle.evaluations, oracle.work) == (3, 0.25 + 1 + 0.5)
    oracle.sample(sets("3", "3", "1"), 5, "loss")
    assert (oracle.evaluations, oracle.work) == (4, 0.25 + 1 + 0.5 + 0.125)


def test_samples_are_of_one_sequence_and_are_not_kept(model: Model, pieces: Pieces) -> None:
    data = text(rows=4)
    oracle, whole = ModelOracle(model, data), losses(model, data, sets("1", "2.mlp", "1"))
    found = oracle.sample(sets("1", "2.mlp", "1"), 2, "loss")
    np.testing.assert_allclose(found.nll, whole.nll[:, 2:3], rtol=1e-6)
    oracle.losses(sets("1"))
    assert [(len(gone), rows) for gone, rows, _ in pieces] == [(3, 1), (1, 4)]


def test_what_one_metric_measures_another_knows(model: Model, pieces: Pieces) -> None:
    oracle = ModelOracle(model, text(), metric="cosine")
    other = oracle.asking("kl")
    asked = sets("", "1", "2")
    mine = oracle.losses(asked)
    assert oracle.measure == "loss" and other.measure == "kl" and oracle.metric == "cosine"
    assert other.losses(asked, measure="loss").nll.tolist() == mine.nll.tolist() and len(pieces) == 1
    far = other.losses(asked)  # another measure is another question
    assert [measure for _, _, measure in pieces] == ["loss", "kl"] and far.nll[1, 0] != mine.nll[1, 0]
    assert oracle.losses(asked, measure="kl").nll.tolist() == far.nll.tolist() and len(pieces) == 2
    assert oracle.evaluations == other.evaluations == 3  # of models, however often each was looked at
    assert oracle.streams("all") is oracle.asking("l2").streams("all")
    assert list(oracle.asking("l2").scores()) == list(oracle.scores()) != []


def test_all_sublayers_of_a_block_are_the_block(model: Model, measured: list[list[frozenset[Unit]]]) -> None:
    oracle = ModelOracle(model, text())
    found = oracle.losses(sets("1", "1.self_attn 1.mlp", "1 1.mlp"))
    assert measured == [sets("1")] and oracle.evaluations == 1
    assert found.nll[0].tolist() == found.nll[1].tolist() == found.nll[2].tolist()


def test_a_memo_with_some_rows_goes_on(model: Model, tmp_path: Path, pieces: Pieces) -> None:
    memo, data = tmp_path / "losses.jsonl", text(rows=6)
    first = ModelOracle(model, data, memo=memo)
    first.losses(sets("", "1"), rows=2)
    first.losses(sets("1"), rows=5)
    first.losses(sets("1"), measure="kl", rows=3)
    lines = [json.loads(line) for line in memo.read_text().splitlines()[1:]]
    assert [(line["measure"], len(line["nll"])) for line in lines] == [("loss", 2), ("loss", 2), ("loss", 3), ("kl", 3)]
    pieces.clear()
    again = ModelOracle(model, data, memo=memo)
    np.testing.assert_allclose(again.losses(sets("", "1")).nll, losses(model, data, sets("", "1")).nll, rtol=1e-6)
    kl = again.losses(sets("1"), measure="kl")
    np.testing.assert_allclose(kl.nll, losses(model, data, sets("1"), measure="kl").nll, rtol=1e-4)
    assert pieces == [(sets(""), 4, "loss"), (sets("1"), 1, "loss"), (sets("1"), 3, "kl")]
    pieces.clear()
    for cut in range(1, len(memo.read_bytes()), 97):  # cut anywhere: what is left is used, the rest measured again
        memo.write_bytes(memo.read_bytes()[:-cut])
        final = ModelOracle(model, data, memo=memo).losses(sets("", "1"), rows=4)
        np.testing.assert_allclose(final.nll, losses(model, data, sets("", "1")).nll[:, :4], rtol=1e-6)


def test_a_searched_race_resumes(model: Model, tmp_path: Path, pieces: Pieces) -> None:
    memo, data = tmp_path / "losses.jsonl", text(rows=8)
    plan = select(model, "3 units", data=data, select="greedy:race=4", memo=memo)
    total, whole = sum(len(gone) * rows for gone, rows, _ in pieces), memo.read_bytes()
    for cut in (len(whole), len(whole) // 2, 300):
        memo.write_bytes(whole[:cut])
        pieces.clear()
        assert select(model, "3 units", data=data, select="greedy:race=4", memo=memo) == plan
        assert sum(len(gone) * rows for gone, rows, _ in pieces) < total or cut == 300
    assert plan.why["work"] < plan.why["evaluations"]


# Scores once some units are gone


def renumbered(unit: Unit, gone: frozenset[Unit]) -> Unit:
    """The name of a unit in a model from which whole blocks were taken."""
    return Unit("", unit.block - sum(not other.sublayer and other.block < unit.block for other in gone), unit.sublayer)


@pytest.mark.parametrize("metric", ["cosine", "l2", "taylor", "magnitude", "loss", "kl", "logit_distance", "banzhaf"])
@pytest.mark.parametrize("names", ["1", "2.mlp", "1 2.self_attn", "0 3"])
def test_scores_without_units_are_those_of_the_dropped_model(metric: str, names: str, model: Model) -> None:
    data, gone = text(padded=True), sets(names)[0]
    oracle = ModelOracle(model, data, metric=metric)
    found = oracle.scored(gone)
    dropped = drop(model, Plan(model.reference, tuple(sorted(gone))))
    units = {unit: renumbered(unit, gone) for unit in found.values}
    assert set(units) == {u for u in model.layout.units("any") if u not in gone and u.whole not in gone}
    want = ModelOracle(dropped, data, metric=metric, units=tuple(units.values())).scored()
    for unit, other in units.items():
        assert found.values[unit] == pytest.approx(want.values[other], rel=1e-4, abs=1e-6), unit
        if unit in found.errors or other in want.errors:
            assert found.errors[unit] == pytest.approx(want.errors[other], rel=1e-3, abs=1e-6)
    dense = oracle.scores()
    assert any(abs(dense[unit] - found.values[unit]) > 1e-4 for unit in units) == (metric != "magnitude")


@pytest.mark.parametrize("metric", ["kl", "js", "logit_distance"])
def test_distances_from_a_thinner_model_are_not_taken_for_those_from_the_dense_one(
    metric: str, model: Model, tmp_path: Path
) -> None:
    """Scores once block 1 is gone ask how far the rest moves it; losses, how far from the dense model a plan is."""
    data, base, memo = text(), sets("1")[0], tmp_path / "losses.jsonl"
    both = sets("1", "1 2.mlp")
    oracle = ModelOracle(model, data, metric=metric, memo=memo)
    oracle.scores(base)
    fresh = losses(model, data, both, measure=metric)
    np.testing.assert_allclose(oracle.losses(both).nll, fresh.nll, rtol=1e-5)
    again = ModelOracle(model, data, metric=metric, memo=memo)
    np.testing.assert_allclose(again.losses(both).nll, fresh.nll, rtol=1e-5)
    assert again.scores(base) == oracle.scores(base)
    dropped = drop(model, Plan(model.reference, tuple(base)))
    far = losses(dropped, data, sets("1.mlp"), measure=metric).mean()[0]
    assert again.scores(base)[Unit.parse("2.mlp")] == pytest.approx(far, rel=1e-4)
    assert abs(far - fresh.mean()[1]) > 1e-3


def test_losses_without_a_base_are_not_measured_again(model: Model, measured: list[list[frozenset[Unit]]]) -> None:
    oracle = ModelOracle(model, text(), units=parse(["1", "2", "3"]))
    oracle.losses(sets("1", "1 2", "1 3"))
    oracle.scores(sets("1")[0])
    assert len(measured) == 1 and oracle.evaluations == 3
