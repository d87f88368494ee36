"""LoRKM: single cells by low-rank keys."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor, nn

from transect.models.selectors._gates import routed
from transect.models.selectors._scored import Choice, Scored, ScoredConfig, softmax_odds, without_padding
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class LoRKM(Scored):
    """Scores x D U with D [d, rk] and U [rk, d_m] in place of keys; the k largest win, each counts with f(score).

    Scores in float32 or better, under autocast too. Router noise, if any, reaches the coefficients, which are the
    scores.
    Source: Avg-K 3.2 (names and placement ASSUMED 0.75). Cost: 2 (d rk + rk d_m) FLOPs per token.
    """

    class Config(ScoredConfig):
        """lork_rank: rk; an eighth of the width, at least 1, if not given."""

        kind: str = "lorkm"
        lork_rank: Annotated[int, Field(ge=1)] | None = None

    config: Config
    provides_keys = True
    cells_only = True

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.rank = config.lork_rank or max(1, shape.width // 8)
        self.project = nn.Linear(shape.width, self.rank, bias=False)
        self.keys = nn.Linear(self.rank, shape.blocks, bias=False)

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        low = routed(self.noisy(without_padding(x, real)), self.project.weight)
        scores = routed(low, self.keys.weight)
        cells, margin = best(scores, self.shape.active)
        kept = scores.gather(1, cells)
        choice = Choice(cells, kept, margin)
        return self.selection(choice, lambda: softmax_odds(scores, real), real, scores, memory.activation(kept))

    def flops(self) -> float:
        """2 (d rk + rk d_m)."""
        return 2.0 * self.rank * (self.shape.width + self.shape.blocks)
