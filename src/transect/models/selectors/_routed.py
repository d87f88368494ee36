"""What `top_k` and `bias_balanced` share: affinities of a learned router, groups, normalised weights."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from transect.config import misfit
from transect.models.plug import Unfit
from transect.models.selectors._balance import mean_over
from transect.models.selectors._gates import routed
from transect.models.selectors._scored import Choice, Odds, Scored, ScoredConfig, without_padding
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Shape

_TINY = 1e-20  # as in DeepSeek-V3: no division by zero where every kept affinity has vanished


class RoutedConfig(ScoredConfig):
    """scores: affinity of a block, softmax over all of them or the sigmoid of its own score. normalise: weights are
    divided by their sum over the kept blocks. scale multiplies them. groups of neighbouring blocks: a token reads
    blocks of its active_groups best groups only, a group being worth the sum of its two best affinities.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: Annotated[float, Field(gt=0)] = 1.0
    groups: Annotated[int, Field(ge=1)] = 1
    active_groups: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _groups_fit(self):
        if (self.active_groups or 1) > self.groups:
            raise misfit("active_groups", self.active_groups, f"more than there are; groups is {self.groups}")
        return self

    def check_shape(self, shape: Shape, causal: bool, where: str) -> None:
        """Groups must be equal and have room for the active blocks."""
        super().check_shape(shape, causal, where)
        if shape.blocks % self.groups:
            raise Unfit(f"{where}.groups", self.groups, f"must divide the {shape.blocks} blocks")
        room = (self.active_groups or self.groups) * (shape.blocks // self.groups)
        if shape.active > room:
            why = f"{room} blocks for {shape.active} active ones; give more active groups"
            raise Unfit(f"{where}.active_groups", self.active_groups, why)


class Routed(Scored):
    """A learned router W_r [B, d], product in float32 or better, whose affinities are weights too."""

    Config: ClassVar[type[RoutedConfig]]
    config: RoutedConfig

    def __init__(self, config: RoutedConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.router = nn.Linear(shape.width, shape.blocks, bias=False)

    def route(self, x: Tensor, real: Tensor | None, bias: Tensor | None) -> Selection:
        """Blocks by affinity + bias, weights by affinity alone."""
        config = self.config
        logits = routed(self.noisy(without_padding(x, real)), self.router.weight)
        affinity = logits.softmax(-1) if config.scores == "softmax" else logits.sigmoid()
        ranked = affinity if bias is None else affinity + bias
        blocks, margin = best(self._in_groups(ranked), self.shape.active)
        weights = affinity.gather(1, blocks)
        if config.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        choice = Choice(blocks, ranked.gather(1, blocks), margin, weights * config.scale)
        return self.selection(choice, lambda: self._odds(logits, affinity, real), real, ranked)

    def _in_groups(self, ranked: Tensor) -> Tensor:
        groups, active = self.config.groups, self.config.active_groups or self.config.groups
        if active == groups:
            return ranked
        grouped = ranked.detach().unflatten(-1, (groups, -1))
        worth = grouped.topk(min(2, grouped.shape[-1])).values.sum(-1)
        left = worth.new_full(worth.shape, float("-inf")).scatter(1, best(worth, active).indices, 0.0)
        return (grouped + left[:, :, None]).flatten(1)

    def _odds(self, logits: Tensor, affinity: Tensor, real: Tensor | None) -> Odds:
        chance = affinity if self.config.scores == "softmax" else affinity / (affinity.sum(-1, keepdim=True) + _TINY)
        return Odds(mean_over(chance, real), logits.logsumexp(-1))

    def flops(self) -> float:
        """2 d B."""
        return 2.0 * self.shape.width * self.shape.blocks
