"""A control: blocks by a random projection that is never trained."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from transect.models.selectors._gates import routed
from transect.models.selectors._scored import Gated, GatedConfig
from transect.models.selectors.base import Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class RandomRouter(Gated):
    """Scores W_r x with a frozen W_r, drawn as any matrix of the model is; gate 1.

    What `switch` with a binary gate and no balance loss amounts to, and the fair rival of binary `avg_k`. Gates other
    than binary let gradient through to x, never to W_r. Source: Avg-K section 4. Cost: 2 d B FLOPs per token.
    """

    class Config(GatedConfig):
        """As for any gated selector."""

        kind: str = "random_router"

    config: Config

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.router = nn.Linear(shape.width, shape.blocks, bias=False)
        self.router.weight.requires_grad_(False)

    def scores(self, x: Tensor, memory: "Memory") -> Tensor:
        return routed(x, self.router.weight.detach())  # also where something made all parameters trainable

    def flops(self) -> float:
        """2 d B."""
        return 2.0 * self.shape.width * self.shape.blocks
