"""PKM: single cells by product keys."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from transect.models.selectors._product_keys import PairConfig, ProductKeys, best_pairs, pair_odds
from transect.models.selectors._scored import Choice, Scored, without_padding
from transect.models.selectors.base import Selection, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class PKM(Scored):
    """Score of cell (a, b) is q1.c_a + q2.c'_b with q = W_q x; the k largest win, exactly, without forming the others.

    A kept cell counts with the softmax over the kept scores, or with f of its score (ASSUMED 0.5 each). Router noise,
    if any, reaches the coefficients, which are made of the scores. `Selection.scores` is None.
    Source: Lample et al. 2019; Avg-K 3.2, 3.5 (its use there ASSUMED 0.5). Difference: no norm of the query.
    Cost: 2 d d_q + d_q (n1 + n2) FLOPs per token and the candidates' adds.
    """

    class Config(PairConfig):
        """pkm_coefficient: `softmax_kept` as published, or `activation`, f(score) as in any other memory."""

        kind: str = "pkm"
        pkm_coefficient: Literal["softmax_kept", "activation"] = "softmax_kept"

    config: Config
    provides_keys = True
    cells_only = True

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.keys = ProductKeys(shape.width, shape.blocks, config.query_width(shape.width))

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        first, second = self.keys(self.noisy(without_padding(x, real)))
        cells, kept, margin = best_pairs(first, second, self.shape.active)
        softmax = self.config.pkm_coefficient == "softmax_kept"
        coefficients = kept.softmax(-1) if softmax else memory.activation(kept)
        choice = Choice(cells, kept, margin)
        return self.selection(choice, lambda: pair_odds(first, second, real), real, None, coefficients)

    def flops(self) -> float:
        """2 d d_q + d_q (n1 + n2) and the candidates' adds."""
        return self.keys.flops(self.shape.active)
