"""The layer without an FFN, with or without an activation after the attention's last map."""

from typing import Literal, cast

from torch import Tensor

from transect.models.activations import Activation, ActivationName
from transect.models.attention import Attention
from transect.models.blocks._residual import Residual
from transect.models.blocks.base import Block, BlockOutput
from transect.models.config import LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.plug import PlugConfig


class AttentionOnly(Block):
    """x = x + f(Attention(N(x))), in the layout of `norm`; f is the identity or an activation.

    The layer's `ffn` and `residual.ffn` are there for other layers and are not read. An activation belongs to what
    attention adds to the stream (`attn.act`). Source: arXiv 2101.04547, experiment N7: FFN dropped, GELU after W_O,
    more attention (more layers: 18 for a BERT-small of equal size), both. Where GELU stands is from the code; that it
    comes before dropout and residual is ASSUMED 0.8.
    """

    class Config(PlugConfig):
        """activation: one of those an FFN knows, or `none`."""

        kind: str = "attention_only"
        activation: Literal[ActivationName, "none"] = "none"

    def __init__(self, layer: LayerConfig, model: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn_residual = Residual(layer, model, layer.residual.attn)
        activation = cast(AttentionOnly.Config, layer.block).activation
        self.attn = Attention(layer, model) if activation == "none" else ActivatedAttention(layer, model, activation)

    def forward(self, hidden: Tensor, context: Context, place: int) -> BlockOutput:
        branch = self.attn(self.attn_residual.enter(hidden), context, place)
        return BlockOutput(self.attn_residual.leave(hidden, branch), {}, {})


class ActivatedAttention(Attention):
    """Attention with an activation after its last map."""

    def __init__(self, layer: LayerConfig, model: ModelConfig, activation: str) -> None:
        super().__init__(layer, model)
        self.act = Activation(activation)

    def forward(self, x: Tensor, context: Context, place: int) -> Tensor:
        return self.act(super().forward(x, context, place))
