"""Every cell for every token, in chunks of blocks, with what was not chosen multiplied by zero."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transect.models.memory.backends import reference
from transect.models.memory.backends.cells import Cells
from transect.models.memory.backends.tables import Tables, chunk_bytes, wide_type


def mix(x: Tensor, blocks: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """The reference's numbers, without its intermediate results: best where most blocks are chosen, or blocks are tiny.

    Under `torch.compile` it is the reference, which the compiler fuses. Cost: B / b times the multiply-adds of the
    chosen blocks. Kept for the backward pass: the activation's inputs for all cells, N B g numbers (twice if gated).
    Blocks that nothing chose must hold finite numbers.
    """
    if torch.compiler.is_compiling():
        return reference.mix(x, blocks, weights, tables)
    return _Mix.apply(x, blocks, weights, *tables)  # pyright: ignore[reportReturnType]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, weights: Tensor, *given: Any) -> Tensor:
        tables = Tables._make(given)
        spread = reference.spread_weights(blocks, weights, len(tables.values))
        rules, inner = Cells(tables, dim=1), []
        total = torch.zeros_like(x, dtype=wide_type(x.dtype))
        for chunk in _chunks(tables, x):
            inner.append(_products(x, tables, chunk))
            total += _scaled(rules.value(inner[-1]), spread[:, chunk]) @ tables.values[chunk].flatten(0, 1)
        ctx.save_for_backward(x, blocks, spread, *given[:-1], *inner)
        ctx.activation = tables.activation
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, blocks, spread, *held = ctx.saved_tensors
        count = len(Tables._fields) - 1
        tables, inner = Tables._make([*held[:count], ctx.activation]), held[count:]
        rules, above = Cells(tables, dim=1), gradients[0].contiguous()
        out = [None if table is None else torch.empty_like(table) for table in tables[:-1]]
        keys, up, values, *biases = out
        assert keys is not None and values is not None
        total, moved = torch.zeros_like(x, dtype=wide_type(x.dtype)), torch.empty_like(spread)
        for chunk, z in zip(_chunks(tables, x), inner, strict=True):
            cells, scale = rules.value(z), spread[:, chunk]
            slope = above @ tables.values[chunk].flatten(0, 1).T
            moved[:, chunk] = (slope * cells).unflatten(1, (scale.shape[1], -1)).sum(2)
            torch.mm(_scaled(cells, scale).T, above, out=values[chunk].flatten(0, 1))
            halves = rules.backward(_scaled(slope, scale), z)
            for half, table, own, bias in zip(halves, (tables.keys, tables.up), (keys, up), biases, strict=False):
                assert table is not None and own is not None
                torch.mm(half.T, x, out=own[chunk].flatten(0, 1))
                total += half @ table[chunk].flatten(0, 1)
                if bias is not None:
                    bias[chunk] = half.sum(0).view(-1, bias.shape[1])
        dropped = blocks < 0
        back = moved.gather(1, blocks.masked_fill(dropped, 0)).masked_fill(dropped, 0)
        return total.to(x.dtype), None, back, *out, None


def _chunks(tables: Tables, x: Tensor) -> list[slice]:
    """Ranges of blocks whose cells, for all tokens, fill a chunk (`chunk_bytes`): on a CPU they stay in the cache."""
    count, size = tables.values.shape[:2]
    step = max(1, chunk_bytes(x) // (max(1, len(x)) * size * x.element_size()))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _products(x: Tensor, tables: Tables, chunk: slice) -> Tensor:
    """The activation's inputs [N, cells], or [N, 2 cells] with the linear half of gated cells behind."""
    parts = [reference.product(x, tables.keys[chunk], _part(tables.key_bias, chunk))]
    if tables.up is not None:
        parts.append(reference.product(x, tables.up[chunk], _part(tables.up_bias, chunk)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _part(bias: Tensor | None, chunk: slice) -> Tensor | None:
    return None if bias is None else bias[chunk]


def _scaled(cells: Tensor, scale: Tensor) -> Tensor:
    """cells [N, c g] times scale [N, c], each over its block."""
    return (cells.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
