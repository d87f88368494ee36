"""Jump rate: how much the displacement rises from one layer to the next, up to the last."""

import torch
from torch import Tensor


def jump_rate(displacements: Tensor, start: int) -> Tensor:
    """zeta_start = 100 sum over k = start..L of max(0, Psi_k - Psi_{k-1}), layers counted from 1 as in the paper.

    `displacements` [..., L] holds Psi_1..Psi_L; the result is [...], in percent points, 0 to 100 (L - 1). Raises
    ValueError unless 2 <= start <= L: zeta_1 would need a Psi_0. Source: arXiv 2601.18302, jump rate.
    """
    layers = displacements.shape[-1]
    if not 2 <= start <= layers:
        raise ValueError(f"jump rate from layer {start}: allowed are 2 to {layers}, counted from 1")
    return 100 * displacements.diff(dim=-1)[..., start - 2 :].clamp_min(0).sum(-1)


def hinge_rate(before: Tensor, after: Tensor) -> Tensor:
    """max(0, after - before): one layer's share of the jump rate, for averages taken token by token."""
    return torch.clamp_min(after - before, 0)
