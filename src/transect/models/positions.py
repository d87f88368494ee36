"""Rotary positions: each pair of a head's coordinates turns by an angle that grows with the position."""

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transect.models.config import RotaryConfig


def rotary_angles(config: "RotaryConfig", head_width: int, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, [batch or 1, 1, positions, n], for the n coordinates that turn.

    Frequencies theta^(-2i/n), or those of the context extension in `scaling`, as transformers computes them. Angles are
    float64 where the device has it, so that far positions keep their digits, and frequencies are made there too; the
    result has the dtype of `like`.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    device = positions.device if wide == torch.float64 else torch.device("cpu")
    frequencies, factor = _frequencies(config, head_width, device)
    angles = positions[:, None, :, None].to(wide) * frequencies.to(positions.device, wide)
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * factor).to(like.dtype), (angles.sin() * factor).to(like.dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """x [batch, heads, positions, head_width] turned; coordinate i pairs with i + n/2, the rest passes as it is."""
    if angles is None:
        return x
    cos, sin = angles
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _frequencies(config: "RotaryConfig", head_width: int, device: torch.device) -> tuple[Tensor, float]:
    count = int(config.fraction * head_width)
    if config.scaling is None:
        return config.theta ** -(torch.arange(0, count, 2, dtype=torch.float64, device=device) / count), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": config.theta, "partial_rotary_factor": config.fraction, **config.scaling}
    known = SimpleNamespace(
        rope_parameters=parameters,
        head_dim=head_width,
        hidden_size=head_width,  # read, though not used, where there is a head_dim
        num_attention_heads=1,
        standardize_rope_params=lambda: None,
        max_position_embeddings=parameters.get("original_max_position_embeddings"),
    )
    with device:  # what it makes without saying where
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](known, device)
    return frequencies, factor
