"""Streaming k-means: states come in mini-batches, once, and are not kept; equal data give equal centres."""

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

from transect.errors import InputError

BATCH = 1024
"""Rows of a mini-batch; the caller cuts them, so that its forward batches do not matter."""

_LLOYD = 10
_GAIN = 1e-3
_STARTS = 256
_ROUNDING = 64


def buffer_rows(clusters: int) -> int:
    """Rows collected before the centres start: three a cluster, and at least six mini-batches."""
    return max(3 * clusters, 6 * BATCH)


def assign(states: Tensor, centres: Tensor) -> Tensor:
    """Nearest centre of each state, argmin_k |x - C_k|^2; the lowest index of equally near ones.

    `states` [n, d] and `centres` [K, d] of one dtype and device -> [n] int64. Cost: n K d multiplications and one
    block [1024, K] of memory.
    """
    return _nearest(states, centres)[0]


def inertia(states: Tensor, centres: Tensor) -> float:
    """Sum over states [n, d] of the squared distance to the nearest of `centres` [K, d], from 0. Cost: as `assign`."""
    return float(_nearest(states, centres)[1].sum(dtype=torch.float64))


def start(buffer: Tensor, clusters: int, seeds: list[int]) -> list[Tensor]:
    """Centres [K, d] for each seed: greedy k-means++ on the rows of `buffer` [n, d], then Lloyd steps on them.

    Each step of k-means++ draws 2 + floor(ln K) rows by their squared distance to the nearest centre and keeps the one
    that leaves the least. Lloyd steps go on, up to ten, while the inertia falls by 0.1 %; a centre that lost all its
    rows is drawn anew as k-means++ draws. With few clusters, where a bad start is likely and a further one is cheap,
    the best of up to ten starts is taken. The products of all rows are computed once for all seeds. Raises InputError
    for fewer rows than clusters. Cost: n^2 d + seeds (K n ln K + 10 n K d) multiplications, n^2 numbers of memory.
    Source: arXiv 2403.02436, section 3.6 of our notes, whose start is k-means++ alone.
    """
    if len(buffer) < clusters:
        raise InputError(
            f"k-means: {len(buffer)} states for {clusters} clusters; "
            "give at least as many states as clusters, or fewer clusters"
        )
    gram = _gram(buffer)
    return [_start(buffer, gram, clusters, seed) for seed in seeds]


def start_work(clusters: int, width: int, seeds: int) -> float:
    """Floating-point operations that take as long as `start`: products of all rows, draws, then Lloyd steps."""
    rows = float(buffer_rows(clusters))
    drawn = 8000 * rows * clusters  # reads memory, computes little
    return 2 * rows * rows * width + seeds * _tries(clusters) * (drawn + _LLOYD * rows * width * (2 * clusters + 100))


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index[i]] += rows[i] for all i in the same order every time, also where many rows share an index."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:  # index_add_ adds in a random order there
        total.index_put_((index,), rows, accumulate=True)


def first_least(scores: Tensor) -> Tensor:
    """Index of the first least element of each row [n, m] -> [n]; ten times faster through NumPy where that can be."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.argmin(scores.numpy(), axis=1))
    return scores.argmin(1)


class MiniBatchKMeans:
    """K centres learned in one pass over mini-batches of 1024 states; ready for `assign` after `finish`.

    The first `buffer_rows(K)` states are kept for `start`; their hits are the first counts n_k. From then on, for the
    rows j(x) = k of each mini-batch: n_k += hits_k; C_k += (sum x - hits_k C_k) / n_k, so a centre is the mean of all
    the states that ever chose it. Centres that the start lacked, because its rows were too much alike, are added as
    rows of the mini-batches that lie on no centre, drawn as k-means++ draws; with fewer distinct states than clusters
    there are fewer centres. A centre that no state chooses any more stays: moving it was measured to lose. Give the
    states in an order that is not sorted by what they are, or the inertia ends a tenth higher and more.
    Memory: buffer_rows(K) d numbers, then K d. Cost: K d multiplications a state. Source: arXiv 2403.02436 (mini-batch
    k-means, 2000 clusters, k-means++, batch 1024); Lloyd steps, first counts and starved centres are ours.
    """

    __slots__ = ("buffer", "centres", "clusters", "counts", "rows", "seed")

    def __init__(self, clusters: int, seed: int) -> None:
        if clusters < 1:
            raise InputError(f"k-means: {clusters} clusters given; give 1 or more")
        self.clusters = clusters
        self.seed = seed
        self.rows = 0
        self.buffer: list[Tensor] = []
        self.centres = torch.empty(0)
        self.counts = torch.empty(0, dtype=torch.int64)

    @property
    def started(self) -> bool:
        """Whether there are centres already."""
        return len(self.centres) > 0

    def partial_fit(self, states: Tensor) -> None:
        """Learn from a mini-batch of states [n, d], float32 or float64; cut 1024 rows, and fewer only at the end."""
        partial_fit_together([self], states)

    def finish(self) -> Tensor:
        """The centres [K, d], started from the states there are if these never filled the buffer.

        Raises InputError where there were fewer states than clusters.
        """
        return finish_together([self])[0]

    def pack(self) -> dict:
        """Plain tensors and numbers, for a file."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def unpack(cls, packed: dict) -> Self:
        """The same state of learning again."""
        model = cls(packed["clusters"], packed["seed"])
        for name in cls.__slots__:
            setattr(model, name, packed[name])
        return model

    def _begin(self, centres: Tensor, buffer: Tensor) -> None:
        self.centres = centres
        self.counts = torch.bincount(assign(buffer, centres), minlength=len(centres))
        self.buffer = []

    def _update(self, states: Tensor) -> None:
        labels, distance = _nearest(states, self.centres)
        missing = self.clusters - len(self.centres)
        if missing:
            generator = torch.Generator().manual_seed(self.seed + self.rows)
            added = states[_spread(_gram(states), distance, missing, generator)]
            if len(added):
                self.centres = torch.cat([self.centres, added])
                self.counts = torch.cat([self.counts, self.counts.new_zeros(len(added))])
                labels = assign(states, self.centres)
        self.rows += len(states)
        hits = torch.bincount(labels, minlength=len(self.centres))
        self.counts += hits
        self.centres += _pull(states, labels, self.centres).div_(self.counts.clamp_min(1)[:, None])


def partial_fit_together(models: list[MiniBatchKMeans], states: Tensor) -> None:
    """`partial_fit` of models that differ in nothing but their seed and saw the same states.

    They share one buffer and the costly part of the start.
    """
    first = models[0]
    if first.started:
        for model in models:
            model._update(states)
        return
    kept = states.clone()
    for model in models:
        model.buffer.append(kept)
        model.rows += len(kept)
    if first.rows >= buffer_rows(first.clusters):
        _begin_together(models)


def finish_together(models: list[MiniBatchKMeans]) -> list[Tensor]:
    """`finish` of models that differ in nothing but their seed and saw the same states."""
    if not models[0].started:
        _begin_together(models)
    return [model.centres for model in models]


def _begin_together(models: list[MiniBatchKMeans]) -> None:
    first = models[0]
    buffer = torch.cat(first.buffer) if first.buffer else torch.empty(0, 1)
    centres = start(buffer, first.clusters, [model.seed for model in models])
    for model, own in zip(models, centres, strict=True):
        model._begin(own, buffer)


def _tries(clusters: int) -> int:
    """How many starts there are: with few clusters a bad one is likely and a further one cheap."""
    return min(max(_STARTS // clusters, 1), 10)


def _start(buffer: Tensor, gram: Tensor, clusters: int, seed: int) -> Tensor:
    """The best of the starts of one seed."""
    generator = torch.Generator().manual_seed(seed)
    anywhere = torch.full((len(buffer),), float(gram.diagonal().max()) or 1.0, dtype=gram.dtype)
    starts = []
    for _ in range(_tries(clusters)):
        rows = _spread(gram, anywhere, clusters, generator)
        starts.append(_lloyd(buffer, gram, buffer[rows], clusters, generator))
    return min(starts, key=lambda pair: pair[1])[0]


def _lloyd(
    buffer: Tensor, gram: Tensor, centres: Tensor, clusters: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Centres after Lloyd steps, and the inertia before the last of them."""
    before = math.inf
    for _ in range(_LLOYD):
        labels, distance = _nearest(buffer, centres)
        left = float(distance.sum(dtype=torch.float64))
        if left >= (1 - _GAIN) * before:
            break
        before = left
        hits = torch.bincount(labels, minlength=len(centres))
        centres = (centres + _pull(buffer, labels, centres) / hits.clamp_min(1)[:, None])[hits > 0]
        if len(centres) < clusters:
            lost = _spread(gram, distance, clusters - len(centres), generator)
            centres = torch.cat([centres, buffer[lost]])
    return centres, before


def _spread(gram: Tensor, closest: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` rows by greedy k-means++, given all products and each row's squared distance to what is there.

    Rows whose distance is rounding are never drawn; all on the CPU, where sums have one order.
    """
    squares = gram.diagonal()
    floor = _ROUNDING * torch.finfo(gram.dtype).eps * squares
    closest = torch.where(closest.cpu() > floor, closest.cpu(), 0.0)
    chosen = []
    for _ in range(count):
        reach = closest.cumsum(0, dtype=torch.float64)
        if not reach[-1] > 0:
            break
        draws = torch.rand(2 + int(math.log(count)), generator=generator, dtype=torch.float64) * reach[-1]
        candidates = torch.searchsorted(reach, draws, right=True).clamp_max(len(reach) - 1)
        distance = (squares[candidates, None] + squares).sub_(gram[candidates], alpha=2)
        left = torch.minimum(torch.where(distance > floor, distance, 0.0), closest)
        best = int(left.sum(1).argmin())
        chosen.append(int(candidates[best]))
        closest = left[best]
    return torch.tensor(chosen, dtype=torch.int64)


def _nearest(states: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Label and squared distance of each state; both are shifted by the mean centre first, which saves digits."""
    shift = centres.mean(0)
    centred = centres - shift
    half = centred.square().sum(1).div_(2)
    scores = states.new_empty(min(len(states), BATCH), len(centres))
    labels, distances = [], []
    for chunk in states.split(BATCH):
        moved = chunk - shift
        score = torch.addmm(half, moved, centred.T, alpha=-1, out=scores[: len(chunk)])
        label = first_least(score)
        least = score.gather(1, label[:, None])[:, 0]
        labels.append(label)
        distances.append(moved.square().sum(1).add_(least, alpha=2).clamp_min_(0))
    return torch.cat(labels), torch.cat(distances)


def _gram(rows: Tensor) -> Tensor:
    """Products of all rows about their mean, on the CPU."""
    centred = rows - rows.mean(0)
    return (centred @ centred.T).cpu()


def _pull(rows: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Sum of x - C_k over the rows of each centre; a centre of equal states stays exactly on them."""
    total = torch.zeros_like(centres)
    add_rows(total, labels, rows - centres[labels])
    return total
