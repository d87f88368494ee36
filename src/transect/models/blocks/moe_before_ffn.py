"""The layer with a mixture of experts before its dense FFN: what MoE with CEA is compared with."""

from typing import Literal, cast

from torch import Tensor

from transect.models.attention import Attention
from transect.models.blocks._residual import Residual
from transect.models.blocks.base import Block, BlockOutput, named
from transect.models.config import FFNChoice, LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.ffn.base import FFNConfig, build
from transect.models.plug import PlugConfig, chooser


class MoEBeforeFFN(Block):
    """x = x + Attention(N(x)); x = x + MoE(N(x)); x = x + FFN(N(x)), in the layout of `norm`.

    `ffn` is the mixture, `ffn2` the FFN of the layer's own settings. `residual.ffn` holds for both. Losses and
    statistics of the second are named `ffn2.`. Source: arXiv 2403.02436, section 3.4 of our notes: one MoE layer before
    each dense FFN, 64 experts of width d, one of them active. Its own residual sub-layer: ASSUMED 0.75.
    """

    class Config(PlugConfig):
        """moe: an FFN's settings; by default 64 blocks of the model's width, one active, chosen as Switch does.

        place: `before`, a residual sub-layer of its own, or `parallel`: mixture and FFN read the same and are added
        together, x = x + MoE(N(x)) + FFN(N(x)).
        """

        kind: str = "moe_before_ffn"
        moe: FFNChoice | None = None
        place: Literal["before", "parallel"] = "before"

        def check(self, layer: LayerConfig, model: ModelConfig, where: str) -> None:
            """Raise Unfit where the mixture's settings do not go with the model."""
            self.mixture(model).check(layer, model, f"{where}.moe")

        def mixture(self, model: ModelConfig) -> FFNConfig:
            """The mixture's settings, given or by default."""
            return cast(FFNConfig, self.moe or chooser("transect.models.ffn", "FFN")(default_mixture(model.width)))

    def __init__(self, layer: LayerConfig, model: ModelConfig, index: int) -> None:
        super().__init__()
        config = cast(MoEBeforeFFN.Config, layer.block)
        self.attn_residual = Residual(layer, model, layer.residual.attn)
        self.attn = Attention(layer, model)
        self.ffn_residual = Residual(layer, model, layer.residual.ffn)
        self.ffn = build(config.mixture(model), model, index)
        own = config.place == "before"
        self.ffn2_residual = Residual(layer, model, layer.residual.ffn) if own else None
        self.ffn2 = build(cast(FFNConfig, layer.ffn), model, index + len(set(model.modules)))

    def forward(self, hidden: Tensor, context: Context, place: int) -> BlockOutput:
        branch = self.attn(self.attn_residual.enter(hidden), context, place)
        hidden = self.attn_residual.leave(hidden, branch)
        entered = self.ffn_residual.enter(hidden)
        mixed = self.ffn(entered, context.token_ids, context.real)
        if self.ffn2_residual is None:
            made = self.ffn2(entered, context.token_ids, context.real)
            hidden = self.ffn_residual.leave(hidden, mixed.hidden + made.hidden)
        else:
            hidden = self.ffn_residual.leave(hidden, mixed.hidden)
            made = self.ffn2(self.ffn2_residual.enter(hidden), context.token_ids, context.real)
            hidden = self.ffn2_residual.leave(hidden, made.hidden)
        return BlockOutput(hidden, mixed.losses | named(made.losses, "ffn2"), mixed.stats | named(made.stats, "ffn2"))


def default_mixture(width: int) -> dict:
    """The paper's mixture: 64 experts as wide as the stream, the best one weighted by its softmax over all."""
    selector = {"kind": "switch", "gate": "softmax_all", "balance": 0.01}
    return {"kind": "sparse", "blocks": 64, "active_blocks": 1, "block_size": width, "selector": selector}
