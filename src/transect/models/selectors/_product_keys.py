"""Product keys: d_m keys that are all pairs of n1 and n2 half keys, and their exact best."""

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from transect.models.selectors._gates import routed, wide
from transect.models.selectors._scored import Odds, ScoredConfig
from transect.models.selectors._top import best

INITIAL_STD = 0.02


class Pairs(NamedTuple):
    """cells [tokens, k], best first, cell i n2 + j being half keys i and j; their scores; margin as `best` gives it."""

    cells: Tensor
    scores: Tensor
    margin: Tensor | None


def grid(cells: int) -> tuple[int, int]:
    """n1 x n2 = cells, n1 the largest divisor that is not above the root."""
    first = next(n for n in range(math.isqrt(cells), 0, -1) if cells % n == 0)
    return first, cells // first


def best_pairs(first: Tensor, second: Tensor, count: int) -> Pairs:
    """The `count` largest sums of a score of first [tokens, n1] and one of second [tokens, n2]; ties: the lowest cell.

    A pair of the i-th best and the j-th best half is beaten by i j - 1 others, so only pairs with i j <= count are
    looked at, of min(count, n1) x min(count, n2). Exact but for sums that only rounding makes equal. Scores in float32
    or better. Source: Lample et al. 2019, with fewer candidates than its count^2. Cost: `candidates` adds per token.
    """
    first, second = wide(first), wide(second)
    width = second.shape[1]
    wanted = min(count + 1, first.shape[1] * width)  # one more for the margin
    left, right = (best(half, min(wanted, half.shape[1])).indices for half in (first, second))
    i, j = _staircase(left.shape[1], right.shape[1], wanted, first.device)
    labels = left[:, i] * width + right[:, j]
    sums = first.detach().gather(1, left)[:, i] + second.detach().gather(1, right)[:, j]
    cells, margin = best(sums, count, labels)
    return Pairs(cells, first.gather(1, cells // width) + second.gather(1, cells % width), margin)


def candidates(first: int, second: int, count: int) -> int:
    """Pairs that `best_pairs` adds up for each token."""
    wanted = min(count + 1, first * second)
    return _pairs(min(wanted, first), min(wanted, second), wanted)


def _staircase(first: int, second: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0-based ranks i, j with (i + 1) (j + 1) <= count, made where they are used: nothing is copied or read back."""
    rows = min(first, count)
    pairs = _pairs(rows, second, count)
    i = torch.arange(rows, device=device)
    lengths = (count // (i + 1)).clamp_max(second)
    i = i.repeat_interleave(lengths, output_size=pairs)
    return i, torch.arange(pairs, device=device) - (lengths.cumsum(0) - lengths)[i]


def _pairs(first: int, second: int, count: int) -> int:
    return sum(min(second, count // (i + 1)) for i in range(min(first, count)))


def pair_odds(first: Tensor, second: Tensor, real: Tensor | None) -> Odds:
    """Of softmax over all pairs, which is the product of the halves' own; no score of a pair is ever formed."""
    first, second = wide(first), wide(second)
    left, right = first.softmax(-1), second.softmax(-1)
    if real is not None:
        left = left.where(real[:, None], left.new_zeros(()))
    tokens = len(left) if real is None else real.sum()
    probability = routed(left.t(), right.t()).flatten() / torch.as_tensor(tokens, device=left.device).clamp_min(1)
    return Odds(probability, log_partition(first, second))


def log_partition(first: Tensor, second: Tensor) -> Tensor:
    """log of the sum of exp over all pairs [tokens]."""
    return wide(first).logsumexp(-1) + wide(second).logsumexp(-1)


class PairConfig(ScoredConfig):
    """pkm_dim: width d_q of the query, even; half the stream's if not given."""

    pkm_dim: Annotated[int, Field(ge=2, multiple_of=2)] | None = None

    def query_width(self, width: int) -> int:
        """d_q for a stream of that width."""
        return self.pkm_dim or max(2, width // 4 * 2)


class ProductKeys(nn.Module):
    """q = W_q x split in halves; half scores q1 C^T [tokens, n1] and q2 C'^T [tokens, n2], in float32 or better."""

    def __init__(self, width: int, cells: int, query_width: int) -> None:
        super().__init__()
        self.grid = grid(cells)
        self.query = nn.Linear(width, query_width, bias=False)
        self.first = nn.Parameter(torch.empty(self.grid[0], query_width // 2))
        self.second = nn.Parameter(torch.empty(self.grid[1], query_width // 2))
        for table in (self.first, self.second):
            nn.init.normal_(table, std=INITIAL_STD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = routed(x, self.query.weight).chunk(2, dim=-1)
        return routed(left, self.first), routed(right, self.second)

    def flops(self, active: int) -> float:
        """2 d d_q + d_q (n1 + n2), and one add for each candidate."""
        query, width = self.query.weight.shape
        return 2.0 * width * query + query * sum(self.grid) + candidates(*self.grid, active)
