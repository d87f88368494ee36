"""The torch optimizer behind Muon: momentum whose matrices are made orthogonal."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from transect.train.optimizers._newton_schulz import orthogonalised
from transect.train.optimizers.base import Group

Scale = Literal["keller", "moonlight"]
TOGETHER = 1 << 26
"""Numbers of equal-shaped matrices worked on at once: many small ones fill a GPU, large ones do not pile up."""


class Orthogonal(torch.optim.Optimizer):
    """SGD with momentum for matrices [rows, columns] and stacks of them [blocks, rows, columns], each made orthogonal.

    m = momentum m + (1 - momentum) g; w = (1 - lr wd) w - lr s NS(m, with Nesterov momentum g + momentum (m - g)).
    s is `scaled`. The state of a parameter is one tensor, `momentum`. A sharded parameter's direction is gathered,
    unless it is a stack that is cut between blocks; each process keeps its own part of the result.
    Groups say lr, weight_decay and transposed.
    """

    def __init__(
        self,
        groups: list[Group],
        momentum: float,
        nesterov: bool,
        iterations: int,
        scale: Scale,
        dtype: torch.dtype | None,
    ) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        self.iterations, self.dtype = iterations, dtype
        self.scale: Scale = scale
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for shared in self._together(group):
                self._apply(shared, group)
        return loss

    def _together(self, group: Group) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Parameters, and whole matrices [n, rows, columns] of their directions, of one shape and at most so many."""
        waiting: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            whole = _whole(self._direction(parameter))
            matrices = whole if whole.ndim == 3 else whole[None]
            key = (matrices.shape[1:], matrices.dtype, matrices.device)
            shared = waiting.setdefault(key, [])
            if shared and sum(other.numel() for _, other in shared) + matrices.numel() > TOGETHER:
                yield waiting.pop(key)
                shared = waiting.setdefault(key, [])
            shared.append((parameter, matrices))
        yield from waiting.values()

    def _direction(self, parameter: Tensor) -> Tensor:
        """The momentum after this gradient, laid out as the parameter is."""
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum) if self.nesterov else momentum

    def _apply(self, shared: list[tuple[Tensor, Tensor]], group: Group) -> None:
        matrices = [matrices for _, matrices in shared]
        given = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        made = orthogonalised(given, self.iterations, self.dtype or usual_dtype(given))
        rate = group["lr"] * scaled(self.scale, given.shape[1], given.shape[2], group["transposed"])
        parts = made.split([len(one) for one in matrices])
        for (parameter, _), part in zip(shared, parts, strict=True):
            own = _own_part(part if parameter.ndim == 3 else part[0], parameter)
            here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            here.mul_(1 - group["lr"] * group["weight_decay"]).add_(own, alpha=-rate)


def scaled(scale: Scale, rows: int, columns: int, transposed: bool) -> float:
    """What an orthogonal update is multiplied with.

    `keller`: sqrt(max(1, outputs / inputs)), rows being outputs unless transposed. `moonlight`: 0.2 sqrt(max(rows,
    columns)), by which the root mean square of the update is 0.2, about that of AdamW's (arXiv 2502.16982, 2.2).
    """
    if scale == "moonlight":
        return 0.2 * max(rows, columns) ** 0.5
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    return max(1.0, outputs / inputs) ** 0.5


def usual_dtype(matrices: Tensor) -> torch.dtype:
    """float64 for float64; else bfloat16 on CUDA, whose peak in it is far above float32, and float32 elsewhere."""
    if matrices.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if matrices.device.type == "cuda" else torch.float32


def _by_blocks(parameter: Tensor) -> bool:
    """Whether every process has whole matrices of a stack."""
    kept = (Replicate(), Shard(0))
    return isinstance(parameter, DTensor) and parameter.ndim == 3 and all(p in kept for p in parameter.placements)


def _whole(direction: Tensor) -> Tensor:
    """Whole matrices: those that this process has, or all, gathered."""
    if not isinstance(direction, DTensor):
        return direction
    return direction.to_local() if _by_blocks(direction) else direction.full_tensor()


def _own_part(made: Tensor, parameter: Tensor) -> Tensor:
    """Of what `_whole` gave, what belongs to this process."""
    if not isinstance(parameter, DTensor) or _by_blocks(parameter):
        return made
    # Every process has computed the same: none needs to be sent its part.
    mine = distribute_tensor(made.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return mine.to_local()
