"""How far two states of the stream point apart, token by token, without loss of digits near zero."""

import math

import torch
from torch import Tensor

from transect.metrics.declare import metric


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit(tensor: Tensor, eps: float = 1e-6) -> Tensor:
    """Vectors along the last axis divided by their length, which counts as at least `eps`."""
    wide = widened(tensor)
    return wide / wide.norm(dim=-1, keepdim=True).clamp_min(eps)


@metric(range=(0.0, 1.0), unit="1", symmetric=True, invariant=("scale", "rotate"))
def displacement(before: Tensor, after: Tensor, eps: float = 1e-6) -> Tensor:
    """Psi = |a/|a| - b/|b||^2 / 4 = (1 - cos(a, b)) / 2, over the last axis [..., width] -> [...].

    0 same direction, 0.5 orthogonal, 1 opposite; 0 exactly for equal directions, finite for a zero state. Source:
    arXiv 2601.18302, displacement; computed as a chord, which keeps the digits that the cosine loses near 1.
    """
    return chord_displacement(unit(before, eps), unit(after, eps))


def chord_displacement(before: Tensor, after: Tensor) -> Tensor:
    """`displacement` of vectors that already have length 1."""
    return (before - after).square().sum(-1).div(4).clamp_max(1)


@metric(range=(0.0, 1.0), unit="1", symmetric=True, invariant=("scale", "rotate"))
def angular_distance(before: Tensor, after: Tensor, eps: float = 1e-6) -> Tensor:
    """D = 2 atan2(|u - v|, |u + v|) / pi of unit vectors u, v, over the last axis [..., width] -> [...].

    The angle as a share of 180 degrees: arccos(cos)/pi without its NaN and its lost digits. Psi = sin^2(pi D / 2).
    Source: layer-pruning literature.
    """
    return chord_angle(unit(before, eps), unit(after, eps))


def chord_angle(before: Tensor, after: Tensor) -> Tensor:
    """`angular_distance` of vectors that already have length 1."""
    apart, along = torch.linalg.vector_norm(before - after, dim=-1), torch.linalg.vector_norm(before + after, dim=-1)
    return torch.atan2(apart, along) * (2 / math.pi)


@metric(range=(0.0, 2.0), unit="1", symmetric=True, invariant=("scale", "rotate"))
def block_influence(before: Tensor, after: Tensor, eps: float = 1e-6) -> Tensor:
    """1 - cos(a, b) = 2 Psi, over the last axis. Source: layer-pruning literature."""
    return 2 * displacement(before, after, eps)


@metric(range=(0.0, math.inf), unit="1", symmetric=False, invariant=("rotate",))
def update_ratio(before: Tensor, after: Tensor, eps: float = 1e-6) -> Tensor:
    """|b - a| / |a|, over the last axis; |a| counts as at least `eps`."""
    before, after = widened(before), widened(after)
    return (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(eps)
