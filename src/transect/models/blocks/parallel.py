"""The parallel layer: attention and FFN read the same stream and are added to it together."""

from typing import Literal, cast

from torch import Tensor

from transect.models.attention import Attention
from transect.models.blocks._residual import Residual
from transect.models.blocks.base import Block, BlockOutput
from transect.models.config import LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.ffn.base import FFNConfig, build
from transect.models.plug import PlugConfig, Unfit


class Parallel(Block):
    """x = x + Attention(N(x)) + FFN(N(x)).

    Source: GPT-J and Falcon (one norm), GPT-NeoX (two). There is one residual connection, so `residual.attn` and
    `residual.ffn` must be the same. With one norm, dropout, too, is that of the sum, as in Falcon; with two each branch
    has its own.
    """

    class Config(PlugConfig):
        """norms: `one` that both branches share (a sandwich or branch layout: the sum's), or `two`."""

        kind: str = "parallel"
        norms: Literal["one", "two"] = "one"

        def check(self, layer: LayerConfig, model: ModelConfig, where: str) -> None:
            """Raise Unfit for two norms after one sum, and for two numbers of one residual."""
            if self.norms == "two" and layer.norm.layout == "post":
                why = "a post-norm layer norms one sum here; give norms: one, or another norm.layout"
                raise Unfit(f"{where}.norms", self.norms, why)
            if layer.residual.attn != layer.residual.ffn:
                why = f"a parallel layer has one residual; give {layer.residual.attn} for both"
                raise Unfit("residual.ffn", layer.residual.ffn, why)

    def __init__(self, layer: LayerConfig, model: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn_residual = Residual(layer, model, layer.residual.attn)
        self.attn = Attention(layer, model)
        two = cast(Parallel.Config, layer.block).norms == "two"
        self.ffn_residual = Residual(layer, model, 1.0) if two else None
        self.ffn = build(cast(FFNConfig, layer.ffn), model, index)

    def forward(self, hidden: Tensor, context: Context, place: int) -> BlockOutput:
        entered = self.attn_residual.enter(hidden)
        branch = self.attn(entered, context, place)
        if self.ffn_residual is None:
            made = self.ffn(entered, context.token_ids, context.real)
            left = self.attn_residual.leave(hidden, branch + made.hidden)
        else:
            made = self.ffn(self.ffn_residual.enter(hidden), context.token_ids, context.real)
            left = self.ffn_residual.leave(self.attn_residual.leave(hidden, branch), made.hidden)
        return BlockOutput(left, made.losses, made.stats)
