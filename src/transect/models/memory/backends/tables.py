"""What every way to compute a memory is given."""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from transect.models.activations import ACTIVATIONS

Given = ParamSpec("Given")
Made = TypeVar("Made")


class Tables(NamedTuple):
    """The tables of a memory of B blocks of g cells: keys, up and values [B, g, d], key_bias and up_bias [B, g].

    up is None unless gated, biases are None where there are none. activation is the name of f.
    """

    keys: Tensor
    up: Tensor | None
    values: Tensor
    key_bias: Tensor | None
    up_bias: Tensor | None
    activation: str

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """f itself."""
        return ACTIVATIONS[self.activation]

    def to(self, dtype: torch.dtype) -> "Tables":
        """The same in another type."""
        return Tables._make([None if part is None else part.to(dtype) for part in self[:-1]] + [self.activation])


Mix = Callable[[Tensor, Tensor, Tensor, Tables], Tensor]
"""x [N, d], blocks [N, b] (-1 dropped, else distinct within a row), weights [N, b], tables -> [N, d]."""
Read = Callable[[Tensor, Tensor, Tensor], Tensor]
"""blocks [N, b], weights [N, b], values [B, 1, d] -> [N, d]."""
CHUNK_BYTES = {"cpu": 1 << 22}
"""Intermediate results made at a time: 4 MiB on a CPU, whose cache they stay in."""
CHUNK_BYTES_ELSEWHERE = 1 << 28
"""On an accelerator 256 MiB, where few and large steps are what counts; not measured."""


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over blocks are kept and scores are ranked: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def chunk_bytes(x: Tensor) -> int:
    """How much to make at a time where x lies."""
    return CHUNK_BYTES.get(x.device.type, CHUNK_BYTES_ELSEWHERE)


def eagerly(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function that `torch.compile` leaves as it is, between compiled parts."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]
