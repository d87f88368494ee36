"""A block that takes only so many tokens: which of them it keeps."""

from typing import Literal

import torch
from torch import Tensor

from transect.models.recompute import decided

Drop = Literal["order", "choice", "score"]


def within_capacity(blocks: Tensor, scores: Tensor, wanted: Tensor, factor: float, total: int, drop: Drop) -> Tensor:
    """Which pairs of token and slot a block keeps; True in [tokens, b].

    A block takes floor(factor ceil(N b / B)) of N tokens. Only pairs with `wanted` [tokens, b] compete, and only tokens
    that want any count as tokens. A block keeps the first: by `order` of the tokens; by `choice`, first choices of all
    tokens before second ones; by `score` [tokens, b], the highest, then by order. Source: Avg-K 3.4. Cost: a sort of
    the pairs, nothing is read back from the device.
    """
    tokens, active = blocks.shape
    places = torch.arange(tokens * active, device=blocks.device)
    if drop == "choice":  # slot by slot
        places = places.view(tokens, active).t().flatten()
    elif drop == "score":
        places = decided(scores.detach().flatten().argsort(descending=True, stable=True))
    owner = blocks.where(wanted, blocks.new_full((), total)).flatten()[places]
    owner, order = owner.sort(stable=True)
    first = torch.searchsorted(owner, owner)
    rank = torch.arange(len(owner), device=blocks.device) - first
    even = torch.ceil(wanted.any(1).sum().double() * active / total)
    room = (even * factor + 1e-9).floor()  # 1.15 * 100 is a little less than 115
    kept = torch.zeros_like(owner, dtype=torch.bool)
    kept[places[order]] = (rank < room) & (owner < total)
    return kept.view(tokens, active)
