"""CAA and CEA: part of the FFN moves inside attention, where it can only help to combine positions."""

from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field
from torch import Tensor

from transect.models.attention import Attention
from transect.models.blocks._context_attention import ContextAttention
from transect.models.blocks._residual import Residual
from transect.models.blocks.base import Block, BlockOutput
from transect.models.config import FFNChoice, LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.ffn.base import FFNConfig, build
from transect.models.norms import norm
from transect.models.plug import PlugConfig, Unfit

_NORM_PLACES = {"post": "post", "pre": "attn", "sandwich": "attn", "branch": "none", "none": "none"}
"""Where the contexts are normed by default, in each layout of the layer."""


class CAA(Block):
    """The FFN's width m is split: r m stay behind attention, (1 - r) m make contexts c_j inside it.

    q_i = W_Q x_i; keys and values are W_K c_j, W_V c_j of other positions and W_K x_i, W_V x_i of the position itself;
    then h = x + Attention, h = h + OuterFFN(N(h)), the latter absent at r = 0. At r = 1 no FFN is inside, and the layer
    is the standard one to the last bit, whatever the other settings.
    Source: arXiv 2403.02436 (NeurIPS 2024), sections 3.2 to 3.4 of our notes; what each default rests on stands there
    in section 4. Its FFNs: `attn.inner` and `ffn`. Losses and statistics of the inner one are named `inner.`.
    Cost: the standard layer's; `raw` projects keys and values twice, 4 d^2 FLOPs per token more (2 d^2 times the share
    of key and value heads), and `shared_kv: false` has the parameters for it.
    """

    class Config(PlugConfig):
        """The split and how the inner FFN stands.

        outer_ratio r, of the layer's `ffn` (default 1/8 in a causal, 0 in a masked model); or `inner`, an FFN's
        settings: then `ffn` stays outside whole (a mixture of experts moved inside). direct_path: what a position shows
        itself, `raw`, `masked` (nothing) or `none` (its context). inner_residual: c = x + F(x), or F(x).
        inner_norm: `post` N(x + F(x)); `attn` N_attn(h + F(N(h))), h the stream, N_attn attention's own norm; `none`.
        By default `post` in a post-norm layer, `attn` in a pre-norm or sandwich one, else `none` (the last is ours).
        empty_row: what a masked position reads that sees no other: `zero`, a learned `sink` (a value; with one key its
        weight is 1), or its own `raw` value. shared_kv: raw pairs have the contexts' W_K and W_V.
        drop_outer_norm_at_r0: without outer FFN a post-norm layer has no second norm.
        form: how `raw` is computed (`own_pair`); `auto` takes the fastest that fits.
        """

        kind: str = "caa"
        checks_ffn: ClassVar[bool] = True
        outer_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
        inner: FFNChoice | None = None
        direct_path: Literal["raw", "masked", "none"] = "raw"
        inner_residual: bool = True
        inner_norm: Literal["post", "attn", "none"] | None = None
        empty_row: Literal["zero", "sink", "raw"] = "zero"
        shared_kv: bool = True
        drop_outer_norm_at_r0: bool = True
        form: Literal["auto", "overwrite", "concat", "merge"] = "auto"

        def norm_place(self, layer: LayerConfig) -> str:
            """Where the contexts are normed: `post`, `attn` or `none`."""
            return self.inner_norm or _NORM_PLACES[layer.norm.layout]

        def ratio(self, model: ModelConfig) -> float:
            """r, given or by default."""
            if self.outer_ratio is None:
                return 1 / 8 if model.causal else 0.0
            return self.outer_ratio

        def parts(self, layer: LayerConfig, model: ModelConfig) -> tuple[FFNConfig | None, FFNConfig | None]:
            """The FFNs behind and inside attention; raises ValueError where the split is not whole."""
            ffn = cast(FFNConfig, layer.ffn)
            if self.inner is not None:
                return ffn, cast(FFNConfig, self.inner)
            return (ffn, None) if self.ratio(model) == 1 else ffn.split(self.ratio(model), model)

        def check(self, layer: LayerConfig, model: ModelConfig, where: str) -> None:
            """Raise Unfit for a split that is not whole, for a part that does not fit, and for contradictions."""
            if self.inner is not None and self.outer_ratio is not None:
                why = f"{where}.inner is given too, and then the whole ffn stays outside; give one of them"
                raise Unfit(f"{where}.outer_ratio", self.outer_ratio, why)
            if self.inner is not None:
                layer.ffn.check(layer, model, "ffn")
                self.inner.check(layer, model, f"{where}.inner")
            else:
                self._check_split(layer, model, where)
            self._check_norms(layer, where)
            self._check_path(layer, where)

        def _check_split(self, layer: LayerConfig, model: ModelConfig, where: str) -> None:
            """Only the parts are ever built, so it is they that must fit, not the whole."""
            cast(FFNConfig, layer.ffn).check_sizes(model, "ffn")
            try:
                parts = self.parts(layer, model)
            except ValueError as error:
                raise Unfit(f"{where}.outer_ratio", self.ratio(model), str(error)) from error
            for part, place in zip(parts, ("behind", "inside"), strict=True):
                try:
                    if part is not None:
                        part.check(layer, model, "ffn")
                except Unfit as error:
                    why = f"{error.why} (the part {place} attention, {where}.outer_ratio {self.ratio(model):g})"
                    raise Unfit(error.where, error.given, why) from error

        def _check_norms(self, layer: LayerConfig, where: str) -> None:
            layout = layer.norm.layout
            if self.inner_norm == "attn" and layout not in ("pre", "sandwich"):
                why = f"needs a norm before attention, and norm.layout is {layout}; give post or none"
                raise Unfit(f"{where}.inner_norm", self.inner_norm, why)
            if self.inner_norm == "post" and layout == "none":
                raise Unfit(f"{where}.inner_norm", self.inner_norm, "norm.layout is none; give none")
            if not self.drop_outer_norm_at_r0 and layout != "post":
                why = f"only norm.layout post has a norm to keep there, not {layout}; leave it true"
                raise Unfit(f"{where}.drop_outer_norm_at_r0", False, why)

        def _check_path(self, layer: LayerConfig, where: str) -> None:
            path, attention = self.direct_path, layer.attention
            if self.empty_row != "zero" and path != "masked":
                why = f"with direct_path {path} no row is empty; give zero, or direct_path: masked"
                raise Unfit(f"{where}.empty_row", self.empty_row, why)
            if not self.shared_kv and path != "raw":
                why = f"with direct_path {path} there are no raw pairs; leave it true"
                raise Unfit(f"{where}.shared_kv", False, why)
            if self.form != "auto" and path != "raw":
                raise Unfit(f"{where}.form", self.form, f"only direct_path raw has forms, not {path}; give auto")
            if self.form in ("concat", "merge") and attention.weights == "linear":
                raise Unfit(f"{where}.form", self.form, "needs attention.weights: softmax; give auto or overwrite")
            if self.form == "merge" and attention.dropout:
                raise Unfit(f"{where}.form", self.form, "knows no attention.dropout; give auto, overwrite or concat")

    def __init__(self, layer: LayerConfig, model: ModelConfig, index: int) -> None:
        super().__init__()
        options = cast(CAA.Config, layer.block)
        outer, inner = options.parts(layer, model)
        self.attn_residual = Residual(layer, model, layer.residual.attn)
        if inner is None:
            self.attn = Attention(layer, model)
        else:
            self.attn = ContextAttention(layer, model, index, inner, options)
        self.ffn_residual = self.ffn = self.outer_norm = None
        if outer is not None:
            self.ffn_residual = Residual(layer, model, layer.residual.ffn)
            self.ffn = build(outer, model, index)
        elif not options.drop_outer_norm_at_r0:
            self.outer_norm = norm(layer.norm, model.width)

    def forward(self, hidden: Tensor, context: Context, place: int) -> BlockOutput:
        entered, losses, stats = self.attn_residual.enter(hidden), {}, {}
        if isinstance(self.attn, ContextAttention):
            branch, losses, stats = self.attn(entered, hidden, self.attn_residual.enter, context, place)
        else:
            branch = self.attn(entered, context, place)
        hidden = self.attn_residual.leave(hidden, branch)
        if self.ffn_residual is not None and self.ffn is not None:
            made = self.ffn(self.ffn_residual.enter(hidden), context.token_ids, context.real)
            hidden = self.ffn_residual.leave(hidden, made.hidden)
            losses, stats = losses | made.losses, stats | made.stats
        elif self.outer_norm is not None:
            hidden = self.outer_norm(hidden)
        return BlockOutput(hidden, losses, stats)
