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
    rcond: float

    @property
    def regular(self) -> bool:
        """Whether no eigenvalue is near the cut."""
        full = self.rank == len(self.eigenvalues)
        return full and bool(self.values.min() > 1e3 * self.rcond * self.values.max())

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
    return Spectrum(values, values[chosen], vectors[:, chosen], float(values.clamp_min(0).mean()), rcond)


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


def insample_r2(moments: Moments, rcond: float, regular: bool = False) -> tuple[int, list[float | None]]:
    """Rank, and <Cxy, Cxx^+ Cxy> / cyy for each target: R^2 of the unregularised fit on its own rows, 0 to 1.

    None for a constant target. `regular` says that the inputs are known to be far from singular (most of the rows were:
    `Spectrum.regular`): then a Cholesky factor, nine times cheaper, takes the place of the eigendecomposition.
    """
    targets = range(len(moments.sum_xy))
    if regular:
        factor = torch.linalg.cholesky(moments.cxx)
        rank = len(factor)

        def explained(target: int) -> Tensor:
            return torch.linalg.solve_triangular(factor, moments.cxy(target), upper=False).square().sum()
    else:
        spectrum = decompose(moments, rcond)
        rank = spectrum.rank

        def explained(target: int) -> Tensor:
            return ((spectrum.vectors.T @ moments.cxy(target)).square().sum(1) / spectrum.values).sum()

    def value(target: int) -> float | None:
        if not rank or moments.constant(target):
            return None
        return float(explained(target) / moments.cyy(target))

    return rank, [value(target) for target in targets]


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """Solves any target of the fit rows for any ridge, and chooses the ridge on tune rows; shared work is done once.

    W = Q diag(1 / (lambda + ridge mean(lambda))) Q^T Cxy.
    """

    fit: Moments
    tune: Moments | None
    spectrum: Spectrum
    dtype: torch.dtype
    rotated: Tensor | None  # Q^T Sxx Q of the tune rows

    @classmethod
    def of(cls, fit: Moments, tune: Moments | None, rcond: float, dtype: torch.dtype) -> "Solver":
        """Decompose the fit rows' inputs; maps come out in `dtype`, in which the ridge is also chosen."""
        spectrum = decompose(fit, rcond)
        q = spectrum.vectors.to(dtype)
        return cls(fit, tune, spectrum, dtype, None if tune is None else q.T @ tune.cxx.to(dtype) @ q)

    def __call__(self, target: int, ridge: float | None) -> Fit:
        """The fit with the ridge given, or with the one the tune rows choose (0 without tune rows)."""
        q = self.spectrum.vectors
        projected = q.T @ self.fit.cxy(target)
        chosen = self._tuned(target, projected) if ridge is None else ridge
        weight = q.to(self.dtype) @ (self.spectrum.inverse(chosen)[:, None] * projected).to(self.dtype)
        return Fit(weight, self.fit.mean_x.to(self.dtype), self.fit.mean_y(target).to(self.dtype), chosen)

    def _tuned(self, target: int, projected: Tensor) -> float:
        """The largest ridge whose R^2 on the tune rows is within 1e-4 of the best.

        SSE = syy - 2 <W, Sxy> + <W, Sxx W> + n |uy - W^T ux - b|^2, rewritten in the eigenbasis, so that each further
        ridge costs r^2. The large end matters: independent data still score below 0 at ridge 1.
        """
        fit, tune = self.fit, self.tune
        if tune is None or self.rotated is None:
            return 0.0
        q, dtype = self.spectrum.vectors, self.dtype
        narrow = projected.to(dtype)
        cross = (narrow * (q.to(dtype).T @ tune.cxy(target).to(dtype))).sum(1).double()
        quadratic = (self.rotated * (narrow @ narrow.T)).double()
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
