"""Normal equations against plain least squares on all rows at once, and what they do where there is nothing to fit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from depthprune.errors import DepthpruneError
from depthprune.recover.normal import RIDGES, Fit, Normal

CPU = torch.device("cpu")
N, HELD, K, D = 200, 60, 7, 5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(*, noise: float = 1.0, seed: int = 0, diagonal: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and residuals, to fit on and held out: a true map of features of very different sizes, and noise."""
    inputs = D if diagonal else K
    sizes = torch.logspace(-1.5, 1, inputs)
    true = drawn(inputs, seed=seed + 1) if diagonal else drawn(D, inputs, seed=seed + 1)

    def some(count: int, seed: int) -> tuple[Tensor, Tensor]:
        features = drawn(count, inputs, seed=seed) * sizes
        clean = features * true if diagonal else features @ true.T
        return features, clean + noise * drawn(count, D, seed=seed + 1)

    return *some(N, seed + 10), *some(HELD, seed + 20)


def solved(
    x: Tensor, r: Tensor, x1: Tensor, r1: Tensor, *, diagonal: bool = False, rank: int = 0, step: int = 0
) -> Fit:
    normal = Normal(r.shape[1], x.shape[1], CPU, diagonal=diagonal)
    for held, (features, residual) in enumerate(((x, r), (x1, r1))):
        for some in torch.arange(len(features)).split(step or len(features)):
            normal.add(held, features[some], residual[some])
    return normal.solve("these maps", rank)


def ridged(x: Tensor, r: Tensor, ridge: float) -> Tensor:
    """Ridge regression as least squares on a taller system: rows of the damping, for which zero is wanted."""
    x, r = x.double(), r.double()
    damping = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    zeros = torch.zeros(x.shape[1], r.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([r, zeros])).solution.T


def ridged_by_channel(x: Tensor, r: Tensor, ridge: float) -> Tensor:
    """The same for maps that act on each channel alone: one least-squares system per channel."""
    x, r = x.double(), r.double()
    damping = (ridge * x.square().sum(0).mean()).sqrt().reshape(1, 1)
    found = [
        torch.linalg.lstsq(torch.cat([x[:, [d]], damping]), torch.cat([r[:, [d]], torch.zeros(1, 1).double()])).solution
        for d in range(x.shape[1])
    ]
    return torch.cat(found).flatten()


def reduced(x: Tensor, r: Tensor, ridge: float, rank: int) -> Tensor:
    """Reduced-rank ridge regression: what the full map makes of the taller system's rows, cut to its first singular
    directions (Eckart and Young)."""
    full = ridged(x, r, ridge)
    damping = (ridge * x.double().square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    made = torch.cat([x.double(), damping]) @ full.T
    directions = torch.linalg.svd(made, full_matrices=False).Vh[:rank]
    return directions.T @ directions @ full


def error(found: Tensor, x: Tensor, r: Tensor) -> float:
    made = x.double() * found if found.dim() == 1 else x.double() @ found.T
    return float((r.double() - made).square().sum())


NAIVE: dict[str, tuple[bool, int, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "matrix": (False, 0, ridged),
    "diagonal": (True, 0, ridged_by_channel),
    "rank 1": (False, 1, lambda x, r, ridge: reduced(x, r, ridge, 1)),
    "rank 3": (False, 3, lambda x, r, ridge: reduced(x, r, ridge, 3)),
    "rank of all": (False, D, ridged),
}


@pytest.mark.parametrize("noise", [0.03, 1.0, 20.0])
@pytest.mark.parametrize("sort", NAIVE)
def test_it_is_ridge_regression_with_the_ridge_that_is_best_on_rows_held_out(sort: str, noise: float) -> None:
    diagonal, rank, naive = NAIVE[sort]
    x, r, x1, r1 = problem(noise=noise, diagonal=diagonal)
    fit = solved(x, r, x1, r1, diagonal=diagonal, rank=rank)
    errors = {ridge: error(naive(x, r, ridge), x1, r1) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    nothing = float(r1.double().square().sum())
    assert errors[best] < nothing and fit.ridge == best and fit.map is not None
    assert fit.gain == pytest.approx(1 - errors[best] / nothing, rel=1e-3)
    want = naive(x, r, best)
    torch.testing.assert_close(fit.map, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_noise_asks_for_more_ridge() -> None:
    """The twin: were one ridge always taken, the test above would have nothing to tell apart."""
    clean, noisy = (solved(*problem(noise=noise)).ridge for noise in (0.03, 20.0))
    assert clean < noisy


def test_no_map_of_its_rank_is_better() -> None:
    x, r, _, _ = problem()
    fit = solved(x, r, x, r, rank=2)
    assert fit.map is not None and int(torch.linalg.matrix_rank(fit.map)) == 2
    x, r = torch.cat([x, x]), torch.cat([r, r])

    def objective(found: Tensor) -> float:
        return error(found, x, r) + fit.ridge * float(x.double().square().sum(0).mean() * found.square().sum())

    best = objective(fit.map)
    left, size, right = torch.linalg.svd(ridged(x, r, fit.ridge))
    for pair in ((0, 1), (0, 2), (1, 2)):  # cuts of the map itself forget how large each feature is
        chosen = list(pair)
        assert best < objective(left[:, chosen] * size[chosen] @ right[chosen])
    down = torch.linalg.svd(fit.map, full_matrices=False).Vh[:2]
    up = fit.map @ down.T
    for seed in range(20):  # nor is any neighbour
        nearby = (up + 1e-3 * drawn(D, 2, seed=seed)) @ (down + 1e-3 * drawn(2, K, seed=100 + seed))
        assert best <= objective(nearby) * (1 + 1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_batches_summed_are_all_at_once(diagonal: bool) -> None:
    data = problem(diagonal=diagonal)
    whole, pieces = (solved(*data, diagonal=diagonal, step=step) for step in (0, 13))
    assert whole.map is not None and pieces.map is not None and whole.ridge == pieces.ridge
    torch.testing.assert_close(pieces.map, whole.map, rtol=1e-5, atol=1e-6)
    assert pieces.gain == pytest.approx(whole.gain, rel=1e-5)
    fewer = solved(data[0][13:], data[1][13:], *data[2:], diagonal=diagonal)
    assert fewer.map is not None and not torch.allclose(fewer.map, whole.map, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_half_precision_is_summed_in_full(diagonal: bool) -> None:
    x, r, x1, r1 = (tensor.bfloat16() for tensor in problem(diagonal=diagonal))
    half = solved(x, r, x1, r1, diagonal=diagonal, step=10)
    full = solved(x.float(), r.float(), x1.float(), r1.float(), diagonal=diagonal)
    assert half.map is not None and full.map is not None and half.map.dtype == torch.float64
    torch.testing.assert_close(half.map, full.map, rtol=1e-5, atol=1e-6)


# Nothing to fit, or nothing to gain


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("defect", ["no features", "no residual", "no rows held out", "opposite", "noise"])
def test_a_map_that_removes_no_held_out_error_is_not_given(defect: str, diagonal: bool, rank: int) -> None:
    x, r, x1, r1 = problem(noise=0.1, diagonal=diagonal)
    assert solved(x, r, x1, r1, diagonal=diagonal, rank=rank).map is not None
    if defect == "no features":
        x, x1 = torch.zeros_like(x), torch.zeros_like(x1)
    elif defect == "no residual":
        r, r1 = torch.zeros_like(r), torch.zeros_like(r1)
    elif defect == "no rows held out":
        x1, r1 = x1[:0], r1[:0]
    elif defect == "opposite":
        r1 = -r1
    else:
        r = torch.zeros_like(r)
    assert solved(x, r, x1, r1, diagonal=diagonal, rank=rank) == Gone()


class Gone:
    """No map, no gain."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fit) and other.map is None and other.gain == 0.0 and other.ridge == 0.0


@pytest.mark.parametrize("rank", [0, 1, D])
@pytest.mark.parametrize("defect", ["twice", "one is zero", "one feature", "few rows", "one row", "tiny"])
def test_singular_equations_finish(defect: str, rank: int) -> None:
    x, r, x1, r1 = problem(noise=0.1)
    chosen = slice(None)
    if defect == "twice":
        x, x1 = torch.cat([x, x], 1), torch.cat([x1, x1], 1)
    elif defect == "one is zero":
        x[:, 2] = x1[:, 2] = 0
    elif defect == "one feature":
        x, x1 = x[:, -1:].expand(-1, K), x1[:, -1:].expand(-1, K)
    elif defect == "few rows":
        chosen = slice(0, K - 2)
    elif defect == "one row":
        chosen = slice(0, 1)
    else:
        x, x1 = 1e-18 * x, 1e-18 * x1
    fit = solved(x[chosen], r[chosen], x1, r1, rank=rank)
    if defect in ("twice", "one is zero"):
        assert fit.map is not None and fit.gain > 0.5
    if fit.map is not None:
        assert bool(fit.map.isfinite().all()) and 0 < fit.gain <= 1
    if defect == "twice" and fit.map is not None:  # the smallest of all maps that fit: half on each
        torch.testing.assert_close(fit.map[:, :K], fit.map[:, K:], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_is_said(value: float, where: int, diagonal: bool) -> None:
    data = [tensor.clone() for tensor in problem(diagonal=diagonal)]
    data[where][3, 1] = value
    with pytest.raises(DepthpruneError, match=r"^these maps: activations are not finite .* --dtype float32"):
        solved(data[0], data[1], data[2], data[3], diagonal=diagonal)
