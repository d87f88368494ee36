"""One streamed linear fit: moments while fitting, a solution, then sums over the score documents."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from transect.metrics.moments import Moments
from transect.metrics.ridge import Fit, Solver, insample_r2, rcond_for
from transect.metrics.spectrum import effective_rank, participation_ratio

GROUPS = 10
COLUMNS = ("n", "sse", "syy", "cos_n", "cos", "seqs", "seq_cos", "const", "seq_const", "trained", "seq_trained")


@dataclass(frozen=True, slots=True, eq=False)
class Owners:
    """Whose tokens they are: each token's row in the batch, and each row's error unit and hash group."""

    row: Tensor  # [tokens]
    unit: Tensor  # [batch]
    group: Tensor  # [batch]


@dataclass(slots=True, eq=False)
class Spread:
    """Numbers of the input's spectrum on the fit rows, and how many rows there were; rank 0 for a constant input."""

    rows: int
    rank: int
    effective: float
    participation: float
    regular: bool = False  # far from singular

    def pack(self) -> list:
        """Plain numbers."""
        return [self.rows, self.rank, self.effective, self.participation, self.regular]


@dataclass(slots=True, eq=False)
class Group:
    """Fits from one source site to several targets of one layer, on the same rows with the same weights.

    Once the fits are solved, `fit` goes on with all rows: the in-sample value is one of all rows.
    """

    source: str
    elements: tuple[str, ...]
    weighted: bool
    fit: Moments | None = None
    tune: Moments | None = None
    fits: list[Fit] = field(default_factory=list)
    spread: Spread | None = None

    @property
    def filled(self) -> bool:
        """Whether any row has come."""
        return self.fit is not None

    def add(self, phase: str, x: Tensor, ys: list[Tensor]) -> None:
        """Add rows to the moments of their phase; score rows join the fit's once it is solved."""
        weights = _inverse_squares(ys[0]) if self.weighted else None
        if self.fit is None:
            self.fit = Moments.start(x, ys)
        if phase == "tune" and self.tune is None:
            self.tune = Moments.empty(self.fit.shift_x, self.fit.shift_y)
        moments = self.tune if phase == "tune" else self.fit
        assert moments is not None
        moments.add(x, ys, weights)

    def solve(self, ridge: float | None, dtype: torch.dtype) -> None:
        """Solve every target on the fit rows, with the ridge given or the one the tune rows choose."""
        assert self.fit is not None
        if self.fit.rows:
            solver = Solver.of(self.fit, self.tune, rcond_for(dtype), torch.promote_types(dtype, torch.float32))
            values, rank = solver.spectrum.eigenvalues, solver.spectrum.rank
            effective, participation = float(effective_rank(values)), float(participation_ratio(values))
            self.spread = Spread(self.fit.rows, rank, effective, participation, solver.spectrum.regular)
            if rank:
                self.fits = [solver(target, ridge) for target in range(len(self.elements))]
        if self.tune is not None:
            self.fit.merge(self.tune)
            self.tune = None

    def insample(self, dtype: torch.dtype) -> tuple[int, list[float | None]]:
        """The rank of all rows' inputs, and each target's in-sample R^2."""
        assert self.fit is not None
        return insample_r2(self.fit, rcond_for(dtype), self.spread is not None and self.spread.regular)

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {
            "fit": self.fit and self.fit.pack(),
            "tune": self.tune and self.tune.pack(),
            "fits": [[fit.weight, fit.mean_x, fit.mean_y, fit.ridge] for fit in self.fits],
            "spread": self.spread and self.spread.pack(),
        }

    def unpack(self, packed: dict) -> None:
        """Take up what `pack` gave."""
        self.fit = packed["fit"] and Moments(**packed["fit"])
        self.tune = packed["tune"] and Moments(**packed["tune"])
        self.fits = [Fit(*parts) for parts in packed["fits"]]
        self.spread = packed["spread"] and Spread(*packed["spread"])


@dataclass(slots=True, eq=False)
class Scores:
    """Sums over the score rows of one element: by error unit, and of targets about the fit's mean."""

    sums: Tensor  # [units, COLUMNS]
    shift: Tensor  # [e] sum of y - fit mean
    cone: Tensor  # [groups, width of the cone's vectors] sums of unit vectors
    cone_n: Tensor  # [groups]

    @classmethod
    def empty(cls, units: int, width: int, cone_width: int, device: torch.device) -> "Scores":
        """No rows yet; the cone is one of targets or of layer outputs, which may be of another width."""
        wide = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(units, len(COLUMNS), **wide),
            torch.zeros(width, **wide),
            torch.zeros(GROUPS, cone_width, **wide),
            torch.zeros(GROUPS, **wide),
        )

    def add_errors(self, y: Tensor, predicted: Tensor, mean: Tensor, owners: Owners) -> None:
        """Squared errors and squared distances from the fit's mean."""
        centred = y - mean
        self.shift += centred.sum(0).double()
        self._add("n", torch.ones(len(y), dtype=torch.float64, device=y.device), owners)
        self._add("sse", _squares(y - predicted), owners)
        self._add("syy", _squares(centred), owners)

    def add_directions(self, y: Tensor, owners: Owners) -> None:
        """Unit targets, for the cone; a zero target has no direction and is not counted."""
        length = y.norm(dim=1, keepdim=True)
        directed = (length[:, 0] > 0).double()
        group = owners.group[owners.row]
        self.cone.index_add_(0, group, (y / length.clamp_min(1e-30)).double())
        self.cone_n.index_add_(0, group, directed)

    def add_cosines(self, name: str, y: Tensor, predicted: Tensor, owners: Owners) -> None:
        """Cosines token by token and averaged over each sequence; `name` is a column with a `seq_` twin."""
        cosine, directed = _cosine(y, predicted)
        self._add(name, cosine, owners)
        batch = len(owners.unit)
        total = torch.zeros(batch, dtype=torch.float64, device=y.device).index_add_(0, owners.row, cosine)
        count = torch.zeros_like(total).index_add_(0, owners.row, directed)
        self.sums[:, COLUMNS.index(f"seq_{name}")].index_add_(0, owners.unit, total / count.clamp_min(1))
        if name == "cos":
            self._add("cos_n", directed, owners)
            self.sums[:, COLUMNS.index("seqs")].index_add_(0, owners.unit, (count > 0).double())

    def _add(self, name: str, values: Tensor, owners: Owners) -> None:
        self.sums[:, COLUMNS.index(name)].index_add_(0, owners.unit[owners.row], values)

    def pack(self) -> dict:
        """Plain tensors."""
        return {name: getattr(self, name) for name in self.__slots__}


def _cosine(y: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """cos(y, predicted) [tokens] float64, 0 where y is zero, and whether y has a direction; clamped to -1..1."""
    wide = y.norm(dim=1).double(), predicted.norm(dim=1).double()
    product = (y * predicted).sum(1, dtype=torch.float64)
    directed = wide[0] > 0
    return (product / (wide[0] * wide[1]).clamp_min(1e-300)).clamp(-1, 1), directed.double()


def _squares(rows: Tensor) -> Tensor:
    """|row|^2 [tokens] float64."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()


def _inverse_squares(y: Tensor) -> Tensor:
    """1 / |y|^2 [tokens], 0 for a zero target."""
    squares = _squares(y)
    return torch.where(squares > 0, 1 / squares.clamp_min(1e-300), torch.zeros_like(squares))
