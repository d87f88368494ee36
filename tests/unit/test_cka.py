"""Linear CKA against its plain formula, whole and a block of rows at a time."""

import numpy as np
import pytest
import torch

from transect.metrics.cka import cka, from_products, gram_products

LAYERS, SAMPLES, WIDTH = 5, 31, 7


def plain(left: np.ndarray, right: np.ndarray) -> float:
    """HSIC of linear kernels, centred by the centring matrix."""
    centre = np.eye(len(left)) - 1 / len(left)
    k, m = centre @ left @ left.T @ centre, centre @ right @ right.T @ centre
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def states(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(LAYERS, SAMPLES, WIDTH, generator=generator, dtype=torch.float64) + 0.6


def test_plain_formula_for_other_widths(generator: torch.Generator):
    left = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    right = left @ torch.randn(WIDTH, 11, generator=generator, dtype=torch.float64) + 3
    value = float(cka(left, right))
    assert value == pytest.approx(plain(left.numpy(), right.numpy()), abs=1e-12)
    assert 0.3 < value < 0.999


@pytest.mark.parametrize("block", [1, 7, 31, 256])
def test_blocks_equal_the_direct_value(block: int, generator: torch.Generator):
    every = states(generator)
    centred = every - every.mean(1, keepdim=True)
    products = gram_products(centred, block)
    direct = torch.einsum("lnd,lmd->lnm", centred, centred)
    torch.testing.assert_close(products, torch.einsum("lnm,knm->lk", direct, direct), rtol=1e-12, atol=0)
    matrix = from_products(products)
    for i in range(LAYERS):
        for j in range(LAYERS):
            assert float(matrix[i, j]) == pytest.approx(plain(every[i].numpy(), every[j].numpy()), abs=1e-12)


def test_matrix_is_symmetric_with_a_diagonal_of_one(generator: torch.Generator):
    every = states(generator).float()
    matrix = from_products(gram_products(every - every.mean(1, keepdim=True), 11))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(LAYERS, dtype=torch.float64))
    assert float(matrix.max()) == 1 and float(matrix.min()) > 0


def test_equal_up_to_rotation_and_scale_is_one(generator: torch.Generator):
    left = states(generator)[0]
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q
    assert float(cka(left, 0.3 * left @ turn + 2)) == pytest.approx(1, abs=1e-12)
    stretched = left @ torch.diag(torch.logspace(0, 1, WIDTH, dtype=torch.float64))
    assert float(cka(left, stretched)) < 0.99
