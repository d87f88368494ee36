"""Gradients of all processes together: their sum, their norm."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET = 1 << 25
"""Numbers that travel at a time: 128 MiB of float32."""


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, itself and no copy; without its gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that are there."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def sum_over(gradients: Sequence[Tensor], group: "ProcessGroup") -> None:
    """Gradients, in place, become their sums over the processes of a group; all must hold the same ones.

    Several travel together, in buckets of at most `BUCKET` numbers, a larger gradient alone.
    """
    parts = [local(gradient) for gradient in gradients]
    for dtype in dict.fromkeys(part.dtype for part in parts):
        bucket: list[Tensor] = []
        for part in [part for part in parts if part.dtype == dtype]:
            if bucket and sum(held.numel() for held in bucket) + part.numel() > BUCKET:
                _sum_together(bucket, group)
                bucket = []
            bucket.append(part)
        _sum_together(bucket, group)


def _sum_together(parts: list[Tensor], group: "ProcessGroup") -> None:
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


@torch.no_grad()
def clip(gradients: Sequence[Tensor], limit: float | None, size: int, device: torch.device) -> Tensor:
    """The norm of all gradients of all `size` processes, which are scaled in place so that it is `limit` at most.

    Each process adds the squares of its parts, divided by how many processes hold the same part; the sum travels once,
    so that all get the same bits. Squares are added in float64, or float32 where the device has no other.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    total = torch.zeros((), dtype=wide, device=device)
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(size // _parts(gradient), []).append(local(gradient))
    for copies, parts in by_copies.items():
        total += nn.utils.get_total_norm(parts).to(device, wide).square() / copies
    if size > 1:
        dist.all_reduce(total)
    norm = total.sqrt()
    if limit is not None:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            part = local(gradient)
            part.mul_(factor.to(part.dtype))
    return norm


def _parts(gradient: Tensor) -> int:
    """How many processes together hold a whole gradient."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(place) for place, how in enumerate(gradient.placements) if not how.is_replicate())
