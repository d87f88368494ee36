"""Streaming second moments of inputs and targets: everything a linear fit needs, in memory that does not grow."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

_BLOCK = 192
_PART = 4096


@dataclass(slots=True, eq=False)
class Moments:
    """Weighted sums of x, y, x x^T, x y^T and |y|^2 about fixed shifts, for one input and several targets.

    The shift is the mean of the first batch, so that a large offset costs no digits. Sums are float64; x x^T is a
    float64 product; x y^T is one in the dtype of the data, added up in it for some thousand rows and in float64 beyond.
    Memory: 8 d^2 + 12 d e bytes for each target. Cost per token: d^2 (1/2 to 2/3 by symmetry) + d e multiplications.
    """

    shift_x: Tensor
    shift_y: list[Tensor]
    count: Tensor
    rows: int
    sum_x: Tensor
    sum_xx: Tensor
    sum_y: list[Tensor] = field(default_factory=list)
    sum_xy: list[Tensor] = field(default_factory=list)
    sum_yy: list[Tensor] = field(default_factory=list)
    part_xy: list[Tensor] = field(default_factory=list)
    part_rows: int = 0

    @classmethod
    def empty(cls, shift_x: Tensor, shift_y: list[Tensor]) -> Self:
        """No rows yet, about the given shifts [d] and [e]."""
        wide = {"dtype": torch.float64, "device": shift_x.device}
        width = len(shift_x)
        return cls(
            shift_x,
            shift_y,
            torch.zeros((), **wide),
            0,
            torch.zeros(width, **wide),
            torch.zeros(width, width, **wide),
            [torch.zeros(len(shift), **wide) for shift in shift_y],
            [torch.zeros(width, len(shift), **wide) for shift in shift_y],
            [torch.zeros((), **wide) for _ in shift_y],
            [torch.zeros(width, len(shift), dtype=shift.dtype, device=shift.device) for shift in shift_y],
        )

    @classmethod
    def start(cls, x: Tensor, ys: list[Tensor]) -> Self:
        """Empty moments about the means of a first batch."""
        return cls.empty(x.mean(0), [y.mean(0) for y in ys])

    def add(self, x: Tensor, ys: list[Tensor], weights: Tensor | None = None) -> None:
        """Add rows x [n, d] with targets [n, e], each row counted `weights` [n] times (once by default)."""
        x = x - self.shift_x
        wide = x.double()
        counted = wide if weights is None else wide * weights.double()[:, None]
        narrow = x if weights is None else counted.to(x.dtype)
        self.rows += len(x)
        self.count += len(x) if weights is None else weights.sum(dtype=torch.float64)
        self.sum_x += counted.sum(0)
        _add_gram(self.sum_xx, counted, wide)
        for index, y in enumerate(ys):
            y = y - self.shift_y[index]
            squares = torch.linalg.vector_norm(y, dim=1).double().square()
            self.sum_yy[index] += squares.sum() if weights is None else squares @ weights.double()
            self.sum_y[index] += (y if weights is None else y * weights.to(y.dtype)[:, None]).sum(0).double()
            self.part_xy[index].addmm_(narrow.T, y)
        self.part_rows += len(x)
        if self.part_rows >= _PART:
            self.flush()

    def flush(self) -> None:
        """Move x y^T of the last rows into the float64 sums."""
        for total, part in zip(self.sum_xy, self.part_xy, strict=True):
            total += part
            part.zero_()
        self.part_rows = 0

    def merge(self, other: "Moments") -> None:
        """Add the rows of other moments that were taken about the same shifts."""
        other.flush()
        self.rows += other.rows
        self.count += other.count
        self.sum_x += other.sum_x
        self.sum_xx += other.sum_xx
        for mine, theirs in zip(
            (*self.sum_y, *self.sum_xy, *self.sum_yy), (*other.sum_y, *other.sum_xy, *other.sum_yy), strict=True
        ):
            mine += theirs

    @property
    def mean_x(self) -> Tensor:
        """Mean input [d]."""
        return self.shift_x.double() + self.sum_x / self.count

    def mean_y(self, target: int) -> Tensor:
        """Mean of a target [e]."""
        return self.shift_y[target].double() + self.sum_y[target] / self.count

    @property
    def cxx(self) -> Tensor:
        """Centred sum of x x^T [d, d]."""
        upper = self.sum_xx.triu()
        full = upper + upper.triu(1).T
        return full - torch.outer(self.sum_x, self.sum_x) / self.count

    def cxy(self, target: int) -> Tensor:
        """Centred sum of x y^T [d, e]."""
        if self.part_rows:
            self.flush()
        return self.sum_xy[target] - torch.outer(self.sum_x, self.sum_y[target]) / self.count

    def cyy(self, target: int) -> Tensor:
        """Centred sum of |y|^2."""
        return self.sum_yy[target] - self.sum_y[target].square().sum() / self.count

    def constant(self, target: int) -> bool:
        """Whether a target is the same in every row, up to the rounding of its mean."""
        rounding = 4 * torch.finfo(self.shift_y[target].dtype).eps * self.shift_y[target].double().norm()
        return bool(self.cyy(target) <= self.count * rounding.square())

    def pack(self) -> dict:
        """Plain tensors and numbers, for a file."""
        return {name: getattr(self, name) for name in self.__slots__}

    @staticmethod
    def nbytes(width: int, widths: list[int]) -> int:
        """Memory of the sums for an input and targets of these widths."""
        return 8 * width * width + 12 * width * sum(widths)


def _add_gram(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right in blocks on and above the diagonal; the product is symmetric."""
    for start in range(0, len(total), _BLOCK):
        stop = start + _BLOCK
        total[start:stop, start:].addmm_(left[:, start:stop].T, right[:, start:])
