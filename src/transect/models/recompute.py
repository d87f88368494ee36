"""Activations that the backward pass computes again, all of a layer's or only the cheap ones; choices never are."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transect.errors import InputError

Mode = Literal["none", "layer", "cheap"]
Made = TypeVar("Made")


@torch.library.custom_op("transect::decided", mutates_args=())
def decided(chosen: Tensor) -> Tensor:
    """The same numbers, which no recomputation changes: for what a selector decides by comparing scores.

    In a layer that is computed again in the backward pass, scores may differ in their last digits, and with them the
    choice; the first one is kept. Whole numbers or booleans: they have no gradient. `torch.topk`, `sort`, `argmax` and
    `multinomial` are kept by themselves. Cost: one copy.
    """
    return chosen.clone()


@decided.register_fake
def _(chosen: Tensor) -> Tensor:
    return torch.empty_like(chosen)


_aten = torch.ops.aten
DECISIONS = frozenset(
    {
        torch.ops.transect.decided.default,
        _aten.topk.default,
        _aten.sort.default,
        _aten.argmax.default,
        _aten.multinomial.default,
    }
)
"""Operations whose results are choices."""
COSTLY = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten._grouped_mm.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""Matrix products and attention. A memory that computes in tiles (`backends.tiles`) has none that could be kept."""


def checked(mode: str) -> Mode:
    """The mode by its name; raises InputError for another."""
    for known in get_args(Mode):
        if mode == known:
            return known
    raise InputError(f"recompute is {mode!r}; give one of {', '.join(get_args(Mode))}")


def recomputed(run: Callable[[Tensor], Made], entering: Tensor, mode: Mode, choosing: bool) -> Made:
    """run(entering), whose activations are not kept but for what `mode` says.

    `none` keeps all; `layer` the input and what was decided, at the price of another forward pass; `cheap` the results
    of products and attention too, so that element-wise work alone is done again. choosing: whether there is anything to
    decide; operations are looked at one by one (microseconds each) only then, or in `cheap`. Random numbers are those
    of the first run. A region that keeps anything can be differentiated once.
    """
    if mode == "none":
        return run(entering)
    if mode == "layer" and not choosing:
        return checkpoint(run, entering, use_reentrant=False)  # pyright: ignore[reportReturnType]
    kept = DECISIONS if mode == "layer" else DECISIONS | COSTLY
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    return checkpoint(run, entering, use_reentrant=False, context_fn=contexts)  # pyright: ignore[reportReturnType]


def _policy(kept: frozenset, context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
