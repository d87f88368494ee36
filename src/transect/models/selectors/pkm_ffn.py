"""PKM-FFN: product keys choose cells of an ordinary memory."""

from typing import TYPE_CHECKING

from torch import Tensor

from transect.models.selectors._gates import gate, gate_factor
from transect.models.selectors._product_keys import PairConfig, ProductKeys, best_pairs, log_partition, pair_odds
from transect.models.selectors._scored import Choice, GatedConfig, Scored, without_padding
from transect.models.selectors.base import Selection, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class PKMFFN(Scored):
    """Cells are ranked as in `pkm`, but their coefficients are f(x.k_l) with full keys, times the gate.

    With the default binary gate and no balance loss the product keys get no gradient: they are a random choice that
    never learns. `Selection.scores` is None, for scores of all pairs are never formed.
    Source: Avg-K 3.2; gate unknown in the paper (binary ASSUMED 0.5), balance loss unknown, off. Cost: as `pkm`.
    """

    class Config(PairConfig, GatedConfig):
        """As for any gated selector, and `pkm_dim`; the table's `pkm_ffn_gate` is `gate` here."""

        kind: str = "pkm_ffn"

    config: Config
    cells_only = True

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.keys = ProductKeys(shape.width, shape.blocks, config.query_width(shape.width))

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        first, second = self.keys(self.noisy(without_padding(x, real)))
        cells, kept, margin = best_pairs(first, second, self.shape.active)
        weights = gate(self.config.gate, kept, lambda: log_partition(first, second))
        weights = weights * gate_factor(self.config.gate_scale, self.shape.active, self.shape.blocks)
        choice = Choice(cells, kept, margin, weights)
        return self.selection(choice, lambda: pair_odds(first, second, real), real)

    def flops(self) -> float:
        """2 d d_q + d_q (n1 + n2) and the candidates' adds."""
        return self.keys.flops(self.shape.active)
