"""Self-attention: projections, positions, cache; the kernel stands in `attend`."""

from torch import Tensor, nn

from transect.models.attend import attend, attend_linearly
from transect.models.config import LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.cuts import Cuts
from transect.models.positions import rotate


class Attention(nn.Module):
    """Multi-head attention: out(concat_h softmax(q_h k_h^T / sqrt(head_width)) v_h), [batch, positions, width].

    Key and value heads may be fewer than query heads (GQA, MQA). `query`, `pair` and `combine` are its three steps, for
    blocks that feed keys and values from elsewhere.
    """

    def __init__(self, layer: LayerConfig, model: ModelConfig) -> None:
        super().__init__()
        config = self.config = layer.attention
        self.rotary = layer.rotary
        self.heads, self.groups = config.heads, config.groups
        self.head_width = config.head_width or model.width // config.heads
        self.scale = config.scale or self.head_width**-0.5
        out_bias = config.bias if config.out_bias is None else config.out_bias
        self.q = nn.Linear(model.width, self.heads * self.head_width, config.bias)
        self.k = nn.Linear(model.width, self.groups * self.head_width, config.bias)
        self.v = nn.Linear(model.width, self.groups * self.head_width, config.bias)
        self.out = nn.Linear(self.heads * self.head_width, model.width, out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            widths = (self.head_width,) * 2 if config.qk_norm == "head" else (self.q.out_features, self.k.out_features)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=layer.norm.eps) for width in widths)

    def forward(self, x: Tensor, context: Context, place: int) -> Tensor:
        """x [batch, positions, width]; `place` is the layer's place in the cache."""
        q = self.query(x, context)
        k, v = context.remembered(*self.pair(x, context), place)
        return self.combine(q, k, v, context)

    def query(self, x: Tensor, context: Context) -> Tensor:
        """Queries [batch, heads, positions, head_width], normed and turned."""
        q = self._normed(self.q(x), self.q_norm)
        return rotate(q, context.angles(self.rotary, self.head_width, x))

    def pair(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, groups, positions, head_width] of x, keys normed and turned."""
        k = self._normed(self.k(x), self.k_norm)
        return rotate(k, context.angles(self.rotary, self.head_width, x)), self._split(self.v(x))

    def combine(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """What each query takes from the values it sees, heads joined and projected."""
        kernel = attend if self.config.weights == "softmax" else attend_linearly
        dropout = self.config.dropout if self.training else 0.0
        seen = kernel(q, k, v, context.visible, window=self.config.window, scale=self.scale, dropout=dropout)
        return self.out(self.joined(seen))

    def joined(self, heads: Tensor) -> Tensor:
        """[batch, heads, positions, head_width] -> [batch, positions, heads * head_width]."""
        return heads.transpose(1, 2).flatten(2)

    def flops(self, positions: float) -> float:
        """Forward FLOPs per token that meets `positions` keys, two for a multiply-add: four maps and two products."""
        maps = sum(linear.in_features * linear.out_features for linear in (self.q, self.k, self.v, self.out))
        return 2.0 * maps + 4.0 * positions * self.heads * self.head_width

    def cuts(self) -> Cuts:
        """By heads: queries, keys and values by their outputs, the last map by its inputs."""
        full = self.config.qk_norm == "full"
        return Cuts(
            columns=("q", "k", "v"),
            rows=("out",),
            partial=() if self.q_norm is None else ("q_norm.weight", "k_norm.weight"),
            counts={"attention.heads": self.heads, "attention.kv_heads": self.groups},
            refused="attention.qk_norm full needs all heads; give head or none" if full else None,
        )

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        if norm is None:
            return self._split(x)
        if self.config.qk_norm == "full":
            return self._split(norm(x))
        return norm(self._split(x))
