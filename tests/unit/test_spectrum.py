"""Numbers of an eigenvalue spectrum and of a cone of vectors."""

import math

import numpy as np
import pytest
import torch

from transect.metrics.linearity import insample_floor, normalized
from transect.metrics.spectrum import (
    degrees_of_freedom,
    effective_rank,
    kept,
    mean_cosine,
    numeric_rank,
    pair_cosine,
    participation_ratio,
)

VALUES = torch.tensor([4.0, 1.0, 1.0, 0.0], dtype=torch.float64)


def test_known_spectrum():
    assert float(effective_rank(VALUES)) == pytest.approx(2.381102, abs=5e-7)
    assert float(participation_ratio(VALUES)) == pytest.approx(2.0, abs=1e-12)
    assert numeric_rank(VALUES, 1e-10) == 3
    assert kept(VALUES, 1e-10).tolist() == [True, True, True, False]
    ridge = 1 / float(VALUES.mean())
    assert float(degrees_of_freedom(VALUES, ridge)) == pytest.approx(1.8, abs=1e-12)
    assert float(degrees_of_freedom(VALUES, 0.0)) == 3


def test_rounding_below_zero_counts_as_zero():
    noisy = VALUES - torch.tensor([0, 0, 0, 1e-14], dtype=torch.float64)
    assert float(effective_rank(noisy)) == float(effective_rank(VALUES))
    assert float(participation_ratio(noisy)) == float(participation_ratio(VALUES))
    assert numeric_rank(noisy, 1e-10) == 3
    assert numeric_rank(torch.zeros(5), 1e-10) == 0


@pytest.mark.parametrize("count", [1, 7, 13])
def test_equal_eigenvalues_give_their_number(count: int):
    values = torch.full((count,), 0.3, dtype=torch.float64)
    for function in (effective_rank, participation_ratio):
        assert float(function(values)) == pytest.approx(count, abs=1e-12)


@pytest.mark.parametrize("rank", [3, 11, 13])
def test_numeric_rank_is_numpys(rank: int, generator: torch.Generator):
    data = torch.randn(29, rank, generator=generator, dtype=torch.float64)
    data = data @ torch.randn(rank, 13, generator=generator, dtype=torch.float64)
    values = torch.linalg.eigvalsh(data.T @ data)
    assert numeric_rank(values, 1e-10) == np.linalg.matrix_rank(data.numpy()) == rank


def test_cone_of_three_vectors():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert float(mean_cosine(vectors)) == pytest.approx(1 / 3, abs=1e-12)
    mean = vectors.mean(0)
    assert float(mean.square().sum()) == pytest.approx(5 / 9, abs=1e-12)
    assert float(mean.norm()) == pytest.approx(0.745356, abs=5e-7)
    assert float(pair_cosine(vectors.sum(0), 3)) == float(mean_cosine(vectors))


def test_cone_is_the_mean_over_all_pairs(generator: torch.Generator):
    vectors = torch.randn(31, 7, generator=generator, dtype=torch.float64) + 0.4
    directions = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    pairs = [directions[i] @ directions[j] for i in range(31) for j in range(31) if i != j]
    assert float(mean_cosine(vectors)) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_zero_vector_has_no_direction():
    with pytest.raises(ValueError, match="zero"):
        mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_cone_correction():
    assert normalized(0.9, 0.6, "A") == pytest.approx(0.75, abs=1e-12)
    assert normalized(0.9, 0.6, "B") == pytest.approx(0.30, abs=1e-12)
    assert normalized(1.0, 0.6, "A") == pytest.approx(1, abs=1e-12)
    assert normalized(1.0, 1.0, "A") is None
    with pytest.raises(ValueError, match="'C'"):
        normalized(0.9, 0.6, "C")


def test_cone_correction_does_not_zero_a_constant_predictor():
    size = math.sqrt(2 / math.pi)  # |x| of Gaussians has no linear part: gamma = constant baseline
    cone = 2 / math.pi
    assert normalized(size, cone, "A") == pytest.approx(0.4438, abs=5e-5)
    assert normalized(size, cone, "B") == pytest.approx(0.1613, abs=5e-5)


def test_floor():
    assert insample_floor(256, 1000) == pytest.approx(0.2563, abs=5e-5)
    assert insample_floor(512, 1000) == pytest.approx(0.5125, abs=5e-5)
    assert insample_floor(512, 2000) == pytest.approx(0.2561, abs=5e-5)
    assert insample_floor(7, 5) == 1.0
    assert insample_floor(7, 1) is None
