"""Attention whose keys and values are contexts: what an FFN inside it made of each position."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from transect.models.attend import attend_others, attend_others_linearly, repeated
from transect.models.attention import Attention
from transect.models.blocks.base import named
from transect.models.config import LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.cuts import Cuts
from transect.models.ffn.base import FFNConfig, Numbers, build
from transect.models.norms import norm
from transect.models.own_pair import FORMS, Pair, Setting, fastest
from transect.models.positions import rotate

if TYPE_CHECKING:
    from transect.models.blocks.caa import CAA


class AttentionOutput(NamedTuple):
    """hidden [batch, positions, width], what is added to the stream; losses and statistics of the FFN inside."""

    hidden: Tensor
    losses: Numbers
    stats: Numbers


class ContextAttention(Attention):
    """Queries read x; keys and values of *other* positions read the contexts c = N(x + F(x)); caches hold contexts.

    direct_path says what a position shows itself: `raw` its own x, `masked` nothing, `none` its context too. The FFN F
    is `inner`, its norm `inner_norm`.
    """

    def __init__(
        self, layer: LayerConfig, model: ModelConfig, index: int, inner: FFNConfig, options: "CAA.Config"
    ) -> None:
        super().__init__(layer, model)
        self.options = options
        self.norm_place = options.norm_place(layer)
        self.inner = build(inner, model, index + len(set(model.modules)))  # seeds other than the outer FFN's
        self.inner_norm = norm(layer.norm, model.width) if self.norm_place != "none" else None
        self.dropout = nn.Dropout(layer.dropout)
        self.own_k = self.own_v = self.sink = None
        if not options.shared_kv:
            self.own_k = nn.Linear(model.width, self.k.out_features, layer.attention.bias)
            self.own_v = nn.Linear(model.width, self.v.out_features, layer.attention.bias)
        if options.direct_path == "masked" and options.empty_row == "sink":
            self.sink = nn.Parameter(torch.zeros(self.groups, self.head_width))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, stream: Tensor, enter: Callable[[Tensor], Tensor], context: Context, place: int
    ) -> AttentionOutput:
        """x [batch, positions, width] is the sub-layer's input, `enter` of the stream; `place` is that in the cache."""
        contexts, losses, stats = self.contexts(x, stream, enter, context)
        q = self.query(x, context)
        k, v = self.pair(contexts, context)
        k, v = context.remembered(k, v, place)
        if self.options.direct_path == "none":
            hidden = self.combine(q, k, v, context)
        elif self.options.direct_path == "raw":
            hidden = self.out(self.joined(self._with_own(q, Pair(k, v), self._own_pair(x, context), context)))
        else:
            hidden = self.out(self.joined(self._without_own(q, Pair(k, v), x, context)))
        return AttentionOutput(hidden, losses, stats)

    def contexts(
        self, x: Tensor, stream: Tensor, enter: Callable[[Tensor], Tensor], context: Context
    ) -> tuple[Tensor, Numbers, Numbers]:
        """c [batch, positions, width], and the inner FFN's losses and statistics under `inner.`."""
        base, normed = x, x
        if self.norm_place == "attn" and self.inner_norm is not None:
            base, normed = stream, self.inner_norm(stream)
        made = self.inner(normed, context.token_ids, context.real)
        contexts = self.dropout(made.hidden)
        if self.options.inner_residual:
            contexts = base + contexts
        if self.norm_place == "attn":
            contexts = enter(contexts)
        elif self.inner_norm is not None:
            contexts = self.inner_norm(contexts)
        return contexts, named(made.losses, "inner"), named(made.stats, "inner")

    def flops(self, positions: float) -> float:
        """As any attention's, without the FFN inside; raw keys or values of the position itself are further maps."""
        raw = self.options.direct_path == "raw"
        keys = self.k.out_features if raw else 0
        values = self.v.out_features if raw or self.options.empty_row == "raw" else 0
        return super().flops(positions) + 2.0 * self.q.in_features * (keys + values)

    def cuts(self) -> Cuts:
        """As any attention's; the FFN inside reads the whole input and has cuts of its own."""
        cuts = super().cuts()
        own = () if self.own_k is None else ("own_k", "own_v")
        sink = "block.empty_row sink has a value for each head; give zero or raw"
        refused = cuts.refused if self.sink is None else sink
        return replace(cuts, columns=cuts.columns + own, together=False, refused=refused)

    def _own_pair(self, x: Tensor, context: Context) -> Pair:
        """The key and value that a position shows itself."""
        if self.own_k is None or self.own_v is None:
            return Pair(*self.pair(x, context))
        k = rotate(self._normed(self.own_k(x), self.k_norm), context.angles(self.rotary, self.head_width, x))
        return Pair(k, self._split(self.own_v(x)))

    def _with_own(self, q: Tensor, others: Pair, own: Pair, context: Context) -> Tensor:
        setting = Setting(self.config.window, self.scale, self._dropped(), self.config.weights == "linear")
        form = FORMS.get(self.options.form) or fastest(q, context.visible, setting)
        return form(q, others, own, context.visible, setting)

    def _without_own(self, q: Tensor, others: Pair, x: Tensor, context: Context) -> Tensor:
        kernel = attend_others if self.config.weights == "softmax" else attend_others_linearly
        window, visible = self.config.window, context.visible
        seen = kernel(q, *others, visible, window=window, scale=self.scale, dropout=self._dropped())
        if self.options.empty_row == "zero":
            return seen
        # only a value is read: a single visible key has the whole weight, whatever it is
        filler = self._split(self.v(x)) if self.sink is None else self.sink[None, :, None]
        return torch.where(visible.lonely(others.key.shape[2], window), repeated(filler, q.shape[1]), seen)

    def _dropped(self) -> float:
        return self.config.dropout if self.training else 0.0
