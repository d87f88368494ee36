"""Rotary positions: made where they are used, and the same to the last bit as on the CPU alone."""

import pytest
import torch

from copies import Copies
from transect.models.config import RotaryConfig
from transect.models.positions import rotary_angles, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_angles_are_position_by_frequency_in_float64():
    positions, like = torch.arange(0, 99_991, 9_973)[None], torch.empty(0, dtype=torch.float64)
    cos, sin = rotary_angles(RotaryConfig(theta=10_007.0, fraction=0.5), 12, positions, like)
    frequencies = 10_007.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    angles = positions[0, :, None].double() * torch.cat([frequencies, frequencies])
    assert torch.equal(cos, angles.cos()[None, None]) and torch.equal(sin, angles.sin()[None, None])


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=str)
def test_nothing_is_copied_to_the_device(scaling: dict | None):
    positions = torch.arange(7, device="meta")[None]
    with Copies() as seen:
        cos, _ = rotary_angles(RotaryConfig(scaling=scaling), 12, positions, torch.empty(0))
    assert cos.device.type == "meta" and cos.shape == (1, 1, 7, 12)
    assert not seen.copies


def test_the_first_coordinates_turn_by_their_angles_and_the_rest_passes():
    config = RotaryConfig(theta=50.0, fraction=0.4)
    x = torch.randn(2, 3, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 1, 2, 7, 11]])
    turned = rotate(x, rotary_angles(config, 10, places, x))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    for pair in range(2):
        angle = places[0].double() * 50.0 ** (-2 * pair / 4)
        first, second = x[..., pair], x[..., pair + 2]
        torch.testing.assert_close(turned[..., pair], first * angle.cos() - second * angle.sin())
        torch.testing.assert_close(turned[..., pair + 2], second * angle.cos() + first * angle.sin())
