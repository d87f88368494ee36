"""The plain way: every cell for every token, times a matrix of weights. All other ways must equal it."""

import torch
from torch import Tensor
from torch.nn import functional

from transect.models.memory.backends.tables import Tables


def mix(x: Tensor, blocks: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """sum over slots of weights * f(x K^(i)^T + b1^(i)) V^(i), as (f(x K^T + b1) * W) V with W [N, B].

    x [N, d], blocks and weights [N, b], -1 where dropped -> [N, d]. Source: Avg-K 3.5, the exact form.
    Cost: B / b times the multiply-adds of the chosen blocks; memory N B g numbers, several times under autograd.
    """
    cells = tables.function(product(x, tables.keys, tables.key_bias))
    if tables.up is not None:
        cells = cells * product(x, tables.up, tables.up_bias)
    spread = spread_weights(blocks, weights, len(tables.values))
    weighted = cells.unflatten(1, tables.values.shape[:2]) * spread[:, :, None]
    return weighted.flatten(1) @ tables.values.flatten(0, 1)


def read(blocks: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """sum over slots of weights * v, the coefficients being in the weights: block size 1, values [B, 1, d]."""
    return spread_weights(blocks, weights, len(values)) @ values.flatten(0, 1)


def spread_weights(blocks: Tensor, weights: Tensor, count: int) -> Tensor:
    """The weights as a matrix [N, count], 0 where a block was not chosen."""
    dropped = blocks < 0
    spread = torch.zeros(len(blocks), count, dtype=weights.dtype, device=weights.device)
    return spread.scatter_add(1, blocks.masked_fill(dropped, 0), weights.masked_fill(dropped, 0))


def product(x: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, d] with every row of a table [B, g, d]: [N, B g]."""
    return functional.linear(x, table.flatten(0, 1), None if bias is None else bias.flatten())
