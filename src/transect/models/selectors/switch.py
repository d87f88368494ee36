"""Switch: a learned router, softmax over all blocks, a balance loss."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from transect.models.selectors._gates import GateName, routed
from transect.models.selectors._scored import Gated, GatedConfig, Weight
from transect.models.selectors.base import Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class Switch(Gated):
    """p = softmax(W_r x) in float32 or better; the b largest win, and p_i multiplies block i.

    Without balance loss a learned router tends to use few blocks; with `gate: binary` and no balance loss W_r gets no
    gradient at all and is a random projection.
    Source: Fedus et al. 2022 and fairseq's `moe` branch; Avg-K 3.4 (that the paper used exactly it: ASSUMED 0.7). The
    generalisation of the balance loss to b > 1 counts pairs (ASSUMED 0.6). Cost: 2 d B FLOPs per token.
    """

    class Config(GatedConfig):
        """As for any gated selector; `softmax_all` and a balance loss of 0.01 are Switch's own."""

        kind: str = "switch"
        gate: GateName = "softmax_all"
        balance: Weight = 0.01

    config: Config

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.router = nn.Linear(shape.width, shape.blocks, bias=False)

    def scores(self, x: Tensor, memory: "Memory") -> Tensor:
        return routed(x, self.router.weight)

    def flops(self) -> float:
        """2 d B."""
        return 2.0 * self.shape.width * self.shape.blocks
