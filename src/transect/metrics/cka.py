"""Linear CKA: how alike two layers arrange the same tokens, from Gram matrices taken a block of rows at a time."""

import torch
from torch import Tensor

from transect.metrics.declare import metric


@metric(range=(0.0, 1.0), unit="1", symmetric=True, invariant=("scale", "rotate_each", "shift", "order"))
def cka(left: Tensor, right: Tensor) -> Tensor:
    """|X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) of centred [samples, width] matrices; 1 for equal up to rotation and scale.

    Source: Kornblith et al., arXiv 1905.00414. Biased upwards when samples are few against widths.
    """
    left, right = left - left.mean(0), right - right.mean(0)
    cross = (left.T @ right).square().sum()
    return cross / ((left.T @ left).norm() * (right.T @ right).norm())


def gram_products(states: Tensor, block: int = 256) -> Tensor:
    """[layers, layers] float64 of <K_l, K_m> for centred states [layers, samples, width], K = X X^T.

    K is symmetric, so each block of rows goes from the diagonal on. CKA of any pair is products[l, m] /
    sqrt(products[l, l] products[m, m]). Holds [layers, block, samples] at a time.
    Cost: layers x samples^2 x width multiplications.
    """
    layers, samples, _ = states.shape
    total = torch.zeros(layers, layers, dtype=torch.float64, device=states.device)
    for start in range(0, samples, block):
        stop = min(start + block, samples)
        square = torch.stack([state[start:stop] @ state[start:stop].T for state in states]).flatten(1)
        total += (square @ square.T).double()
        if stop < samples:
            beyond = torch.stack([state[start:stop] @ state[stop:].T for state in states]).flatten(1)
            total += 2 * (beyond @ beyond.T).double()
    return total


def from_products(products: Tensor) -> Tensor:
    """The CKA matrix [layers, layers] from `gram_products`; exactly symmetric, 1 on the diagonal."""
    size = products.diagonal().sqrt()
    matrix = (products + products.T) / 2 / (size[:, None] * size[None, :])
    return matrix.fill_diagonal_(1.0).clamp(0, 1)
