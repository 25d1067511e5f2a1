"""Several skills at once: losses, scores and choices are those of the weighted mean over the parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthprune import oracle as asked
from depthprune.data import Choices, Data, Mixture, digest
from depthprune.errors import OptionError
from depthprune.mixed import MixedOracle, oracle
from depthprune.model import Model
from depthprune.oracle import ModelOracle
from depthprune.planning import candidates, score, select
from depthprune.scores import Losses
from depthprune.units import Unit, parse
from depthprune.variants import losses
from invariants import cases

WEIGHTS = (0.5, 0.2, 0.3)


@pytest.fixture(scope="module")
def model() -> Model:
    return cases.model("llama")


def task(seed: int = 7) -> Data:
    """Four questions with two answers each, of which the last four tokens count."""
    data = cases.text(rows=8, length=10, seed=seed)
    scored = data.mask.clone()
    scored[:, :6] = False
    choices = Choices(torch.arange(8) // 2, torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool())
    return replace(data, scored=scored, choices=choices, digest=digest(data.tokens, data.mask, scored, choices))


def mixture() -> Mixture:
    return Mixture(
        (cases.text(rows=6, seed=1), cases.text(rows=5, length=14, padded=True, seed=2), task()), WEIGHTS, "m"
    )


def sets(*names: str) -> list[frozenset[Unit]]:
    return [frozenset(parse(part.split())) for part in names]


ASKED = sets("", "1", "0.mlp", "2.self_attn 3")


def weighted(model: Model, mixed: Mixture, gone: Sequence[frozenset[Unit]]) -> np.ndarray:
    """The weighted mean of the parts' own means."""
    means = [losses(model, part.right_only(), gone).mean() for part in mixed.parts]
    return np.sum([weight * mean for weight, mean in zip(mixed.weights, means, strict=True)], axis=0)


# Losses and scores


def test_the_mean_is_the_weighted_mean_of_the_parts(model: Model) -> None:
    found = oracle(model, mixture())
    assert isinstance(found, MixedOracle) and isinstance(oracle(model, task()), ModelOracle)
    answer = found.losses(ASKED)
    np.testing.assert_allclose(answer.mean(), weighted(model, mixture(), ASKED), rtol=1e-6)
    assert answer.nll.shape == (4, 6 + 5 + 4) and answer.tokens.shape == (15,)
    unweighted = np.concatenate([losses(model, p.right_only(), ASKED).nll for p in mixture().parts], 1)
    assert np.abs(unweighted.sum(1) / mixture().right_only().predicted - answer.mean()).max() > 1e-2  # weights matter


def test_scores_are_weighted_with_their_errors(model: Model) -> None:
    for metric in ("loss", "cosine", "kl", "magnitude"):
        found = MixedOracle(model, mixture(), metric=metric).scored()
        parts = [ModelOracle(model, part, metric=metric).scored() for part in mixture().parts]
        for unit in model.layout.units("any"):
            each = zip(WEIGHTS, parts, strict=True)
            assert found.values[unit] == pytest.approx(sum(w * part.values[unit] for w, part in each))
        if metric in ("loss", "kl"):
            for unit, error in found.errors.items():
                each = zip(WEIGHTS, parts, strict=True)
                assert error == pytest.approx(math.sqrt(sum((w * part.errors[unit]) ** 2 for w, part in each)))
            dense = [part.dense for part in parts]
            assert found.dense == pytest.approx(
                sum(w * value for w, value in zip(WEIGHTS, dense, strict=True) if value)
            )
        assert bool(found.errors) == (metric in ("loss", "kl")) and len(found.values) == 8
        assert found.metric == metric and found.data["name"] == "m" and len(found.data["parts"]) == 3


def test_streams_and_windows_are_weighted(model: Model) -> None:
    mixed = MixedOracle(model, mixture(), metric="angular")
    parts = [ModelOracle(model, part, metric="angular") for part in mixture().parts]
    windows = [parse(["0", "1"]), parse(["1", "2", "3"]), parse(["2"])]
    for got, *each in zip(mixed.windows(windows), *(part.windows(windows) for part in parts), strict=True):
        assert got == pytest.approx(sum(w * one for w, one in zip(WEIGHTS, each, strict=True)))
    streams = mixed.streams("all")
    assert set(streams) >= {"cosine", "l2"} and streams["angular"].values == pytest.approx(
        {unit: sum(w * part.streams("all")["angular"].values[unit] for w, part in zip(WEIGHTS, parts, strict=True))
         for unit in streams["angular"].values}
    )  # fmt: skip


def test_paired_errors_are_no_smaller_than_those_of_the_parts(model: Model) -> None:
    """The parts are strata; in one row they also differ from each other, which only widens the error."""
    answer, apart = MixedOracle(model, mixture()).losses(ASKED), []
    for weight, part in zip(WEIGHTS, mixture().parts, strict=True):
        apart.append(weight * losses(model, part.right_only(), ASKED).difference(1, 0)[1])
    rise, error = answer.difference(1, 0)
    assert rise == pytest.approx(answer.mean()[1] - answer.mean()[0])
    assert 0.8 * math.hypot(*apart) < error < math.inf


def test_a_part_alone_is_that_part(model: Model) -> None:
    data = cases.text(rows=4, padded=True)
    mixed, alone = MixedOracle(model, Mixture((data,), (1.0,), "one")), ModelOracle(model, data)
    np.testing.assert_allclose(mixed.losses(ASKED).nll, alone.losses(ASKED).nll)
    assert mixed.losses(ASKED).difference(1, 0) == pytest.approx(alone.losses(ASKED).difference(1, 0))
    assert mixed.scores() == pytest.approx(alone.scores())
    assert mixed.sequences == alone.sequences and mixed.work == alone.work


# Rows, counts, memos


@pytest.mark.parametrize(("rows", "each"), [(1, (1, 1, 1)), (5, (2, 2, 2)), (9, (4, 3, 3)), (15, (6, 5, 4))])
def test_rows_are_the_same_share_of_every_part(model: Model, rows: int, each: tuple[int, ...]) -> None:
    found = MixedOracle(model, mixture())
    answer = found.losses(ASKED, rows=rows)
    heads = replace(mixture(), parts=tuple(p.right_only().head(n) for p, n in zip(mixture().parts, each, strict=True)))
    assert found.sequences == 15 and answer.nll.shape == (4, sum(each))
    np.testing.assert_allclose(answer.mean(), weighted(model, heads, ASKED), rtol=1e-6)
    np.testing.assert_allclose(found.losses(ASKED).mean(), weighted(model, mixture(), ASKED), rtol=1e-6)


def test_shares_are_whole_numbers_where_they_can_be(model: Model) -> None:
    """49 rows, of which 7 are asked for, are a seventh of every part: rounding must not add a row."""
    parts = tuple(cases.text(rows=rows, length=4, seed=rows) for rows in (21, 28))
    found = MixedOracle(model, Mixture(parts, (0.5, 0.5), "m"))
    for rows in (7, 14, 21, 28, 35, 42):
        assert found.losses(ASKED[:1], rows=rows).tokens.shape == (rows,)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many variants and rows reach the engine, call by call."""
    calls: list[tuple[int, int]] = []

    def counted(model: Model, data: Data, variants: Sequence[Iterable[Unit]], **options: Any) -> Losses:
        calls.append((len(variants), data.sequences))
        return losses(model, data, variants, **options)

    monkeypatch.setattr(asked, "losses", counted)
    return calls


def test_evaluations_are_counted_once_for_all_parts(model: Model, measured: list[tuple[int, int]]) -> None:
    found = MixedOracle(model, mixture())
    found.losses(ASKED)
    found.losses(ASKED[1:])
    assert found.evaluations == 4 and found.work == pytest.approx(4) and measured == [(4, 6), (4, 5), (4, 4)]
    found.losses(sets("3.mlp"), rows=1)
    assert found.evaluations == 5 and 4.1 < found.work < 4.4
    assert found.asking("kl").measure == "kl" and found.measure == found.metric == found.spec == "loss"
    found.asking("cosine").losses(ASKED)
    assert len(measured) == 6  # what one measured, the other knows


def test_every_part_has_its_memo(model: Model, tmp_path: Path, measured: list[tuple[int, int]]) -> None:
    memo = tmp_path / "losses.jsonl"
    first = MixedOracle(model, mixture(), memo=memo).losses(ASKED, rows=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"losses-{n}.jsonl" for n in range(3)]
    headers = [json.loads(path.read_text().splitlines()[0])["digest"] for path in sorted(tmp_path.iterdir())]
    assert headers == [part.digest for part in mixture().parts]
    measured.clear()
    again = MixedOracle(model, mixture(), memo=memo)
    assert again.losses(ASKED, rows=9).nll.tolist() == first.nll.tolist() and not measured
    (tmp_path / "losses-1.jsonl").unlink()
    again = MixedOracle(model, mixture(), memo=memo)
    assert again.losses(ASKED, rows=9).nll.tolist() == first.nll.tolist() and measured == [(4, 3)]
    measured.clear()
    again.losses(ASKED)
    assert measured == [(4, 2), (4, 2), (4, 1)]  # only what is missing


def test_other_answers_to_a_question_do_not_share_a_memo(model: Model, tmp_path: Path) -> None:
    for seed in (7, 8):
        mixed = Mixture((cases.text(), task(seed)), (0.5, 0.5), "m")
        found = MixedOracle(model, mixed, memo=tmp_path / "m.jsonl").losses(ASKED)
        np.testing.assert_allclose(found.mean(), weighted(model, mixed, ASKED), rtol=1e-6)


def test_what_it_says_and_shows(model: Model) -> None:
    notes: list[str] = []
    found = MixedOracle(model, mixture(), units=parse(["1", "2"]), say=notes.append)
    found.note("a line")
    assert notes == ["a line"] and found.units == parse(["1", "2"]) and found.ledger is model.layout
    assert all(value > 0 for value in found.milliseconds().values())


def test_error_needs_choices_in_every_part(model: Model) -> None:
    with pytest.raises(OptionError, match="the metric error needs questions with choices; random has none"):
        MixedOracle(model, mixture(), metric="error").scores()
    tasks = Mixture((task(), task(8)), (0.75, 0.25), "tasks")
    found = MixedOracle(model, tasks, metric="error")
    parts = [ModelOracle(model, part, metric="error").losses(ASKED).mean() for part in tasks.parts]
    np.testing.assert_allclose(found.losses(ASKED).mean(), 0.75 * parts[0] + 0.25 * parts[1])
    assert found.sequences == 8


# Searches


def brute(model: Model, mixed: Mixture, count: int) -> list[Unit]:
    """Greedy written out: drop what leaves the lowest weighted loss, measured by the engine part by part."""
    gone: list[Unit] = []
    for _ in range(count):
        left = [unit for unit in candidates(model.layout, "any") if unit not in gone]
        left = [unit for unit in left if model.layout.viable((*gone, unit))]
        means = weighted(model, mixed, [frozenset((*gone, unit)) for unit in left])
        gone.append(left[int(means.argmin())])
    return gone


@pytest.mark.parametrize("weights", [WEIGHTS, (0.05, 0.05, 0.9), (0.9, 0.05, 0.05)])
def test_greedy_chooses_by_the_weighted_loss(model: Model, weights: tuple[float, ...]) -> None:
    mixed = replace(mixture(), weights=weights)
    plan = select(model, "4 units", data=mixed, select="greedy:exact=true")
    assert list(plan.drop) == brute(model, mixed, 4)
    assert plan.why["data"]["name"] == "m" and plan.why["evaluations"] > 4 and plan.why["steps"][0]["se"] > 0


def test_weights_change_the_choice(model: Model) -> None:
    plans = {tuple(brute(model, replace(mixture(), weights=(w, 0.05, 0.95 - w)), 4)) for w in (0.05, 0.9)}
    assert len(plans) == 2


@pytest.mark.parametrize("how", ["greedy:race=3", "lowest", "contiguous", "beam:width=2", "iterative"])
def test_every_search_runs_on_a_mixture(model: Model, how: str, tmp_path: Path) -> None:
    options = {"data": mixture(), "select": how, "memo": tmp_path / "m.jsonl"}
    plan = select(model, "2 units", **options)
    assert len(plan.drop) in (1, 2) and select(model, "2 units", **options).drop == plan.drop
    cosine = select(model, "2 units", data=mixture(), metric="cosine")
    ranked = [unit for unit in score(model, mixture(), "cosine").ranked() if unit in candidates(model.layout, "any")]
    assert list(cosine.drop) == ranked[:2]
