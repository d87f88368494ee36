"""Attention of ready queries, keys and values: softmax through the fastest kernel at hand, or linear.

One rule says what is seen (`masks.Visible`). Plain masks go to the fused kernel of PyTorch; others, on CUDA, to
FlexAttention, which skips what is not seen, and elsewhere to the fused kernel with a dense mask.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from transect.models.masks import Visible

_FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLEX_HEAD_WIDTH = 16
"""The narrowest head that FlexAttention's kernels take."""
_FLEX_BLOCK = 128
"""Keys that FlexAttention skips at once; shorter texts have nothing to skip."""
_SHORT = 512
"""Up to so many keys the CPU's kernel is as fast with a dense mask as with a causal one (benchmarks/caa.py)."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, window: int | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """softmax(scale q k^T over the visible keys) v, [batch, heads, queries, head_width].

    k and v have the same number of heads or a divisor of it. Cost 4 queries keys head_width heads FLOPs, halved by a
    fused kernel where a plain causal mask lets it skip.
    """
    keys = k.shape[2]
    if visible.plain(keys, window):
        causal = visible.causal and q.shape[2] > 1
        return _fused(q, k, v, scale=scale, dropout=dropout, causal=causal)
    if flexible(q, visible, dropout):
        return attend_flexibly(q, k, v, visible, window=window, scale=scale)[0]
    return _fused(q, k, v, scale=scale, dropout=dropout, mask=visible.dense(keys, window))


def attend_others(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, window: int | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """As `attend`, but no position sees itself; 0 for a query that then sees nothing.

    A plain causal mask stays one: query i reads keys 0 to i - 1, so queries and keys are moved against each other
    (arXiv 2403.02436; section 3.4 of our notes).
    """
    keys = k.shape[2]
    if shifts(q, visible, keys, window):
        seen = _fused(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], scale=scale, dropout=dropout, causal=True)
        return F.pad(seen, (0, 0, 1, 0))
    if flexible(q, visible, dropout):
        return attend_flexibly(q, k, v, visible, window=window, scale=scale, own=False)[0]
    lonely = visible.lonely(keys, window)
    mask = visible.dense(keys, window, own=False) | lonely  # a row without any key is NaN in some kernels
    return _fused(q, k, v, scale=scale, dropout=dropout, mask=mask).masked_fill(lonely, 0.0)


def attend_linearly(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, window: int | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention without softmax: (scale q k^T over the visible keys) v / number of visible keys.

    The paper's code drops the softmax (arXiv 2101.04547, section 4); the division by the number of keys, without which
    the output grows with the length, is ours (ASSUMED).
    """
    return _linear(q, k, v, visible.dense(k.shape[2], window), scale, dropout)


def attend_others_linearly(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, window: int | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """As `attend_linearly`, but no position sees itself; 0 for a query that then sees nothing."""
    return _linear(q, k, v, visible.dense(k.shape[2], window, own=False), scale, dropout)


def _linear(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    weights = linear_weights(q, k, mask, scale)
    return F.dropout(weights, dropout) @ repeated(v, q.shape[1])


def linear_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale q k^T / number of keys that the mask lets a query see, 0 elsewhere and where it sees none."""
    scores = q @ repeated(k, q.shape[1]).transpose(-1, -2) * scale
    return scores.masked_fill(~mask, 0) / mask.sum(-1, keepdim=True).clamp_min(1)


def attend_flexibly(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, *, window: int | None, scale: float, own: bool = True
) -> tuple[Tensor, Tensor]:
    """What `attend` or, without `own`, `attend_others` gives, and log sum exp of the visible scores [batch, heads,
    queries], -inf where nothing is seen; through FlexAttention, compiled on CUDA. Both can be differentiated there.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = alike(q, k, v)
    blocks = visible.blocks(k.shape[2], window, own)
    kernel, shared = _flex(q.device.type), k.shape[1] != q.shape[1]
    wanted = AuxRequest(lse=True)
    seen, beside = kernel(q, k, v, block_mask=blocks, scale=scale, enable_gqa=shared, return_aux=wanted)
    return seen, beside.lse


def shifts(q: Tensor, visible: Visible, keys: int, window: int | None) -> bool:
    """Whether seeing the others is a plain causal mask of moved queries, and that is the fastest way to say so."""
    plain = visible.causal and visible.offset == 0 and keys > 1 and visible.plain(keys, window)
    return plain and (keys > _SHORT or q.device.type != "cpu")


def flexible(q: Tensor, visible: Visible, dropout: float = 0.0) -> bool:
    """Whether FlexAttention is the kernel for queries and masks such as these."""
    fits = q.dtype in _FLEX_DTYPES and q.shape[-1] >= _FLEX_HEAD_WIDTH and q.shape[2] >= _FLEX_BLOCK
    return q.is_cuda and fits and dropout == 0.0 and visible.offset == 0


def alike(*given: Tensor) -> tuple[Tensor, ...]:
    """All in the first one's dtype, or in autocast's, which PyTorch itself sees to only for its own attention."""
    device = given[0].device.type
    reduced = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if reduced else given[0].dtype
    return tuple(x.to(dtype) for x in given)


def repeated(x: Tensor, heads: int) -> Tensor:
    """Key or value heads, each repeated for the queries that share it."""
    return x if x.shape[1] == heads else torch.repeat_interleave(x, heads // x.shape[1], dim=1)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, dropout: float, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    k, v = (repeated(x, q.shape[1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)


@functools.cache
def _flex(device: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention
