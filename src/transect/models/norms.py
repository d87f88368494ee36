"""Norms of the stream."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transect.models.config import NormConfig

FINAL = ("pre", "sandwich", "branch")
"""Layouts in which the stream itself is never normed in a layer, so that a norm stands before the head."""


def norm(config: "NormConfig", width: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last `width` numbers; PyTorch computes both in float32 or better."""
    if config.type == "rms":
        return nn.RMSNorm(width, eps=config.eps)
    return nn.LayerNorm(width, eps=config.eps, bias=config.bias)
