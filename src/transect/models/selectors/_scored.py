"""What selectors with scores share: settings of losses, noise and capacity, and what follows once b are chosen."""

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from transect.config import misfit
from transect.models.plug import Unfit
from transect.models.selectors._balance import balance_loss, counts, mean_over, statistics, z_loss
from transect.models.selectors._capacity import Drop, within_capacity
from transect.models.selectors._gates import GateName, GateScale, gate, gate_factor, jittered, wide
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Selector, SelectorConfig, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


Weight = Annotated[float, Field(ge=0)]
Factor = Annotated[float, Field(ge=1)]


class NoisyConfig(SelectorConfig):
    """z_loss: weight of the squared log-partition. router_noise: jitter of the scored input, in training only.

    accept_leak: consent, needed in a causal model where what a token is given depends on later tokens.
    """

    z_loss: Weight = 0.0
    router_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accept_leak: bool = False

    def loss_weights(self) -> dict[str, float]:
        """That of the z-loss, where it has one."""
        return {"z_loss": self.z_loss} if self.z_loss else {}

    def leaks(self) -> str | None:
        """Why a token's blocks depend on later tokens, and what else could be set; None where they do not."""
        return None

    def check_shape(self, shape: Shape, causal: bool, where: str) -> None:
        """Refuse a leak without consent."""
        leak = self.leaks()
        if causal and leak and not self.accept_leak:
            raise Unfit(f"{where}.accept_leak", False, f"{leak}; in a causal model give accept_leak: true")


class ScoredConfig(NoisyConfig):
    """balance: weight of the balance loss. capacity c: a block takes int(c ceil(N b / B)) tokens; null: all.

    eval_capacity is the one outside training, where not `as_training`. drop: whom a full block drops, the last in
    `order`, by `choice` (second choices give way to first ones) or by `score`; the last two look at later tokens.
    """

    balance: Weight = 0.0
    capacity: Factor | None = None
    eval_capacity: Factor | Literal["as_training"] | None = "as_training"
    drop: Drop = "order"

    def loss_weights(self) -> dict[str, float]:
        """Those of the balance loss and of the z-loss, where they have one."""
        return ({"balance": self.balance} if self.balance else {}) | super().loss_weights()

    def leaks(self) -> str | None:
        """A full block that lets a later token take an earlier one's place."""
        if (self.capacity_at(True) is None and self.capacity_at(False) is None) or self.drop == "order":
            return None
        return (
            f"with drop: {self.drop} later tokens take the places of earlier ones; give drop: order or capacity: null"
        )

    def capacity_at(self, training: bool) -> float | None:
        """c in training, or outside it."""
        if training or self.eval_capacity == "as_training":
            return self.capacity
        return self.eval_capacity


class GatedConfig(ScoredConfig):
    """gate: what a chosen block is multiplied with. gate_scale: times b (softmax_kept) or B (softmax_all)."""

    gate: GateName = "binary"
    gate_scale: GateScale = "none"

    @model_validator(mode="after")
    def _scale_fits(self) -> Self:
        fits = {"none": self.gate, "times_b": "softmax_kept", "times_B": "softmax_all"}[self.gate_scale]
        if self.gate != fits:
            raise misfit("gate_scale", self.gate_scale, f"goes with gate: {fits}; gate is {self.gate}")
        return self


class Odds(NamedTuple):
    """probability [blocks], a token's chance of each block, averaged over tokens; log_partition [tokens]."""

    probability: Tensor
    log_partition: Tensor


class Choice(NamedTuple):
    """What a rule chose, before drops: blocks [tokens, b] with their scores `kept`, margin [tokens] as `best` gives it.

    weights [tokens, b] are 1 if None; wanted [tokens, b] is False where the rule itself drops a block, None: nowhere.
    """

    blocks: Tensor
    kept: Tensor
    margin: Tensor | None
    weights: Tensor | None = None
    wanted: Tensor | None = None


class Scored(Selector):
    """A selector with scores, of which each token keeps the b best."""

    Config: ClassVar[type[ScoredConfig]]
    config: ScoredConfig

    def noisy(self, x: Tensor) -> Tensor:
        """The input that is scored."""
        return jittered(x, self.config.router_noise) if self.training else x

    def selection(
        self,
        choice: Choice,
        odds: Callable[[], Odds],
        real: Tensor | None,
        scores: Tensor | None = None,
        coefficients: Tensor | None = None,
        balanced: Tensor | None = None,
    ) -> Selection:
        """Losses, capacity, padding and statistics of a choice; `odds` is asked only where a loss has a weight.

        balanced [blocks] are the counts that the balance loss evens out, if not those of all that was chosen.
        """
        total = self.shape.blocks
        weights = torch.ones_like(wide(choice.kept)) if choice.weights is None else choice.weights
        chosen = torch.ones_like(choice.blocks, dtype=torch.bool)
        if real is not None:
            chosen = chosen & real[:, None]
        load = counts(choice.blocks, total, None if real is None else chosen)
        kept = chosen if choice.wanted is None else chosen & choice.wanted
        factor = self.config.capacity_at(self.training)
        if factor is not None:
            kept = within_capacity(choice.blocks, choice.kept, kept, factor, total, self.config.drop)
        return Selection(
            blocks=choice.blocks.where(kept, choice.blocks.new_full((), -1)),
            weights=weights.where(kept, weights.new_zeros(())),
            scores=scores,
            coefficients=coefficients,
            losses=self._losses(load if balanced is None else balanced, odds, real),
            stats=statistics(load, kept, weights, choice.margin, real),
        )

    def _losses(self, load: Tensor, odds: Callable[[], Odds], real: Tensor | None) -> dict[str, Tensor]:
        asked = self.config.loss_weights()
        if not asked:
            return {}
        probability, log_partition = odds()
        losses = {"balance": lambda: balance_loss(load, probability), "z_loss": lambda: z_loss(log_partition, real)}
        return {name: losses[name]() for name in asked}


class Gated(Scored):
    """A selector that keeps the b best of scores over all blocks and gates them."""

    Config: ClassVar[type[GatedConfig]]
    config: GatedConfig

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        scores = self.scores(self.noisy(without_padding(x, real)), memory)
        active, blocks = self.shape.active, self.shape.blocks
        chosen, margin = best(scores, active)
        kept = scores.gather(1, chosen)
        weights = gate(self.config.gate, kept, lambda: wide(scores).logsumexp(-1))
        weights = weights * gate_factor(self.config.gate_scale, active, blocks)
        return self.selection(Choice(chosen, kept, margin, weights), lambda: softmax_odds(scores, real), real, scores)

    @abstractmethod
    def scores(self, x: Tensor, memory: "Memory") -> Tensor:
        """[tokens, blocks]; the b largest of each row are chosen."""


def softmax_odds(scores: Tensor, real: Tensor | None) -> Odds:
    """Of softmax over all scores."""
    scores = wide(scores)
    return Odds(mean_over(scores.softmax(-1), real), scores.logsumexp(-1))


def without_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """x with zeros at padding, so that nothing there, not even NaN, reaches a score or a gradient."""
    return x if real is None else x.where(real[:, None], x.new_zeros(()))
