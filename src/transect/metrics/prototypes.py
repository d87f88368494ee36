"""Token prediction by prototypes: is the nearest class mean the state's own class?"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from transect.metrics.angles import widened
from transect.metrics.kmeans import add_rows, first_least

_BLOCK = 1 << 22


@dataclass(slots=True, eq=False)
class PrototypeSums:
    """Sums [2, classes, d] of the states' unit vectors by half of the data and class, and their counts [2, classes].

    Classes are the kept targets, numbered from 0 in the order of their ids. Memory: 2 classes d numbers.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def empty(
        cls, classes: int, width: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Self:
        """No states yet."""
        sums = torch.zeros(2, classes, width, dtype=dtype, device=device)
        return cls(sums, torch.zeros(2, classes, dtype=torch.int64, device=device))

    def add(self, states: Tensor, class_index: Tensor, half: Tensor) -> None:
        """Add states [n, d] of classes [n] and halves [n] (0 or 1); class -1 means not kept and is passed over.

        A zero state has no direction and adds nothing, to the count neither.
        """
        units, directed = _units(states)
        used = directed & (class_index >= 0)
        index = (half * self.counts.shape[1] + class_index)[used]
        add_rows(self.sums.flatten(0, 1), index, units[used].to(self.sums.dtype))
        self.counts += torch.bincount(index, minlength=self.counts.numel()).view_as(self.counts)

    def pack(self) -> dict:
        """Plain tensors, for a file."""
        return {"sums": self.sums, "counts": self.counts}


@dataclass(frozen=True, slots=True, eq=False)
class Prototypes:
    """Unit vectors of the classes, from all states (`same` [classes, d]) and from each half (`halves` [2, classes, d]).

    `same_known` [classes] and `halves_known` [2, classes] say which classes have one: those with states whose
    directions do not cancel. The others' vectors are zero and are never predicted.
    """

    same: Tensor
    same_known: Tensor
    halves: Tensor
    halves_known: Tensor


def prototypes(sums: PrototypeSums) -> Prototypes:
    """P_t = S_t / |S_t| with S_t the sum of the unit vectors of class t. Source: arXiv 2403.02436, our notes 3.7."""
    return Prototypes(*_units(sums.sums.sum(0)), *_units(sums.sums))


def hits(states: Tensor, class_index: Tensor, half: Tensor, known: Prototypes) -> tuple[Tensor, Tensor, Tensor]:
    """Which states [n, d] have their highest cosine with the prototype of their own class; the lowest of equal ones.

    Returns three [n] bool: hit among prototypes of all states, hit among those of the other half, and whether the
    state counts for the latter, which it does when its class has a prototype there. In-sample accuracy is the mean of
    the first over states of kept classes, held-out accuracy the sum of the second over that of the third. A state of
    class -1 neither hits nor counts; a zero state counts and misses. Cost: 2 n classes d multiplications, in the dtype
    of the states, float32 at least; rows are cut so that a block of cosines has four million numbers.
    Source: arXiv 2403.02436, our notes 3.7 (`same` and `split_half`).
    """
    units, directed = _units(states)
    kept = class_index >= 0
    other = 1 - half
    counted = kept & known.halves_known[other, class_index.clamp_min(0)]

    def hit(asked: Tensor, vectors: Tensor, among: Tensor) -> Tensor:
        result = torch.zeros_like(kept)
        rows = (asked & directed).nonzero()[:, 0]
        result[rows] = _nearest(units[rows], vectors, among) == class_index[rows]
        return result

    same = hit(kept & known.same_known[class_index.clamp_min(0)], known.same, known.same_known)
    split = [hit(counted & (other == part), known.halves[part], known.halves_known[part]) for part in (0, 1)]
    return same, split[0] | split[1], counted


def _nearest(units: Tensor, vectors: Tensor, among: Tensor) -> Tensor:
    """Class of the highest product among some (at least one), the lowest of equal ones."""
    barred = torch.zeros(len(among), dtype=units.dtype, device=units.device).masked_fill_(~among, torch.inf)
    across = vectors.to(units.dtype).T
    rows = max(_BLOCK // len(among), 1)
    return torch.cat([first_least(torch.addmm(barred, chunk, across, alpha=-1)) for chunk in units.split(rows)])


def _units(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors along the last axis at length 1, and which had a length; the others stay zero."""
    wide = widened(vectors)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    directed = length > 0
    return wide / torch.where(directed, length, 1.0), directed[..., 0]
