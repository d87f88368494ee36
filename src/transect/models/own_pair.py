"""Attention in which each position's key and value for itself come from elsewhere than those for the others.

Three algebraically equal forms (arXiv 2403.02436; section 3.2 of our notes), each a function of queries [batch, heads,
queries, head_width], keys and values [batch, groups, keys, head_width] that the *other* positions show, and `own`, the
pair [batch, groups, queries, head_width] that a query meets at its own place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transect.models.attend import alike, attend_flexibly, flexible, linear_weights, repeated, shifts
from transect.models.masks import Visible


class Pair(NamedTuple):
    """A key and a value for each position."""

    key: Tensor
    value: Tensor


class Setting(NamedTuple):
    """How scores are made: the window, the factor of q k^T, dropout of the weights, `linear` for no softmax."""

    window: int | None
    scale: float
    dropout: float = 0.0
    linear: bool = False


Form = Callable[[Tensor, Pair, Pair, Visible, Setting], Tensor]


def overwrite(q: Tensor, others: Pair, own: Pair, visible: Visible, setting: Setting) -> Tensor:
    """The reference: own scores overwrite the diagonal, own values take the diagonal's weights.

    S = Q K^T; S_ii = q_i k_i'; A = softmax(S); O = (A - diag A) V + diag(A) V'. Without softmax A = S / keys seen.
    Cost: O(queries head_width) beyond ordinary attention, and the scores are held.
    """
    q, k, v, own_k, own_v = _ready(q, others, own)
    mask = visible.dense(k.shape[2], setting.window)
    own_scores = (q * own_k).sum(-1) * setting.scale
    if setting.linear:
        weights = linear_weights(q, k, mask, setting.scale)
        weights = _with_diagonal(weights, own_scores / mask.sum(-1), visible.offset)
    else:
        scores = _with_diagonal(q @ k.transpose(-1, -2) * setting.scale, own_scores, visible.offset)
        exact = torch.promote_types(q.dtype, torch.float32)
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1, exact).to(q.dtype)
    weights = F.dropout(weights, setting.dropout)
    diagonal = weights.diagonal(visible.offset, -2, -1)
    rest = _with_diagonal(weights, torch.zeros_like(diagonal), visible.offset)
    return rest @ v + diagonal.unsqueeze(-1) * own_v


def concat(q: Tensor, others: Pair, own: Pair, visible: Visible, setting: Setting) -> Tensor:
    """Both kinds of keys side by side, [context | own], under a mask that shows each query one of the own ones.

    Twice the score product, but any kernel with a mask will do.
    """
    q, k, v, own_k, own_v = _ready(q, others, own)
    mask = visible.dense(k.shape[2], setting.window, own=False)
    diagonal = torch.eye(visible.queries, dtype=torch.bool, device=q.device).expand(*mask.shape[:3], -1)
    return F.scaled_dot_product_attention(
        q,
        torch.cat([k, own_k], 2),
        torch.cat([v, own_v], 2),
        attn_mask=torch.cat([mask, diagonal], -1),
        dropout_p=setting.dropout,
        scale=setting.scale,
    )


def merge(q: Tensor, others: Pair, own: Pair, visible: Visible, setting: Setting) -> Tensor:
    """A fused kernel over the others, then the own pair by its share of the whole sum of exponents.

    (o, lse) over the others; s = scale q k'; g = sigmoid(s - lse); O = (1 - g) o + g v'. Nothing of size queries x keys
    is held. Where no kernel gives lse (not the CPU, and not for FlexAttention either) the reference computes it.
    No dropout and no linear weights: raises ValueError.
    """
    if setting.dropout or setting.linear:
        raise ValueError("the merged form knows neither dropout of the weights nor linear weights")
    q, k, v, own_k, own_v = _ready(q, others, own)
    if flexible(q, visible):
        seen, total = attend_flexibly(q, *others, visible, window=setting.window, scale=setting.scale, own=False)
        return joined(seen, total, q, Pair(own_k, own_v), setting.scale)
    if q.device.type != "cpu" or q.numel() == 0:  # the CPU's kernel divides by the size
        return overwrite(q, others, own, visible, setting)
    shifted = shifts(q, visible, k.shape[2], setting.window)
    mask = None if shifted else _additive(visible.dense(k.shape[2], setting.window, own=False), q)
    return _Merged.apply(q, k, v, own_k, own_v, mask, setting.scale)  # pyright: ignore[reportReturnType]


def joined(seen: Tensor, total: Tensor, q: Tensor, own: Pair, scale: float) -> Tensor:
    """What the others showed [batch, heads, queries, head_width], `total` their log sum exp, with the own pair."""
    share = torch.sigmoid((q * own.key).sum(-1) * scale - total).unsqueeze(-1).to(q.dtype)
    return torch.lerp(seen, own.value, share)


FORMS: dict[str, Form] = {"overwrite": overwrite, "concat": concat, "merge": merge}


def fastest(q: Tensor, visible: Visible, setting: Setting) -> Form:
    """The form that was measured to be fastest where it can be used (benchmarks/caa.py)."""
    if setting.dropout or setting.linear or not (q.device.type == "cpu" or flexible(q, visible)):
        return overwrite
    return merge


class _Merged(torch.autograd.Function):
    """The merged form on the CPU, whose fused kernel has a log sum exp but no derivative of it.

    None is needed: given the *whole* output and the *whole* log sum exp, the kernel's backward recomputes the weights
    that the others have in the whole sum, and so their exact derivatives. Without a mask: plain causal.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        first = 1 if mask is None else 0  # plain causal: query i reads keys 0 to i - 1, so it is moved by one
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        last = k.shape[2] - first
        seen, found = attention(
            q[:, :, first:], k[:, :, :last], v[:, :, :last], 0.0, mask is None, attn_mask=mask, scale=scale
        )
        if mask is None:
            seen, found = F.pad(seen, (0, 0, 1, 0)), F.pad(found, (1, 0), value=float("-inf"))
        else:
            found = found.masked_fill(torch.isneginf(mask[:, :1]).all(-1), float("-inf"))  # all heads see alike
        own_scores = (q * own_k).sum(-1, dtype=found.dtype) * scale
        total = torch.logaddexp(found, own_scores)
        share = (own_scores - total).exp_().unsqueeze(-1).to(q.dtype)
        out = torch.lerp(seen, own_v, share)
        ctx.save_for_backward(q, k, v, own_k, own_v, out, total, share, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, own_k, own_v, out, total, share, mask = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        first = 1 if mask is None else 0
        last = k.shape[2] - first
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = attention(
            grad[:, :, first:],
            q[:, :, first:],
            k[:, :, :last],
            v[:, :, :last],
            out[:, :, first:],
            total[:, :, first:],
            0.0,
            mask is None,
            attn_mask=mask,
            scale=ctx.scale,
        )
        if first:
            dq, dk, dv = F.pad(dq, (0, 0, 1, 0)), F.pad(dk, (0, 0, 0, 1)), F.pad(dv, (0, 0, 0, 1))
        own_grad = share * (grad * (own_v - out)).sum(-1, keepdim=True) * ctx.scale
        return dq.addcmul_(own_grad, own_k), dk, dv, own_grad * q, share * grad, None, None


def _ready(q: Tensor, others: Pair, own: Pair) -> tuple[Tensor, ...]:
    """Queries, keys, values, own keys and own values: one dtype, as many heads."""
    return tuple(repeated(x, q.shape[1]) for x in alike(q, *others, *own))


def _with_diagonal(x: Tensor, diagonal: Tensor, offset: int) -> Tensor:
    """x [..., queries, keys] with each query's entry for its own place replaced."""
    return torch.diagonal_scatter(x, diagonal, offset, -2, -1)


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """0 where seen, -inf where not, [batch, heads, queries, keys] by expansion, as the CPU kernel wants it."""
    plain = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    return plain.expand(q.shape[0], q.shape[1], -1, -1)
