"""Displacement and angle of two states: the jump paper's numbers, and no digit lost near zero."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from transect.metrics.angles import angular_distance, block_influence, displacement, unit, update_ratio, widened

WIDTH = 37
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def states(generator: torch.Generator, dtype: torch.dtype = torch.float64, rows: int = 53) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def at_angle(degrees: float) -> tuple[torch.Tensor, torch.Tensor]:
    angle = math.radians(degrees)
    return (
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        3 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("degrees", "expected"), [(10, 0.007596), (30, 0.066987), (60, 0.25), (90, 0.5), (180, 1.0), (0, 0.0)]
)
def test_displacement_of_known_angles(degrees: float, expected: float):
    before, after = at_angle(degrees)
    psi = float(displacement(before, after))
    assert psi == pytest.approx(expected, abs=5e-7)
    assert psi == pytest.approx(math.sin(math.radians(degrees) / 2) ** 2, abs=1e-15)
    assert float(angular_distance(before, after)) == pytest.approx(degrees / 180, abs=1e-15)
    assert float(block_influence(before, after)) == 2 * psi


def test_chord_is_the_cosine_and_the_angle(generator: torch.Generator):
    before, after = states(generator), states(generator)
    cosine = torch.cosine_similarity(before, after)
    psi = displacement(before, after)
    torch.testing.assert_close(psi, (1 - cosine) / 2, rtol=0, atol=1e-12)
    distance = angular_distance(before, after)
    torch.testing.assert_close(distance, torch.arccos(cosine) / math.pi, rtol=0, atol=1e-12)
    torch.testing.assert_close(psi, torch.sin(math.pi * distance / 2) ** 2, rtol=0, atol=1e-12)
    assert (psi >= 0).all() and (psi <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [displacement, angular_distance, block_influence, update_ratio])
def test_distance_to_itself_is_exactly_zero(function, dtype: torch.dtype, generator: torch.Generator):
    same = states(generator, dtype) * torch.logspace(-3, 3, 53).to(dtype)[:, None]
    assert torch.equal(function(same, same.clone()), torch.zeros(53, dtype=torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.125, 0.5, 2.0, 4.0])
def test_powers_of_two_leave_exactly_nothing(factor: float, dtype: torch.dtype, generator: torch.Generator):
    state = states(generator, dtype)
    assert float(displacement(state, state * factor).abs().max()) == 0
    assert float(angular_distance(state, state * factor).abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [0.3, 1.7, 1e3])
def test_other_factors_leave_almost_nothing(factor: float, dtype: torch.dtype, generator: torch.Generator):
    state = states(generator, dtype)
    assert float(displacement(state, state * factor).max()) < 1e-12
    assert not displacement(state, state * factor).isnan().any()
    assert float(angular_distance(state, state * factor).max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_states_are_finite(dtype: torch.dtype, generator: torch.Generator):
    state, zero = states(generator, dtype), torch.zeros(53, WIDTH, dtype=dtype)
    for function in (displacement, angular_distance, block_influence, update_ratio):
        for pair in ((zero, zero), (zero, state), (state, zero)):
            assert torch.isfinite(function(*pair)).all()
    assert displacement(zero, state).tolist() == pytest.approx([0.25] * 53, abs=1e-6)


def test_float64_stays_and_narrow_types_widen(generator: torch.Generator):
    assert [widened(states(generator, dtype)).dtype for dtype in DTYPES] == [torch.float64] + 3 * [torch.float32]
    assert displacement(states(generator), states(generator)).dtype == torch.float64
    torch.testing.assert_close(unit(states(generator)).norm(dim=-1), torch.ones(53, dtype=torch.float64))


def test_eps_is_the_least_length():
    assert unit(torch.tensor([3e-7, 4e-7], dtype=torch.float64)).tolist() == pytest.approx([0.3, 0.4])
    assert unit(torch.tensor([3.0, 4.0], dtype=torch.float64), eps=10.0).tolist() == pytest.approx([0.3, 0.4])


def test_final_norm_alone_turns_the_state():
    two, three = torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 4.0, 5.0]).double()
    assert float(displacement(two, rms_norm(two, (2,)) * torch.tensor([1.0, 2.0]))) == pytest.approx(0.020131, abs=5e-7)
    assert float(displacement(three, layer_norm(three, (3,)))) == pytest.approx(0.4, abs=1e-12)


def test_orthogonal_branches_turn_less_with_depth():
    state = torch.eye(13, dtype=torch.float64)[0]
    psi = []
    for branch in torch.eye(13, dtype=torch.float64)[1:]:
        psi.append(float(displacement(state, state + branch)))
        state = state + branch
    assert [psi[0], psi[1], psi[2], psi[11]] == pytest.approx([0.146447, 0.091752, 0.066987, 0.019616], abs=5e-7)
    assert psi == sorted(psi, reverse=True)


def test_update_ratio():
    before, after = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 16.0]])
    assert update_ratio(before, after).tolist() == pytest.approx([2.4])
    assert update_ratio(after * 0, before, eps=0.5).tolist() == pytest.approx([10.0])
