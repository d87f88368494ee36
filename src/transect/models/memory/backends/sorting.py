"""(token, slot) pairs in the order of their blocks."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Pairs that were not dropped, by block, then by token.

    tokens [pairs]; order [pairs], their places among the N b slots; counts, pairs of each block.
    """

    tokens: Tensor
    order: Tensor
    counts: list[int]


def sort_pairs(blocks: Tensor, count: int) -> Sorted:
    """The pairs of blocks [N, b] (-1 = dropped) for `count` blocks; the counts are read back from the device."""
    flat = blocks.flatten()
    narrow = torch.int16 if count < 2**15 else torch.int32  # fewer passes of the radix sort
    order = flat.to(narrow).argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=count + 1).tolist()
    order = order[counts[0] :]  # -1 sorts first
    return Sorted(order // max(blocks.shape[1], 1), order, counts[1:])
