"""Normal equations: a ridge regression that is summed batch by batch and solved once, its ridge chosen on other rows.

Memory depends on the sizes of the map alone, never on how much text goes in. Products are made in float32 and summed in
float64, over all processes where there are several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune.dist import total
from depthprune.errors import DepthpruneError

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean of the diagonal


@dataclass(frozen=True, eq=False)
class Fit:
    """A map (D, K), or (D,) if diagonal, its ridge, and the share of the held-out squared error that it removes.

    ``map`` is None where no ridge removes any.
    """

    map: Tensor | None
    ridge: float
    gain: float


class Normal:
    """``min_M sum |r - M a|^2 + ridge mean(diag A) |M|^2``: ``M = R A^-1`` with ``A = sum a a^T``, ``R = sum r a^T``.

    a (K,) are the features of a token and r (D,) is what is to be explained; ``diagonal`` maps act on each channel
    alone, so then K = D. Rows to fit on and rows held out are summed apart.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device, *, diagonal: bool = False) -> None:
        wide: dict[str, object] = {"dtype": torch.float64, "device": device}
        self.diagonal = diagonal
        self._a = torch.zeros((2, inputs) if diagonal else (2, inputs, inputs), **wide)  # type: ignore[call-overload]
        self._r = torch.zeros((2, inputs) if diagonal else (2, outputs, inputs), **wide)  # type: ignore[call-overload]
        self._error = torch.zeros(2, **wide)  # type: ignore[call-overload]

    def add(self, held: int, features: Tensor, residual: Tensor) -> None:
        """Take in some tokens: features (N, K) and residuals (N, D); ``held`` is 1 for rows held out, else 0."""
        features, residual = features.float(), residual.float()
        if self.diagonal:
            self._a[held] += features.square().sum(0, dtype=torch.float64)
            self._r[held] += (features * residual).sum(0, dtype=torch.float64)
        else:
            self._a[held] += features.T @ features
            self._r[held] += residual.T @ features
        self._error[held] += residual.square().sum(dtype=torch.float64)

    def solve(self, what: str, rank: int = 0) -> Fit:
        """The map whose ridge removes most of the held-out error; the rows held out are not fitted to.

        ``rank`` above 0 asks for the best map of that rank (reduced-rank regression).

        Raises ``DepthpruneError`` where the sums are not finite, naming ``what``.
        """
        a, r, error = total(self._a), total(self._r), total(self._error)
        if not all(bool(sums.isfinite().all()) for sums in (a, r, error)):
            raise DepthpruneError(
                f"{what}: activations are not finite (NaN or infinite) on this text, so nothing can be fitted; "
                "try --dtype float32, and check that the model is whole"
            )
        best, fit = 0.0, Fit(None, 0.0, 0.0)
        for ridge in RIDGES:
            found = self._map(a[0], r[0], ridge, rank)
            if found is not None:
                gain = float(2 * (found * r[1]).sum() - (self._times(found, a[1]) * found).sum())
                if gain > best:
                    best, fit = gain, Fit(found, ridge, gain / float(error[1]))
        return fit

    def _times(self, found: Tensor, a: Tensor) -> Tensor:
        return found * a if self.diagonal else found @ a

    def _map(self, a: Tensor, r: Tensor, ridge: float, rank: int) -> Tensor | None:
        """The solution under a ridge; None where the equations are singular all the same."""
        if self.diagonal:
            damped = a + ridge * a.mean()
            return r / damped if bool((damped > 0).all()) else None
        damped = a + torch.diag((ridge * a.diagonal().mean()).expand(len(a)))
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            return None
        found = torch.cholesky_solve(r.T, factor).T
        if 0 < rank < len(found):
            basis = torch.linalg.eigh(found @ damped @ found.T).eigenvectors[:, -rank:]
            found = basis @ (basis.T @ found)
        return found if bool(found.isfinite().all()) else None
