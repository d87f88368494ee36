"""The memory of a sparse FFN: tables of keys and values in blocks, read where a selector says."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transect.models.activations import Activation
from transect.models.memory.backends import MIXES, READS
from transect.models.memory.backends.tables import Tables
from transect.models.memory.choice import Picker, case_of

INITIAL_STD = 0.02


class Memory(nn.Module):
    """Tables `keys`, `values` and, where gated, `up`, all [blocks, block_size, width].

    A cell's coefficient is f(x k + b1), gated f(x k + b1) (x u + b1'); a token's output is the sum of weight *
    coefficient * value over the cells of its blocks. In Hugging Face's words keys are gate_proj (up_proj where not
    gated), up is up_proj, values the transposed down_proj. `keys` is None where the selector brings its own
    (`with_keys=False`); `key_bias` and `up_bias` [blocks, block_size] are None without biases. The output bias is the
    FFN's. `picker` says which back end computes it, and keeps what it chose. Raises ValueError for a gated memory
    without keys: its linear half would be a second key table. Source: Avg-K 3.1.
    """

    def __init__(
        self,
        width: int,
        blocks: int,
        block_size: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
        with_keys: bool = True,
        picker: Picker | None = None,
    ) -> None:
        if gated and not with_keys:
            raise ValueError("a gated memory needs keys; give gated=False or with_keys=True")
        super().__init__()
        self.width, self.blocks, self.block_size = width, blocks, block_size
        self.activation = Activation(activation)
        self.picker = Picker() if picker is None else picker
        shape = (blocks, block_size, width)
        self.keys = nn.Parameter(torch.empty(shape)) if with_keys else None
        self.up = nn.Parameter(torch.empty(shape)) if gated else None
        self.values = nn.Parameter(torch.empty(shape))
        self.key_bias = nn.Parameter(torch.empty(shape[:2])) if bias and with_keys else None
        self.up_bias = nn.Parameter(torch.empty(shape[:2])) if bias and gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Tables normal with std 0.02, biases 0; a model draws them anew by its own rules."""
        for table in (self.keys, self.up, self.values):
            if table is not None:
                nn.init.normal_(table, std=INITIAL_STD)
        for bias in (self.key_bias, self.up_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, blocks: Tensor, weights: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """x [N, d]; blocks [N, b], -1 dropped, else distinct within a row; weights [N, b] -> [N, d].

        coefficients [N, b] stand in place of f(x k) (block size 1). Without keys and coefficients, weights are all
        there is. Products are made in the type of x, or autocast's. Raises ValueError for coefficients of a gated
        memory: its cells multiply f(x k) once more, so that a selector that made them would spare nothing; the settings
        refuse selectors with keys of their own there, and `vanilla_m` gives none.
        """
        if coefficients is not None:
            if self.up is not None:
                raise ValueError("coefficients are for memories that are not gated; give None")
            weights = weights * coefficients
        dtype = product_type(x)
        x, weights = x.to(dtype), weights.to(dtype)
        keys, up, values, key_bias, up_bias = self.tables()
        assert values is not None
        values = values.to(dtype)
        if keys is not None and coefficients is None:
            tables = Tables(keys, up, values, key_bias, up_bias, self.activation.name).to(dtype)
            way = self.picker.pick(case_of("mix", values, blocks.shape[1], len(x)))
            return MIXES[way](x, blocks, weights, tables)
        way = self.picker.pick(case_of("read", values, blocks.shape[1], len(x)))
        return READS[way](blocks, weights, values)

    def tables(self) -> tuple[Tensor | None, ...]:
        """keys, up, values, key_bias and up_bias, as this process computes with them."""
        return self.keys, self.up, self.values, self.key_bias, self.up_bias

    def of_blocks(self, made: Callable[[Tensor, Tensor | None, range], Tensor]) -> Tensor:
        """One entry for each block [blocks, ...], made of its keys: how a selector may read them.

        `made` is given the keys [n, block_size, width] and key biases [n, block_size] of some blocks, all of them or
        those that this process has, and their numbers.
        """
        keys, _, _, bias, _ = self.tables()
        assert keys is not None
        return made(keys, bias, range(len(keys)))

    def flops(self, active: int) -> float:
        """Forward FLOPs per token with `active` blocks, two for a multiply-add: 2 d per cell and table."""
        held = sum(table is not None for table in (self.keys, self.up, self.values))
        return 2.0 * held * self.width * self.block_size * active

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, block_size={self.block_size}, width={self.width}"


def product_type(x: Tensor) -> torch.dtype:
    """That of x, or autocast's, as for linear maps."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)
