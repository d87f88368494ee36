"""Expert choice: blocks pick their tokens."""

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from transect.models.selectors._balance import counts, statistics, z_loss
from transect.models.selectors._gates import jittered, routed
from transect.models.selectors._scored import NoisyConfig, without_padding
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Selector, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class ExpertChoice(Selector):
    """p = softmax(W_r x) over blocks; each block takes the ceil(c N b / B) tokens with the largest p, gated by p.

    Every block has equally many tokens, a token any number of blocks. Whether a block takes a token depends on all the
    others, later ones too: a causal model that is trained so predicts with knowledge it will not have, and decoding
    token by token chooses otherwise. Hence the consent. Ties go to the earlier token.
    Source: Zhou et al. 2022 (k = n c / e with c = b; rounded up). Cost: 2 d B FLOPs per token, O(N B) for the choice;
    the number of blocks per token is read back from the device.
    """

    class Config(NoisyConfig):
        """capacity c: times the mean number of tokens per block, N b / B."""

        kind: str = "expert_choice"
        capacity: Annotated[float, Field(gt=0)] = 1.0

        def leaks(self) -> str | None:
            """Always."""
            return "blocks choose among all tokens, later ones too"

    config: Config
    causal_safe = False

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.router = nn.Linear(shape.width, shape.blocks, bias=False)

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        x = without_padding(x, real)
        scores = routed(jittered(x, self.config.router_noise) if self.training else x, self.router.weight)
        probability = scores.softmax(-1)
        ranked = probability.detach()
        tokens = len(x)
        if real is not None:
            ranked = ranked.masked_fill(~real[:, None], -1.0)
            tokens = int(real.sum())
        taken = self._taken(ranked, tokens)
        blocks = _as_slots(taken)
        kept = blocks >= 0
        weights = probability.gather(1, blocks.clamp_min(0)) * kept
        stats = statistics(counts(blocks, self.shape.blocks, kept), kept, weights, None, real)
        weight = self.config.z_loss
        losses = {"z_loss": z_loss(scores.logsumexp(-1), real)} if weight else {}
        return Selection(blocks, weights, scores, None, losses, stats)

    def _taken(self, ranked: Tensor, tokens: int) -> Tensor:
        """Which block takes which token, True in [tokens, blocks]; `tokens` of them are real."""
        even = self.config.capacity * tokens * self.shape.active / self.shape.blocks
        each = min(tokens, math.ceil(even - 1e-9))  # 1.1 * 10 / 11 is a little more than 1
        taken = torch.zeros_like(ranked, dtype=torch.bool)
        if each:
            taken.t().scatter_(1, best(ranked.t(), each).indices, True)
        return taken

    def flops(self) -> float:
        """2 d B."""
        return 2.0 * self.shape.width * self.shape.blocks


def _as_slots(taken: Tensor) -> Tensor:
    """The True columns of each row of [tokens, blocks], ascending, filled up with -1 to the longest row."""
    slots = int(taken.sum(1).max()) if len(taken) else 0
    blocks = torch.full((len(taken), max(1, slots)), -1, device=taken.device)
    rows, columns = taken.nonzero(as_tuple=True)
    blocks[rows, taken.cumsum(1)[rows, columns] - 1] = columns
    return blocks
