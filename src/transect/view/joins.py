"""What is seen of a layer's tensors, and one addition of branches to the stream as it was read off them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from transect.view.layout import Tap
from transect.view.tensors import Key
from transect.view.trace import Call


@dataclass(slots=True, eq=False)
class Spot:
    """A tensor seen at one place: the call, the side and the key, with its value in float64.

    `mixed` says that another position of the stream can reach it.
    """

    call: Call
    side: str
    key: Key
    value: Tensor
    mixed: bool

    def tap(self, scale: float = 1.0) -> Tap:
        return Tap(
            self.call.path, self.side, self.key, self.call.nth, scale, self.call.overwritten(self.side, self.key)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Join:
    """One addition as it was read: total = number * stream + sum of scale * branch, through a norm where there is one.

    `end` is where the stream is seen after it; None: it leaves the layer. `sum_norm`: the branches are normed together
    before they are added.
    """

    branches: tuple[tuple[Spot, float], ...]
    number: float = 1.0
    end: Spot | None = None
    norm: str | None = None
    sum_norm: str | None = None


def distinct(spots: list[Spot]) -> list[list[Spot]]:
    """The spots in groups of equal value and mixing, by first appearance."""
    groups: list[list[Spot]] = []
    by_sum: dict[tuple, list[list[Spot]]] = {}
    for spot in spots:
        alike = by_sum.setdefault((spot.mixed, spot.value.shape, float(spot.value.sum())), [])
        mine = next((group for group in alike if torch.equal(group[0].value, spot.value)), None)
        if mine is None:
            alike.append([spot])
            groups.append(alike[-1])
        else:
            mine.append(spot)
    return groups
