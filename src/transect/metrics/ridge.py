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


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """Solves any target of the fit rows for any ridge, and chooses the ridge on tune rows; shared work is done once.

    W = Q diag(1 / (lambda + ridge mean(lambda))) Q^T Cxy.
    """

    fit: Moments
    tune: Moments | None
    spectrum: Spectrum
    rotated: Tensor | None  # Q^T Sxx Q of the tune rows

    @classmethod
    def of(cls, fit: Moments, tune: Moments | None, rcond: float) -> "Solver":
        """Decompose the fit rows' inputs."""
        spectrum = decompose(fit, rcond)
        q = spectrum.vectors
        return cls(fit, tune, spectrum, None if tune is None else q.T @ tune.cxx @ q)

    def __call__(self, target: int, ridge: float | None, dtype: torch.dtype) -> Fit:
        """The fit with the ridge given, or with the one the tune rows choose (0 without tune rows)."""
        q = self.spectrum.vectors
        projected = q.T @ self.fit.cxy(target)
        chosen = self._tuned(target, projected) if ridge is None else ridge
        weight = q @ (self.spectrum.inverse(chosen)[:, None] * projected)
        return Fit(weight.to(dtype), self.fit.mean_x.to(dtype), self.fit.mean_y(target).to(dtype), chosen)

    def _tuned(self, target: int, projected: Tensor) -> float:
        """The largest ridge whose R^2 on the tune rows is within 1e-4 of the best.

        SSE = syy - 2 <W, Sxy> + <W, Sxx W> + n |uy - W^T ux - b|^2, rewritten in the eigenbasis, so that each further
        ridge costs r^2. The large end matters: independent data still score below 0 at ridge 1.
        """
        fit, tune = self.fit, self.tune
        if tune is None or self.rotated is None:
            return 0.0
        q = self.spectrum.vectors
        cross = (projected * (q.T @ tune.cxy(target))).sum(1)
        quadratic = self.rotated * (projected @ projected.T)
        off_x = q.T @ (tune.mean_x - fit.mean_x)
        off_y = tune.mean_y(target) - fit.mean_y(target)
        spread = float(tune.cyy(target))
        losses = []
        for ridge in RIDGES:
            inverse = self.spectrum.inverse(ridge)
            bias = off_y - (inverse * off_x) @ projected
            explained = 2 * inverse @ cross - inverse @ quadratic @ inverse
            losses.append(spread - float(explained) + float(tune.count * bias.square().sum()))
        slack = TUNE_SLACK * max(spread, 0.0)
        return max(ridge for ridge, loss in zip(RIDGES, losses, strict=True) if loss <= min(losses) + slack)
