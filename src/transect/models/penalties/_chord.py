"""The displacement of two states with its gradient in closed form, which needs the states and no more."""

from typing import Any

import torch
from torch import Tensor

from transect.metrics.angles import displacement, widened

Turns = tuple[Tensor, Tensor, Tensor]
"""Psi, |before| and |after| of each token [batch, positions]; only Psi has a gradient."""


def plain_turns(before: Tensor, after: Tensor, eps: float) -> Turns:
    """The twin of `turns`: the metric of the `jump` probe, differentiated by autograd."""
    psi = displacement(before, after, eps)
    return psi, widened(before.detach()).norm(dim=-1), widened(after.detach()).norm(dim=-1)


def turns(before: Tensor, after: Tensor, eps: float) -> Turns:
    """Psi = |a^ - b^|^2 / 4 with |a|, |b| for each token, in float32 or better; equal to `plain_turns`.

    dPsi/db = -(a^ - cos b^) / (2 |b|), and for a with a and b exchanged; cos is 1 - 2 Psi, which keeps its digits.
    Saved for the backward pass: the two states themselves, no copies, and three numbers per token; where a second
    derivative is asked for, the gradient is the twin's.
    Source: arXiv 2601.18302, displacement and its gradient. Cost: O(width) per token, a few reads of the states.
    """
    return _Turns.apply(before, after, eps)


class _Turns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, after: Tensor, eps: float) -> Turns:
        wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
        sizes = [torch.linalg.vector_norm(state, dim=-1, keepdim=True, dtype=wide) for state in (before, after)]
        floors = [size.clamp_min(eps) for size in sizes]
        chord = (before / floors[0]).addcdiv_(after, floors[1], value=-1)
        squared = chord.square_().sum(-1).div_(4)
        ctx.save_for_backward(before, after, squared, *sizes)
        ctx.eps = eps
        lengths = [size.squeeze(-1).clone() for size in sizes]
        ctx.mark_non_differentiable(*lengths)
        return squared.clamp_max(1), *lengths

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        before, after, squared, *sizes = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            psi = displacement(before, after, ctx.eps)
            found = torch.autograd.grad(psi, (before, after), grad, create_graph=True, allow_unused=True)
            return found[0], found[1], None
        floors = [size.clamp_min(ctx.eps) for size in sizes]
        half = (grad * (squared <= 1)).unsqueeze(-1) / 2  # rounding may lift Psi above 1, where it is cut off
        lengths = [size / floor for size, floor in zip(sizes, floors, strict=True)]  # of a^ and b^: 1, less near zero
        cosine = (lengths[0].square() + lengths[1].square()) / 2 - 2 * squared.unsqueeze(-1)
        across = -half / (floors[0] * floors[1])
        grads: list[Tensor | None] = [None, None]
        for which, (own, other) in enumerate(((before, after), (after, before))):
            if ctx.needs_input_grad[which]:
                kept = torch.where(sizes[which] >= ctx.eps, cosine, 1)  # below eps the length counts as constant
                along = half * kept / floors[which].square()
                grads[which] = torch.mul(other, across).addcmul_(own, along).to(own.dtype)
        return grads[0], grads[1], None
