"""The grouped way on a CPU: block by block, on tiles of rows small enough to stay in the cache."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transect.models.memory.backends.cells import Cells
from transect.models.memory.backends.sharing import shared_out
from transect.models.memory.backends.sorting import sort_pairs
from transect.models.memory.backends.tables import Tables, eagerly, wide_type

TILE_BYTES = 5 << 19
"""Largest tile of rows, 2.5 MiB: 853 rows of 768 float32. Smaller ones cost more calls, larger ones were no faster."""
SMALL = 64
"""Gated blocks of so few cells are multiplied in one product with keys and linear half together, copied there."""


@eagerly
def mix(x: Tensor, blocks: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """The reference's numbers; only rows that chose a block meet it, and no copy of all (token, slot) rows exists.

    Each tile is gathered, multiplied with the block's keys and values and added to its tokens' rows, in the cache; the
    backward pass gathers again. Kept for it: the inputs of the activation, N b g numbers (2 N b g gated), as in a dense
    FFN of that many units. Blocks that nothing chose are not read and get zero gradients. Under `torch.compile` it
    runs eagerly, between compiled parts.
    """
    pairs = sort_pairs(blocks, len(tables.values))
    picked = weights.flatten().gather(0, pairs.order)
    if not picked.requires_grad and picked.eq(1).all():
        picked = None  # a binary gate costs nothing
    return _Mix.apply(x, pairs.tokens, pairs.counts, picked, *tables)  # pyright: ignore[reportReturnType]


class _Mix(torch.autograd.Function):
    """x [N, d], tokens and weights of the pairs by block, counts of each block, tables -> [N, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, counts: list[int], weights: Tensor | None, *given: Any) -> Tensor:
        tables = Tables._make(given)
        inner = x.new_empty(len(tokens) * _rows(tables))

        def run(tiles: list[_Tile]) -> Tensor:
            stack, rules, room = _Stack(tables), Cells(tables, dim=0), _Room(x)
            total = torch.zeros_like(x, dtype=wide_type(x.dtype))
            for tile in tiles:
                stack.products(tile, room.take(x, tile.tokens))
                cells = tile.weighted(rules.value(tile.z))
                made = torch.mm(cells.T, stack.values[tile.block], out=room.second(len(tile.tokens)))
                total.index_add_(0, tile.tokens, made.to(total.dtype))
            return total

        total = shared_out(run, _tiles(counts, _limit(x), tokens, weights, inner), inner.numel() * x.shape[1])
        ctx.save_for_backward(x, tokens, weights, inner, *given[:-1])
        ctx.counts, ctx.activation = counts, tables.activation
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, tokens, weights, inner, *held = ctx.saved_tensors
        tables = Tables._make([*held, ctx.activation])
        given, out = gradients[0].contiguous(), _Gradients(tables, ctx.counts)
        moved = torch.empty_like(weights) if weights is not None and ctx.needs_input_grad[3] else None

        def run(tiles: list[_Tile]) -> Tensor:
            stack, rules, room = _Stack(tables), Cells(tables, dim=0), _Room(x)
            total = torch.zeros_like(x, dtype=wide_type(x.dtype))
            for tile in tiles:
                above = room.take(given, tile.tokens)
                cells, slope = rules.value(tile.z), torch.mm(stack.values[tile.block], above.T)
                if moved is not None:
                    torch.sum(slope * cells, 0, out=moved[tile.start : tile.start + len(tile.tokens)])
                out.add_values(tile, tile.weighted(cells), above)
                halves = rules.backward(tile.weighted(slope), tile.z)
                out.add_keys(tile, halves, room.take(x, tile.tokens))
                below = stack.back(tile, halves, room.second(len(tile.tokens)))
                total.index_add_(0, tile.tokens, below.to(total.dtype))
            return total

        total = shared_out(run, _tiles(ctx.counts, _limit(x), tokens, weights, inner), inner.numel() * x.shape[1])
        return total.to(x.dtype), None, None, moved, *out.tables, None


class _Tile(NamedTuple):
    """Some pairs of one block, from place `start`: z [rows of keys, tokens], as small products are fastest that way."""

    block: int
    start: int
    first: bool
    tokens: Tensor
    weights: Tensor | None
    z: Tensor

    def weighted(self, cells: Tensor) -> Tensor:
        """[g, tokens] times the weights, if there are any but 1."""
        return cells if self.weights is None else cells * self.weights


def _limit(x: Tensor) -> int:
    """Rows of the largest tile."""
    return max(64, TILE_BYTES // (x.shape[1] * x.element_size()))


def _rows(tables: Tables) -> int:
    """Rows of keys, and of the linear half of gated cells, in one block."""
    return tables.values.shape[1] * (1 if tables.up is None else 2)


def _tiles(counts: list[int], most: int, tokens: Tensor, weights: Tensor | None, inner: Tensor) -> list[_Tile]:
    """The pairs of each block, cut into equal parts of at most `most`."""
    places = [
        (block, part == 0, count * (part + 1) // parts - count * part // parts)
        for block, count in enumerate(counts)
        for parts in (-(-count // most),)
        for part in range(parts)
    ]
    rows, start, tiles = len(inner) // max(1, len(tokens)), 0, []
    sizes = [size for _, _, size in places]
    factors = [None] * len(sizes) if weights is None else weights.split(sizes)
    parts = tokens.split(sizes), factors, inner.split([size * rows for size in sizes])
    for (block, first, size), names, factor, z in zip(places, *parts, strict=True):
        tiles.append(_Tile(block, start, first, names, factor, z.view(rows, size)))
        start += size
    return tiles


class _Stack:
    """What a block is multiplied with: its keys, the linear half of gated cells, its values, its biases."""

    def __init__(self, tables: Tables) -> None:
        size, width = tables.values.shape[1:]
        self.values = tables.values.unbind(0)
        self._keys = [table.unbind(0) for table in (tables.keys, tables.up) if table is not None]
        joined = tables.up is not None and size <= SMALL
        self._joined = tables.values.new_empty(2 * size, width) if joined else None
        held = [bias for bias in (tables.key_bias, tables.up_bias) if bias is not None]
        self._biases = torch.cat(held, 1) if held else None

    def _halves(self, block: int) -> tuple[Tensor, ...]:
        """The keys and the linear half, in one tensor where small."""
        halves = tuple(table[block] for table in self._keys)
        return halves if self._joined is None else (torch.cat(halves, out=self._joined),)

    def products(self, tile: _Tile, x: Tensor) -> None:
        """Fill the tile's z with the products of its rows, biases added."""
        halves = self._halves(tile.block)
        for half, z in zip(halves, tile.z.chunk(len(halves)), strict=True):
            torch.mm(half, x.T, out=z)
        if self._biases is not None:
            tile.z.add_(self._biases[tile.block][:, None])

    def back(self, tile: _Tile, slopes: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The gradient of the tile's rows, given that of z."""
        halves = self._halves(tile.block)
        if len(halves) < len(slopes):
            slopes = (torch.cat(slopes),)
        for place, (slope, half) in enumerate(zip(slopes, halves, strict=True)):
            out.addmm_(slope.T, half, beta=int(place > 0))
        return out


class _Gradients:
    """Gradients of the tables, added up tile by tile; zero for blocks without tiles."""

    def __init__(self, tables: Tables, counts: list[int]) -> None:
        self.tables = tuple(None if table is None else torch.empty_like(table) for table in tables[:-1])
        unused = [block for block, count in enumerate(counts) if not count]
        for table in self.tables:
            if table is not None:
                table[unused] = 0
        keys, up, values, *biases = self.tables
        assert values is not None
        self._values = values.unbind(0)
        self._keys = [table.unbind(0) for table in (keys, up) if table is not None]
        self._biases = [bias.unbind(0) for bias in biases if bias is not None]

    def add_values(self, tile: _Tile, cells: Tensor, above: Tensor) -> None:
        self._values[tile.block].addmm_(cells, above, beta=not tile.first)

    def add_keys(self, tile: _Tile, halves: tuple[Tensor, ...], x: Tensor) -> None:
        for half, table in zip(halves, self._keys, strict=True):
            table[tile.block].addmm_(half, x, beta=not tile.first)
        if self._biases:
            for half, bias in zip(halves, self._biases, strict=True):
                bias[tile.block].copy_(half.sum(1)) if tile.first else bias[tile.block].add_(half.sum(1))


class _Room:
    """Two tiles of scratch, used again and again so that they stay in the cache."""

    def __init__(self, x: Tensor) -> None:
        shape = min(len(x), _limit(x)), x.shape[1]
        self._first, self._second = x.new_empty(shape), x.new_empty(shape)

    def take(self, source: Tensor, tokens: Tensor) -> Tensor:
        """The rows of these tokens, in the first tile."""
        return torch.index_select(source, 0, tokens, out=self._first[: len(tokens)])

    def second(self, count: int) -> Tensor:
        return self._second[:count]
