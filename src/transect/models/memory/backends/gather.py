"""Rows of the tables fetched token by token: for block size 1 with few active cells, and for decoding."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from transect.models.memory.backends.tables import Tables, chunk_bytes, eagerly


@eagerly
def mix(x: Tensor, blocks: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """The reference's numbers; only rows of chosen blocks are read, each time a token chooses them.

    Best for few chosen cells in all: every (token, cell) reads two rows of d numbers. Rows are fetched a chunk at a
    time (`chunk_bytes`). Kept for the backward pass: a few times N b g numbers. Under `torch.compile` it runs eagerly.
    """
    size = tables.values.shape[1]
    tokens, chosen, scale = _kept(blocks, weights)
    cells = (chosen[:, None] * size + torch.arange(size, device=x.device)).flatten()
    of = tokens.repeat_interleave(size)
    coefficients = tables.function(_scores(x, tables.keys, tables.key_bias, of, cells))
    if tables.up is not None:
        coefficients = coefficients * _scores(x, tables.up, tables.up_bias, of, cells)
    counts = torch.bincount(tokens, minlength=len(x)) * size
    return _bag(tables.values.flatten(0, 1), cells, counts, coefficients * scale.repeat_interleave(size))


@eagerly
def read(blocks: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """sum over slots of weights * v the coefficients being in the weights: block size 1, values [B, 1, d]."""
    tokens, chosen, scale = _kept(blocks, weights)
    return _bag(values.flatten(0, 1), chosen, torch.bincount(tokens, minlength=len(blocks)), scale)


def _kept(blocks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, block and weight of the pairs that were not dropped."""
    tokens, slots = (blocks >= 0).nonzero(as_tuple=True)
    return tokens, blocks[tokens, slots], weights[tokens, slots]


def _bag(rows: Tensor, indices: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows, `counts` of them for each token."""
    starts = counts.cumsum(0) - counts
    return functional.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=weights)


def _scores(x: Tensor, table: Tensor, bias: Tensor | None, tokens: Tensor, cells: Tensor) -> Tensor:
    scores: Any = _Scores.apply(x, table.flatten(0, 1), tokens, cells)
    return scores if bias is None else scores + bias.flatten()[cells]


class _Scores(torch.autograd.Function):
    """x[token] . row[cell] for each pair; tokens do not fall."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, tokens: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(x, rows, tokens, cells)
        scores = x.new_empty(len(tokens))
        step = max(1, chunk_bytes(x) // (x.shape[1] * x.element_size()))
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            scores[part] = torch.linalg.vecdot(x[tokens[part]], rows[cells[part]])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, rows, tokens, cells = ctx.saved_tensors
        counts = torch.bincount(tokens, minlength=len(x))
        with torch.enable_grad():
            source = rows.detach().requires_grad_()
            below = _bag(source, cells, counts, gradients[0].contiguous())
            moved = torch.autograd.grad(below, source, x)[0]
        return below.detach(), moved, None, None
