"""Many small products on several cores: whole blocks for each thread, in place of every product for all threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class OfBlock(Protocol):
    """A piece of one block's work, of some tokens."""

    @property
    def block(self) -> int: ...

    @property
    def tokens(self) -> Tensor: ...


Piece = TypeVar("Piece", bound=OfBlock)

WORTH = 1 << 27
"""Multiply-adds from which on starting threads pays."""
LARGE = 1 << 29
"""Multiply-adds of one piece's product from which on PyTorch's own threads share it as well, and more evenly."""


def shared_out(run: Callable[[list[Piece]], Tensor], pieces: list[Piece], work: int) -> Tensor:
    """The sum of what `run` makes of the pieces, by as many threads as PyTorch may use, one core each.

    work: multiply-adds of one product with all pieces. All pieces of a block go to one thread, so that nothing is
    written by two. While they run, PyTorch's own threads are held to one: a product of a few hundred rows takes longer
    on two cores than on one. Sums depend on the number of threads in their last digits, as in any product.
    """
    threads = torch.get_num_threads()
    small = threads > 1 and work >= WORTH and work < LARGE * len(pieces)
    parts = _parts(pieces, threads) if small else [pieces]
    if len(parts) == 1:
        return run(pieces)

    def alone(part: list[Piece]) -> Tensor:
        with torch.no_grad():  # gradients are switched off thread by thread
            return run(part)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(parts)) as pool:
            made = list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(threads)
    total = made[0]
    for other in made[1:]:
        total += other
    return total


def _parts(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """The pieces in their order, in up to `count` parts of about equally many tokens, blocks kept together."""
    whole = sum(len(piece.tokens) for piece in pieces)
    parts: list[list[Piece]] = [[]]
    done = 0
    for piece in pieces:
        full = done >= len(parts) * whole / count
        if full and parts[-1] and parts[-1][-1].block != piece.block:
            parts.append([])
        parts[-1].append(piece)
        done += len(piece.tokens)
    return parts
