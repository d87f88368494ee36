"""The standard layer: attention, then an FFN, each added to the stream."""

from typing import cast

from torch import Tensor

from transect.models.attention import Attention
from transect.models.blocks._residual import Residual
from transect.models.blocks.base import Block, BlockOutput
from transect.models.config import LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.ffn.base import FFNConfig, build
from transect.models.plug import PlugConfig


class StandardConfig(PlugConfig):
    """The standard layer has no settings of its own."""

    kind: str = "standard"


class Standard(Block):
    """x = x + Attention(N(x)); x = x + FFN(N(x)), in the layout of `norm`."""

    Config = StandardConfig

    def __init__(self, layer: LayerConfig, model: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn_residual = Residual(layer, model, layer.residual.attn)
        self.attn = Attention(layer, model)
        self.ffn_residual = Residual(layer, model, layer.residual.ffn)
        self.ffn = build(cast(FFNConfig, layer.ffn), model, index)

    def forward(self, hidden: Tensor, context: Context, place: int) -> BlockOutput:
        branch = self.attn(self.attn_residual.enter(hidden), context, place)
        hidden = self.attn_residual.leave(hidden, branch)
        made = self.ffn(self.ffn_residual.enter(hidden), context.token_ids, context.real)
        return BlockOutput(self.ffn_residual.leave(hidden, made.hidden), made.losses, made.stats)
