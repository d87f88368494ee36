"""Numbers of an eigenvalue spectrum: how many directions carry the variance."""

import torch
from torch import Tensor

from transect.metrics.declare import metric


def kept(eigenvalues: Tensor, rcond: float) -> Tensor:
    """Which eigenvalues count: those above `rcond` times the largest. [n] -> [n] bool."""
    largest = eigenvalues.max().clamp_min(0)
    return eigenvalues > rcond * largest


def numeric_rank(eigenvalues: Tensor, rcond: float) -> int:
    """How many eigenvalues lie above `rcond` times the largest."""
    return int(kept(eigenvalues, rcond).sum())


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp(-sum p ln p) with p = lambda / sum lambda; 1 to n. Negative eigenvalues (rounding) count as 0."""
    share = eigenvalues.clamp_min(0) / eigenvalues.clamp_min(0).sum()
    return torch.exp(-torch.special.xlogy(share, share).sum())


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    """(sum lambda)^2 / sum lambda^2; 1 to n."""
    positive = eigenvalues.clamp_min(0)
    return positive.sum().square() / positive.square().sum()


def degrees_of_freedom(eigenvalues: Tensor, ridge: float) -> Tensor:
    """df(rho) = sum lambda / (lambda + rho mean(lambda)) over positive eigenvalues; 0 to n."""
    positive = eigenvalues[eigenvalues > 0]
    return (positive / (positive + ridge * eigenvalues.clamp_min(0).mean())).sum()


@metric(range=(-1.0, 1.0), unit="1", symmetric=False, invariant=("scale", "rotate", "order"))
def mean_cosine(vectors: Tensor) -> Tensor:
    """Mean cosine of all pairs i != j of [samples, width]: (n |mu|^2 - 1) / (n - 1), mu the mean unit vector.

    Also called anisotropy and cone size. Exact over all pairs in one pass; zero vectors are refused with ValueError.
    Source: arXiv 2101.04547, cone size.
    """
    length = vectors.norm(dim=-1, keepdim=True)
    if bool((length == 0).any()):
        raise ValueError("mean cosine: a vector is zero and has no direction")
    return pair_cosine((vectors / length).sum(0), len(vectors))


def pair_cosine(unit_sum: Tensor, count: int | float) -> Tensor:
    """Mean cosine over pairs from the sum of `count` unit vectors, [..., width] -> [...]; needs two or more."""
    mean = unit_sum / count
    return (count * mean.square().sum(-1) - 1) / (count - 1)
