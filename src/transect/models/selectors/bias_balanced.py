"""Balance without a loss: a bias per block steers the choice, never the weights."""

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from transect.models.selectors._gates import wide
from transect.models.selectors._routed import Routed, RoutedConfig
from transect.models.selectors.base import Selection, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class BiasBalanced(Routed):
    """Blocks by affinity + bias, weights by affinity alone; `rebalance`, once a step, moves the bias against the load.

    The bias is a persistent buffer, from the first step on in float32 or better; nothing moves it but `rebalance`.
    Source: DeepSeek-V3, arXiv 2412.19437, 2.1.2; arXiv 2408.15664. Cost: 2 d B FLOPs per token.
    """

    class Config(RoutedConfig):
        """rate: how far the bias moves in one step. centred: each step's moves sum to 0 (as in torchtitan)."""

        kind: str = "bias_balanced"
        scores: Literal["softmax", "sigmoid"] = "sigmoid"
        rate: Annotated[float, Field(ge=0)] = 0.001
        centred: bool = False

    config: Config

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.bias: Tensor
        self.register_buffer("bias", torch.empty(shape.blocks, dtype=torch.float32))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """No bias."""
        self.bias.zero_()

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """bias += rate * sign(mean load - load), less its mean if centred.

        load [B] is how often each block was chosen in the step, before drops, over all micro-batches and processes:
        counts, or shares of equally many pairs.
        """
        load = load.to(self.bias.device, torch.float64)
        move = (load.mean() - load).sign()
        if self.config.centred:
            move = move - move.mean()
        self.bias = wide(self.bias)  # once, where the model was made of fewer digits than such small steps need
        self.bias += self.config.rate * move.to(self.bias.dtype)

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        return self.route(x, real, self.bias)
