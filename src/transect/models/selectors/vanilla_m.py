"""VanillaM: single cells by their own coefficients, all of which are computed."""

from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from transect.models.selectors._scored import Choice, Scored, ScoredConfig, softmax_odds, without_padding
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class VanillaM(Scored):
    """The k cells with the largest pre-activation x.k_l + b1_l, among all d_m; each counts with f of it.

    The key product is the selection, so the coefficients come from it and are not computed twice; only for a gated
    memory, whose cells need more than f, and under noise, which must not reach them, they stay None.
    Scores are in the type of x, or autocast's, for the product is the memory's own: in float32 it would cost several
    times the whole selection. So under bfloat16 some cells at the cut are equal, and the first of them win.
    Source: Avg-K 3.2, T5. Cost: 2 d d_m FLOPs per token, less 2 d k that the memory need not do.
    """

    class Config(ScoredConfig):
        """rank_by: `preactivation`, `coefficient` f(x.k) or its size `abs_coefficient`; f is not monotone (GELU)."""

        kind: str = "vanilla_m"
        rank_by: Literal["preactivation", "coefficient", "abs_coefficient"] = "preactivation"

    config: Config
    cells_only = True

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        assert memory.keys is not None
        bias = None if memory.key_bias is None else memory.key_bias.flatten()
        before = F.linear(self.noisy(without_padding(x, real)), memory.keys.flatten(0, 1), bias)
        scores = before if self.config.rank_by == "preactivation" else memory.activation(before)
        scores = scores.abs() if self.config.rank_by == "abs_coefficient" else scores
        cells, margin = best(scores, self.shape.active)
        own = memory.up is None and not (self.training and self.config.router_noise)
        coefficients = memory.activation(before.gather(1, cells)) if own else None
        kept = scores.gather(1, cells)
        choice = Choice(cells, kept, margin)
        return self.selection(choice, lambda: softmax_odds(scores, real), real, scores, coefficients)

    def reads_cells(self) -> bool:
        """All of them."""
        return True

    def flops(self) -> float:
        """2 d d_m - 2 d k; the whole key product for a gated memory, which does its own again."""
        spared = 0 if self.shape.gated else self.shape.active
        return 2.0 * self.shape.width * (self.shape.blocks - spared)
