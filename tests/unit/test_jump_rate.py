"""The jump rate zeta from displacements: the jump paper's numbers."""

import math
from itertools import pairwise

import pytest
import torch

from transect.metrics.angles import displacement
from transect.metrics.jumps import hinge_rate, jump_rate

PSI = torch.tensor([0.10, 0.04, 0.06, 0.03, 0.20], dtype=torch.float64)


@pytest.mark.parametrize(("start", "expected"), [(5, 17.0), (4, 17.0), (3, 19.0), (2, 19.0)])
def test_known_profile(start: int, expected: float):
    assert float(jump_rate(PSI, start)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("start", [1, 0, -1, 6])
def test_a_start_without_a_layer_before_it_is_refused(start: int):
    with pytest.raises(ValueError, match="2 to 5"):
        jump_rate(PSI, start)


def test_never_rises_with_the_start(generator: torch.Generator):
    psi = torch.rand(17, 11, generator=generator, dtype=torch.float64)
    rates = torch.stack([jump_rate(psi, start) for start in range(2, 12)])
    assert rates.shape == (10, 17)
    assert float(rates.diff(dim=0).max()) < 1e-12 and float(rates.diff(dim=0).min()) < -1
    assert (rates >= 0).all()


def test_a_profile_that_never_falls_telescopes(generator: torch.Generator):
    psi = torch.rand(7, generator=generator, dtype=torch.float64).sort().values
    for start in range(2, 8):
        assert float(jump_rate(psi, start)) == pytest.approx(100 * float(psi[-1] - psi[start - 2]), abs=1e-12)
    assert [float(jump_rate(psi.flip(0), start)) for start in range(2, 8)] == [0.0] * 6


def test_scale_of_the_states_does_not_matter(generator: torch.Generator):
    states = torch.randn(7, 13, generator=generator, dtype=torch.float64)
    scaled = states * torch.logspace(-2, 3, 7, dtype=torch.float64)[:, None]
    plain, other = (displacement(stream[:-1], stream[1:]) for stream in (states, scaled))
    assert float(jump_rate(other, 2)) == pytest.approx(float(jump_rate(plain, 2)), abs=1e-12)
    assert float(jump_rate(plain, 2)) > 1


def test_mean_first_and_rate_first_differ():
    tokens = torch.tensor([[0.1, 0.3], [0.3, 0.1]], dtype=torch.float64)
    assert float(jump_rate(tokens.mean(0), 2)) == pytest.approx(0, abs=1e-12)
    assert float(jump_rate(tokens, 2).mean()) == pytest.approx(10, abs=1e-12)
    assert 100 * float(hinge_rate(tokens[:, 0], tokens[:, 1]).mean()) == pytest.approx(10, abs=1e-12)


def test_orthogonal_branches_never_jump():
    sizes = torch.arange(1, 14, dtype=torch.float64)  # |h_l|^2 = 1 + l
    psi = (1 - (sizes[:-1] / sizes[1:]).sqrt()) / 2
    assert [float(jump_rate(psi, start)) for start in range(2, 13)] == [0.0] * 11


def test_planted_turns():
    angles = [0.3, 0.0, 1.1, 0.2]
    states = [torch.tensor([1.0, 0.0], dtype=torch.float64)]
    for angle in angles:
        c, s = math.cos(angle), math.sin(angle)
        states.append(torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ states[-1])
    psi = torch.stack([displacement(a, b) for a, b in pairwise(states)])
    expected = [math.sin(angle / 2) ** 2 for angle in angles]
    assert psi.tolist() == pytest.approx(expected, abs=1e-15)
    assert float(psi[1]) == 0
    assert float(jump_rate(psi, 2)) == pytest.approx(100 * expected[2], abs=1e-12)
