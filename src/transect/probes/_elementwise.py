"""One line per unit: the linear fit of an element-wise function, in memory linear in the width."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from transect.metrics.ridge import RIDGES, TUNE_SLACK, rcond_for
from transect.metrics.spectrum import effective_rank, kept, participation_ratio
from transect.probes._fits import Spread

SUMS = ("x", "y", "xx", "xy", "yy")


@dataclass(slots=True, eq=False)
class Lines:
    """y_i = a_i (x_i - mean) + mean y_i for each unit i, with the interface of `Group`.

    `sums` [parts, 5, width] holds, for fit and tune rows, sums of x, y, x^2, x y and y^2 about the first batch's means.
    """

    source: str
    elements: tuple[str, ...]
    weighted: bool = False
    shift: Tensor | None = None  # [2, width]
    sums: Tensor | None = None
    counts: list[int] = field(default_factory=lambda: [0, 0])
    fits: list["Slopes"] = field(default_factory=list)
    spread: Spread | None = None

    @property
    def filled(self) -> bool:
        """Whether any row has come."""
        return self.sums is not None

    def add(self, phase: str, x: Tensor, ys: list[Tensor]) -> None:
        """Add rows [n, width]."""
        y = ys[0]
        if self.shift is None or self.sums is None:
            self.shift = torch.stack([x.mean(0), y.mean(0)])
            self.sums = torch.zeros(2, len(SUMS), x.shape[1], dtype=torch.float64, device=x.device)
        x, y = x - self.shift[0], y - self.shift[1]
        part = int(phase == "tune")
        columns = (x, y, x * x, x * y, y * y)
        self.sums[part] += torch.stack([column.sum(0).double() for column in columns])
        self.counts[part] += len(x)

    def _moments(self, part: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means about the shift and centred xx, xy, yy of fit (0) or tune (1) rows, [width] each."""
        assert self.sums is not None
        x, y, xx, xy, yy = self.sums[part]
        n = max(self.counts[part], 1)
        return x / n, y / n, xx - x * x / n, xy - x * y / n, yy - y * y / n

    def solve(self, ridge: float | None, dtype: torch.dtype) -> None:
        """Solve the slopes on the fit rows and choose the ridge on the tune rows."""
        assert self.sums is not None and self.shift is not None
        mean_x, mean_y, xx, xy, _ = self._moments(0)
        chosen = kept(xx, rcond_for(dtype))
        if self.counts[0]:
            effective, participation = float(effective_rank(xx)), float(participation_ratio(xx))
            self.spread = Spread(self.counts[0], int(chosen.sum()), effective, participation)
        if bool(chosen.any()):
            ridge = self._tuned(chosen) if ridge is None else ridge
            slope = torch.where(chosen, xy / (xx + ridge * xx.mean()), torch.zeros_like(xx))
            kind = torch.promote_types(dtype, torch.float32)
            shift = self.shift.double()
            self.fits.append(Slopes(slope.to(kind), (shift[0] + mean_x).to(kind), (shift[1] + mean_y).to(kind), ridge))
        self.sums[0] += self.sums[1]
        self.sums[1] = 0
        self.counts = [sum(self.counts), 0]

    def _tuned(self, chosen: Tensor) -> float:
        if not self.counts[1]:
            return 0.0
        mean_x, mean_y, xx, xy, _ = self._moments(0)
        tune_x, tune_y, txx, txy, tyy = self._moments(1)
        losses = []
        for ridge in RIDGES:
            slope = torch.where(chosen, xy / (xx + ridge * xx.mean()), torch.zeros_like(xx))
            bias = tune_y - mean_y - slope * (tune_x - mean_x)
            losses.append(float((tyy - 2 * slope * txy + slope * slope * txx + self.counts[1] * bias * bias).sum()))
        best = min(losses) + TUNE_SLACK * float(tyy.sum())
        return max(ridge for ridge, loss in zip(RIDGES, losses, strict=True) if loss <= best)

    def insample(self, dtype: torch.dtype) -> tuple[int, list[float | None]]:
        """One slope a unit (rank 1), and the in-sample R^2 of all lines together."""
        _, _, xx, xy, yy = self._moments(0)
        chosen = kept(xx, rcond_for(dtype))
        if not bool(chosen.any()) or float(yy.sum()) <= 0:
            return 1, [None]
        return 1, [float((xy[chosen].square() / xx[chosen]).sum() / yy.sum())]

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {
            "shift": self.shift,
            "sums": self.sums,
            "counts": list(self.counts),
            "fits": [[fit.slope, fit.mean_x, fit.mean_y, fit.ridge] for fit in self.fits],
            "spread": self.spread and self.spread.pack(),
        }

    def unpack(self, packed: dict) -> None:
        """Take up what `pack` gave."""
        self.shift, self.sums, self.counts = packed["shift"], packed["sums"], packed["counts"]
        self.fits = [Slopes(*parts) for parts in packed["fits"]]
        self.spread = packed["spread"] and Spread(*packed["spread"])


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """y*_i = (x_i - mean_x_i) slope_i + mean_y_i."""

    slope: Tensor
    mean_x: Tensor
    mean_y: Tensor
    ridge: float

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions [n, width]."""
        return (x - self.mean_x) * self.slope + self.mean_y
