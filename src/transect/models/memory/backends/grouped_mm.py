"""The grouped way on an accelerator: all blocks in one `grouped_mm`, its rules hidden."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from transect.models.memory.backends import reference
from transect.models.memory.backends.tables import Tables, wide_type

ALIGNMENT = 16
_TYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}


def mix(x: Tensor, blocks: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """The reference's numbers: pairs sorted by block, one grouped product with the keys and one with the values.

    Dropped slots go, with weight 0, to a block that some token chose, so that the host does not wait for the device;
    it does, once a product, where `grouped_mm` refuses the tables and they are multiplied block by block (`product`).
    Kept for the backward pass: copies of all pairs' rows, 2 N b d numbers, and a few times N b g.
    """
    if not blocks.numel():
        return reference.mix(x, blocks, weights, tables)
    flat, scale = blocks.flatten(), weights.flatten()
    dropped = flat < 0
    flat = torch.where(dropped, flat.max().clamp(min=0), flat)
    scale = scale.masked_fill(dropped, 0)
    flat, order = flat.sort(stable=True)
    count = len(tables.values)
    ends = torch.searchsorted(flat, torch.arange(count, device=flat.device), right=True).int()
    rows = x[order // blocks.shape[1]]
    cells = tables.function(_linear(rows, tables.keys, tables.key_bias, flat, ends))
    if tables.up is not None:
        cells = cells * _linear(rows, tables.up, tables.up_bias, flat, ends)
    made = product(cells * scale[order, None], tables.values, ends)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return made[places].unflatten(0, blocks.shape).sum(1, dtype=wide_type(x.dtype)).to(x.dtype)


def product(rows: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
    """rows [P, a] by tables [B, a, c], rows of block i being those before ends[i]: [P, c].

    `grouped_mm` takes float32 and half types on a CPU and bfloat16 on CUDA, whole 16 bytes from row to row, 32-bit
    ends and no broadcast gradients; whatever it would refuse is multiplied block by block, after reading the ends back.
    """
    return _Product.apply(rows, tables, ends)  # pyright: ignore[reportReturnType]


def _linear(rows: Tensor, table: Tensor, bias: Tensor | None, blocks: Tensor, ends: Tensor) -> Tensor:
    made = product(rows, table.transpose(1, 2), ends)
    return made if bias is None else made + bias[blocks]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, tables, ends)
        return _rows_by_tables(rows, tables, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, tables, ends = ctx.saved_tensors
        above = gradients[0].contiguous()
        return _rows_by_tables(above, tables.transpose(1, 2), ends), _rows_by_rows(rows, above, ends), None


def _rows_by_tables(rows: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
    if _accepted(rows, tables):
        return functional.grouped_mm(rows, tables, offs=ends)
    made, start = rows.new_empty(len(rows), tables.shape[2]), 0
    for table, end in zip(tables, ends.tolist(), strict=True):
        made[start:end] = rows[start:end] @ table
        start = end
    return made


def _rows_by_rows(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left^T right of each block's rows, 0 for a block without rows: [B, a, c]."""
    if _accepted(left, right):
        return functional.grouped_mm(left.T, right, offs=ends)
    made, start = left.new_empty(len(ends), left.shape[1], right.shape[1]), 0
    for table, end in zip(made, ends.tolist(), strict=True):
        table.copy_(left[start:end].T @ right[start:end])
        start = end
    return made


def _accepted(*operands: Tensor) -> bool:
    """Whether `grouped_mm` takes these: see `product`."""
    return all(_takes(one) for one in operands)


def _takes(one: Tensor) -> bool:
    strides = sorted(one.stride())
    aligned = all(stride * one.element_size() % ALIGNMENT == 0 for stride in strides[1:])
    aligned = aligned and (torch.compiler.is_compiling() or one.data_ptr() % ALIGNMENT == 0)
    return one.dtype in _TYPES.get(one.device.type, ()) and strides[0] == 1 and aligned and one.numel() > 0
