"""A block that takes only so many tokens: which of them it keeps."""

import math
from typing import Literal

import torch
from torch import Tensor

Drop = Literal["order", "choice", "score"]


def capacity(factor: float, tokens: int, active: int, blocks: int) -> int:
    """int(c ceil(N b / B)), the tokens that one block takes. Source: Avg-K 3.4."""
    return int(factor * math.ceil(tokens * active / blocks))


def within_capacity(blocks: Tensor, scores: Tensor, wanted: Tensor, factor: float, total: int, drop: Drop) -> Tensor:
    """Which pairs of token and slot a block keeps; True in [tokens, b].

    Only pairs with `wanted` [tokens, b] compete, and only tokens that want any count as tokens. A block keeps the
    first: by `order` of the tokens; by `choice`, first choices of all tokens before second ones; by `score` [tokens,
    b], the highest, then by order. Cost: a sort of the pairs, nothing is read back from the device.
    """
    tokens, active = blocks.shape
    places = torch.arange(tokens * active, device=blocks.device)
    if drop == "choice":  # slot by slot
        places = places.view(tokens, active).t().flatten()
    elif drop == "score":
        places = scores.detach().flatten().argsort(descending=True, stable=True)
    owner = blocks.where(wanted, blocks.new_full((), total)).flatten()[places]
    owner, order = owner.sort(stable=True)
    first = torch.searchsorted(owner, owner)
    rank = torch.arange(len(owner), device=blocks.device) - first
    room = (torch.ceil(wanted.any(1).sum().double() * active / total) * factor).floor()
    kept = torch.zeros_like(owner, dtype=torch.bool)
    kept[places[order]] = (rank < room) & (owner < total)
    return kept.view(tokens, active)
