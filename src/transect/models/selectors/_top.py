"""The best of a row, ties to the lowest number, on every device and without looking at the data."""

from typing import NamedTuple

import torch
from torch import Tensor

from transect.models.recompute import decided

_LAST = 2**31 - 1
_ROOM = {"cpu": 2**17}  # sort keys held at a time: 1 MiB, so that they stay in the cache
_ROOM_ELSEWHERE = 2**26


class Best(NamedTuple):
    """indices [rows, count], best first; margin [rows] is the last kept score less the best one left out, or None."""

    indices: Tensor
    margin: Tensor | None


def best(scores: Tensor, count: int, labels: Tensor | None = None) -> Best:
    """The `count` largest of each row of [rows, n], equal scores to the lowest index; no gradient.

    labels [rows, n], whole numbers below 2^31, stand in place of the indices, in ties too. `torch.topk` promises
    nothing about ties; here score and index make one 64-bit number, and no two of those are equal. Float64 scores,
    which do not fit, are sorted. Cost: O(n) per row, about that of `torch.topk`.
    """
    scores = scores.detach()
    places = torch.arange(scores.shape[1], device=scores.device)[None] if labels is None else labels
    wanted = min(count + 1, scores.shape[1])
    find = _by_sorting if scores.dtype == torch.float64 else _by_keys
    rows = max(1, _ROOM.get(scores.device.type, _ROOM_ELSEWHERE) // max(1, scores.shape[1]))
    pieces = scores.split(rows)
    names = [places] * len(pieces) if labels is None else places.split(rows)
    parts = [find(piece, wanted, name) for piece, name in zip(pieces, names, strict=True)]
    found, values = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    margin = values[:, count - 1] - values[:, count] if wanted > count else None
    return Best(found[:, :count], margin)


def _by_keys(scores: Tensor, count: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    bits = (scores.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are a tie
    keys = _in_order(bits).long().bitwise_left_shift_(32).bitwise_or_(_LAST - labels)
    top = keys.topk(count).values
    return _LAST - (top & _LAST), _in_order((top >> 32).int()).view(torch.float32)


def _in_order(bits: Tensor) -> Tensor:
    """Bits of float32 as whole numbers of the same order; applied again, the bits."""
    return bits ^ ((bits >> 31) & _LAST)


def _by_sorting(scores: Tensor, count: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    labels, places = labels.expand_as(scores).sort(dim=1)
    values, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return labels.gather(1, decided(order))[:, :count], values[:, :count]
