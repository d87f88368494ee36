"""Avg-K: a block is chosen by the mean of its keys."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transect.models.memory.backends.tables import wide_type
from transect.models.selectors._gates import routed, wide
from transect.models.selectors._scored import Gated, GatedConfig
from transect.models.selectors._seeds import generator
from transect.models.selectors.base import Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class AvgK(Gated):
    """s_i = x.e_i with e_i the mean of block i's keys, so s_i is the block's mean pre-activation; the b largest win.

    e is computed from the key table at every forward, never stored. With the default binary gate no gradient flows
    through the score; e still moves, because the loss trains the keys of the blocks used.
    Source: Liu et al., EMNLP 2023; Avg-K 3.3. ASSUMED: mean before the non-linearity (0.85), binary gate (0.7), no
    row normalisation of keys (0.75). Scores in float32 or better, under autocast too, as those of learned routers; but
    the full key product of `mean_activation` in the type of x, or autocast's. Cost: 2 d B FLOPs per token and one pass
    over the keys per forward.
    """

    class Config(GatedConfig):
        """block_score: what speaks for a block, its `mean_key`, the `mean_activation` of its cells, the key of largest
        norm (`max_norm_key`) or one drawn once (`random_key`, by `seed` and layer). normalise_keys: keys have length 1
        in scores. score_bias: scores have the key bias of what speaks for the block, where the memory has biases.
        score_grad: `stop` lets no gradient through the scores.
        """

        kind: str = "avg_k"
        block_score: Literal["mean_key", "mean_activation", "max_norm_key", "random_key"] = "mean_key"
        normalise_keys: bool = False
        score_bias: bool = False
        score_grad: Literal["on", "stop"] = "on"
        seed: int = 0

    config: Config

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.drawn: Tensor | None
        drawn = torch.empty(shape.blocks, dtype=torch.long) if config.block_score == "random_key" else None
        self.register_buffer("drawn", drawn)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Draw the cell that speaks for each block."""
        if self.drawn is not None and not self.drawn.is_meta:
            source = generator(self.config.seed, self.shape.layer)
            cells = torch.randint(self.shape.block_size, self.drawn.shape, generator=source, device="cpu")
            self.drawn.copy_(cells)

    def scores(self, x: Tensor, memory: "Memory") -> Tensor:
        if self.config.block_score == "mean_activation":
            scores = self._mean_activations(x, memory)
        else:
            of_bias = self.config.score_bias and memory.key_bias is not None
            keys = memory.of_blocks(lambda keys, _, where: self._of_blocks(self._scored(keys), keys, where))
            bias = memory.of_blocks(self._of_bias) if of_bias else None
            scores = routed(x, keys, bias)
        return scores.detach() if self.config.score_grad == "stop" else scores

    def reads_cells(self) -> bool:
        """Only for the mean of their activations."""
        return self.config.block_score == "mean_activation"

    def _mean_activations(self, x: Tensor, memory: "Memory") -> Tensor:
        assert memory.keys is not None
        keys = self._scored(memory.keys)
        bias = memory.key_bias if self.config.score_bias else None
        table = keys.flatten(0, 1).to(x.dtype)
        coefficients = memory.activation(F.linear(x, table, None if bias is None else bias.flatten()))
        return wide(coefficients).unflatten(-1, keys.shape[:2]).mean(-1)

    def _scored(self, keys: Tensor) -> Tensor:
        return F.normalize(wide(keys), dim=-1) if self.config.normalise_keys else keys

    def _of_bias(self, keys: Tensor, bias: Tensor | None, where: range) -> Tensor:
        assert bias is not None
        return self._of_blocks(bias, keys, where)

    def _of_blocks(self, table: Tensor, keys: Tensor, where: range) -> Tensor:
        """One entry per block of table [blocks, block_size, ...], the blocks of these numbers."""
        if self.config.block_score == "mean_key":
            return table.mean(1, dtype=wide_type(table.dtype))
        blocks = torch.arange(len(table), device=table.device)
        cells = _lengths(keys).argmax(-1) if self.drawn is None else self.drawn[where.start : where.stop]
        return table[blocks, cells]

    def flops(self) -> float:
        """2 d B; 2 d B g where every cell is scored."""
        cells = self.shape.block_size if self.config.block_score == "mean_activation" else 1
        return 2.0 * self.shape.width * self.shape.blocks * cells


def _lengths(keys: Tensor) -> Tensor:
    return torch.linalg.vector_norm(keys, dim=-1, dtype=wide_type(keys.dtype))
