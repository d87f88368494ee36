"""Closed-form ridge fits from second moments: one eigendecomposition serves every ridge value and every target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from transect.metrics.moments import Moments
from transect.metrics.spectrum import kept

RIDGES = (0.0, 1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0, 100.0)
TUNE_SLACK = 1e-4


def rcond_for(dtype: torch.dtype) -> float:
    """Eigenvalues below this share of the largest are rounding: max(1e-10, 4 eps^2) of the captured dtype."""
    return max(1e-10, 4 * torch.finfo(dtype).eps ** 2)


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Eigenvalues [d] of the centred moment matrix, and those kept with their directions [d, r]."""

    eigenvalues: Tensor
    values: Tensor
    vectors: Tensor
    mean: float

    @property
    def rank(self) -> int:
        """Directions kept."""
        return len(self.values)

    def inverse(self, ridge: float) -> Tensor:
        """1 / (lambda + ridge mean(lambda)) [r]."""
        return 1 / (self.values + ridge * self.mean)


def decompose(moments: Moments, rcond: float) -> Spectrum:
    """The spectrum of the inputs; eigenvalues up to `rcond` times the largest are cut. Cost: about 9 d^3, float64."""
    values, vectors = torch.linalg.eigh(moments.cxx)
    chosen = kept(values, rcond)
    return Spectrum(values, values[chosen], vectors[:, chosen], float(values.clamp_min(0).mean()))


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """y* = (x - mean_x) W + mean_y, with the ridge it was solved with."""

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    ridge: float

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [n, e] for inputs [n, d]."""
        return torch.addmm(self.mean_y, x - self.mean_x, self.weight)


def insample_r2(moments: Moments, spectrum: Spectrum, target: int) -> float | None:
    """<Cxy, Cxx^+ Cxy> / cyy: R^2 of the unregularised fit on its own rows, 0 to 1; None for a constant target."""
    cyy = float(moments.cyy(target))
    if cyy <= 0:
        return None
    along = (spectrum.vectors.T @ moments.cxy(target)).square().sum(1)
    return float((along / spectrum.values).sum()) / cyy


def solve(fit: Moments, spectrum: Spectrum, target: int, ridge: float, dtype: torch.dtype) -> Fit:
    """W = Q diag(1 / (lambda + ridge mean(lambda))) Q^T Cxy."""
    projected = spectrum.vectors.T @ fit.cxy(target)
    weight = spectrum.vectors @ (spectrum.inverse(ridge)[:, None] * projected)
    return Fit(weight.to(dtype), fit.mean_x.to(dtype), fit.mean_y(target).to(dtype), ridge)


def tuned_ridge(fit: Moments, spectrum: Spectrum, tune: Moments, target: int) -> float:
    """The largest ridge whose R^2 on the tune rows is within 1e-4 of the best.

    SSE = syy - 2 <W, Sxy> + <W, Sxx W> + n |uy - W^T ux - b|^2, rewritten in the eigenbasis, so that each further ridge
    costs r^2. The large end matters: independent data still score below 0 at ridge 1.
    """
    q = spectrum.vectors
    projected = q.T @ fit.cxy(target)
    cross = (projected * (q.T @ tune.cxy(target))).sum(1)
    quadratic = (q.T @ tune.cxx @ q) * (projected @ projected.T)
    off_x = q.T @ (tune.mean_x - fit.mean_x)
    off_y = tune.mean_y(target) - fit.mean_y(target)
    spread = float(tune.cyy(target))
    losses = []
    for ridge in RIDGES:
        inverse = spectrum.inverse(ridge)
        bias = off_y - (inverse * off_x) @ projected
        losses.append(
            spread
            - 2 * float(inverse @ cross)
            + float(inverse @ quadratic @ inverse)
            + float(tune.count * bias.square().sum())
        )
    slack = TUNE_SLACK * max(spread, 0.0)
    return max(ridge for ridge, loss in zip(RIDGES, losses, strict=True) if loss <= min(losses) + slack)
