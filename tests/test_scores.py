"""Losses and scores: the paired standard error against a bootstrap, joins, ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from depthprune.scores import Array, Losses, Scores, paired
from depthprune.units import Unit, parse


def some_losses(sequences: int, seed: int, *, even: bool = False) -> tuple[Array, Array, Array]:
    """Two variants over sequences that differ far more from one another than the variants do, and their tokens."""
    draw = np.random.default_rng(seed)
    tokens = np.full(sequences, 31.0) if even else draw.integers(5, 60, sequences).astype(np.float64)
    base = tokens * draw.normal(3, 0.8, sequences)
    return base + tokens * draw.normal(0.05, 0.1, sequences), base, tokens


def bootstrap(nll: Array, base: Array, tokens: Array, draws: int = 4000) -> float:
    """The standard error by drawing sequences again and again, with replacement."""
    rows = np.random.default_rng(1).integers(0, len(tokens), (draws, len(tokens)))
    rises = (nll[rows].sum(1) - base[rows].sum(1)) / tokens[rows].sum(1)
    return float(rises.std())


@pytest.mark.parametrize("seed", range(3))
def test_the_paired_error_is_that_of_a_bootstrap(seed: int) -> None:
    nll, base, tokens = some_losses(300, seed)
    rise, error = paired(nll, base, tokens)
    assert rise == pytest.approx(nll.sum() / tokens.sum() - base.sum() / tokens.sum(), abs=1e-12)
    assert error == pytest.approx(bootstrap(nll, base, tokens), rel=0.05)


def test_the_bootstrap_sees_an_error_that_is_not_paired() -> None:
    nll, base, tokens = some_losses(300, 0)
    unpaired = math.hypot(*(paired(one, np.zeros_like(one), tokens)[1] for one in (nll, base)))
    assert unpaired > 5 * bootstrap(nll, base, tokens)


def test_with_rows_of_one_length_it_is_the_error_of_a_mean() -> None:
    nll, base, tokens = some_losses(40, 5, even=True)
    each = (nll - base) / tokens
    assert paired(nll, base, tokens) == pytest.approx((each.mean(), each.std(ddof=1) / math.sqrt(40)), abs=1e-12)


def test_the_noise_of_the_sequences_themselves_cancels() -> None:
    _, base, tokens = some_losses(10, 2)
    assert paired(base + 0.25 * tokens, base, tokens) == pytest.approx((0.25, 0), abs=1e-12)


def test_one_sequence_or_an_infinite_loss_has_no_error() -> None:
    rise, error = paired(np.array([3.0]), np.array([2.0]), np.array([4.0]))
    assert rise == 0.25 and math.isnan(error)
    rise, error = paired(np.array([math.inf, 1]), np.array([1.0, 1]), np.array([4.0, 4]))
    assert rise == math.inf and math.isnan(error)


def test_means_and_differences_are_per_token() -> None:
    losses = Losses(np.array([[2.0, 6.0], [4.0, 8.0], [1.0, 1.0]]), np.array([1.0, 3.0]))
    assert losses.mean().tolist() == [2.0, 3.0, 0.5]
    assert losses.difference(1, 0)[0] == 1.0
    assert losses.difference(0, 2) == paired(losses.nll[0], losses.nll[2], losses.tokens)


def test_empty_losses_are_infinite_until_filled() -> None:
    losses = Losses.empty(2, np.array([3.0, 4.0, 5.0]))
    assert losses.nll.shape == (2, 3) and np.isinf(losses.nll).all() and np.isinf(losses.mean()).all()


def test_joined_losses_lie_below_one_another() -> None:
    tokens = np.array([1.0, 2.0])
    one, two = Losses(np.array([[1.0, 2.0]]), tokens), Losses(np.array([[3.0, 4.0], [5.0, 6.0]]), tokens.copy())
    joined = Losses.join(one, two)
    assert joined.nll.tolist() == [[1, 2], [3, 4], [5, 6]] and joined.tokens.tolist() == [1, 2]


@pytest.mark.parametrize("other", [[1.0, 3.0], [1.0, 2.0, 3.0]])
def test_losses_on_other_sequences_do_not_join(other: list[float]) -> None:
    one = Losses(np.ones((1, 2)), np.array([1.0, 2.0]))
    with pytest.raises(AssertionError):
        Losses.join(one, Losses(np.ones((1, len(other))), np.array(other)))


def test_ranks_go_up_and_ties_keep_the_order_of_execution() -> None:
    values = dict(zip(parse(["0.mlp", "1", "2.mlp", "10"]), [0.5, -1.0, 0.5, -1.0], strict=True))
    assert [str(unit) for unit in Scores("loss", values).ranked()] == ["1", "10", "0.mlp", "2.mlp"]


def test_scores_become_json() -> None:
    one, two = Unit("", 1), Unit("", 2, "mlp")
    full = Scores("loss", {one: 0.5, two: 1.5}, {one: 0.1}, {"name": "text"}, 2.25).to_json()
    assert json.loads(json.dumps(full)) == {
        "data": {"name": "text"},
        "units": {"1": {"score": 0.5, "se": 0.1}, "2.mlp": {"score": 1.5}},
        "dense": {"loss": 2.25},
    }
    assert Scores("cosine", {one: 0.5}).to_json() == {"data": {}, "units": {"1": {"score": 0.5}}}


LEVEL_0 = ["errors", "files", "units", "plan", "budget", "scores", "registry", "select.rank", "select.search"]


def _heavy_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"torch", "transformers", "matplotlib", "datasets"} & set(done.stdout.split())


def test_selection_needs_no_torch() -> None:
    assert _heavy_after("\n".join(f"import depthprune.{name}" for name in LEVEL_0)) == set()
    assert _heavy_after("import depthprune.layout") >= {"torch"}  # what the check would see
