"""A classifier on the last states of a view's model: one vector for a text, a linear map to classes or to a score."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from transect.data.order import Purpose, draws
from transect.errors import InputError
from transect.tasks._adapters import Adapters, linear
from transect.tasks._sequences import Padded, states
from transect.view.view import View

Pool = Literal["auto", "first", "last", "mean"]
POOLS = ("auto", "first", "last", "mean")
STD = 0.02


class Classifier(nn.Module):
    """logits = W dropout(pooled) + b; of options one number each, compared within an item.

    pooled: `first`, tanh(dense(state of the first token)); `last`, the state of the last real token; `mean`, over real
    tokens that the tokenizer did not add. auto: first where the model sees both sides, last where it does not. Weights
    are normal with std 0.02 by the seed, biases 0. The model is no part of it; adapters, where there are any, are.
    """

    def __init__(
        self,
        view: View,
        classes: int,
        pool: Pool = "auto",
        dropout: float = 0.1,
        adapters: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise InputError(f"pool is {pool!r}; allowed are {', '.join(POOLS)}")
        self.classes = classes
        self.pool = ("last" if view.causal else "first") if pool == "auto" else pool
        first, second, third = (int(one) for one in draws(seed, Purpose.EVALUATION, np.arange(3)) >> np.uint64(1))
        self.dense = _linear(view, view.width, first) if self.pool == "first" else None
        self.dropout = nn.Dropout(dropout)
        self.map = _linear(view, classes or 1, second)
        self.adapters = None if adapters is None else Adapters(view, adapters, third)

    def forward(self, view: View, batch: Padded) -> Tensor:
        """Logits [items, classes], or [items, most options] with -inf where an item has fewer."""
        if self.adapters is None:
            hidden = states(view, batch)
        else:
            with self.adapters.within(view):
                hidden = states(view, batch)
        vectors = pooled(hidden, batch, self.pool)
        if self.dense is not None:
            vectors = torch.tanh(self.dense(vectors))
        logits = self.map(self.dropout(vectors))
        if self.classes:
            return logits
        shape = int(batch.item.max()) + 1, int(batch.number.max()) + 1
        scores = logits.new_full(shape, -torch.inf)
        return scores.index_put((batch.item, batch.number), logits[:, 0])


def pooled(hidden: Tensor, batch: Padded, pool: str) -> Tensor:
    """One vector [n, width] of states [n, positions, width]."""
    if pool == "first":
        return hidden[:, 0]
    rows = torch.arange(len(hidden), device=hidden.device)
    if pool == "last":
        return hidden[rows, batch.mask.sum(1) - 1]
    text = batch.mask & ~batch.special
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).masked_fill(~text[..., None], 0)
    return (wide.sum(1) / text.sum(1, keepdim=True)).to(hidden.dtype)


def _linear(view: View, outputs: int, seed: int) -> nn.Linear:
    made = linear(view, view.width, outputs)
    drawn = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.weight.copy_(STD * drawn)
    return made
