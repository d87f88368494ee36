"""GShard: the two best experts, the second one by chance, and a capacity."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from transect.models.plug import Unfit
from transect.models.recompute import decided
from transect.models.selectors._balance import counts
from transect.models.selectors._capacity import Drop
from transect.models.selectors._gates import routed
from transect.models.selectors._scored import (
    Choice,
    Factor,
    Scored,
    ScoredConfig,
    Weight,
    softmax_odds,
    without_padding,
)
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class GShard(Scored):
    """p = softmax(W_r x); the two largest g1, g2 win with weights g1 / (g1 + g2) and g2 / (g1 + g2).

    In training the second is read with chance min(1, 2 g2 / (g1 + g2)); weights are not normalised anew. A block takes
    int(c ceil(2 N / B)) tokens, all first choices before any second one. The balance loss counts first choices only.
    First choices of later tokens so take the places of earlier second ones: a causal model needs consent, or
    `drop: order`, or no capacity. Differences: one group, the whole batch; seconds that lost the draw take no place;
    outside training nothing is drawn, and by default nothing dropped, so that decoding equals the full forward.
    Source: Lepikhin et al. 2020, algorithm 1. Cost: 2 d B FLOPs per token, and a sort of the pairs for the capacity.
    """

    class Config(ScoredConfig):
        """second: `random` as published, or `all`."""

        kind: str = "gshard"
        balance: Weight = 0.01
        capacity: Factor | None = 1.0
        eval_capacity: Factor | Literal["as_training"] | None = None
        drop: Drop = "choice"
        second: Literal["random", "all"] = "random"

        def leaks(self) -> str | None:
            """As for any capacity: without one, or with `drop: order`, no later token matters."""
            return super().leaks()

        def check_shape(self, shape: Shape, causal: bool, where: str) -> None:
            """Two blocks, no more and no fewer."""
            super().check_shape(shape, causal, where)
            if shape.active != 2:
                above = where.rpartition(".")[0]
                raise Unfit(f"{above}.active_blocks", shape.active, "selector gshard reads two blocks; give 2")

    config: Config
    causal_safe = False

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.router = nn.Linear(shape.width, shape.blocks, bias=False)

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        scores = routed(self.noisy(without_padding(x, real)), self.router.weight)
        blocks, margin = best(scores, 2)
        kept = scores.gather(1, blocks)
        weights = kept.softmax(-1)  # g1 / (g1 + g2), g2 / (g1 + g2)
        wanted = None
        if self.training and self.config.second == "random":
            chance = torch.stack([torch.ones_like(weights[:, 1]), 2 * weights[:, 1].detach()], dim=1)
            wanted = decided(chance > torch.rand_like(chance))
        firsts = counts(blocks[:, :1], self.shape.blocks, None if real is None else real[:, None])
        choice = Choice(blocks, kept, margin, weights, wanted)
        return self.selection(choice, lambda: softmax_odds(scores, real), real, scores, balanced=firsts)

    def flops(self) -> float:
        """2 d B."""
        return 2.0 * self.shape.width * self.shape.blocks
