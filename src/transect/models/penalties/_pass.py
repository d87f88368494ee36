"""The penalties of one forward pass: which are active, what they saw of each layer, what they add to the loss."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from transect import registry
from transect.models.penalties.base import LayerSums, Penalty
from transect.models.plug import PlugConfig


def build_penalty(config: PlugConfig, layers: int) -> Penalty:
    """The penalty that the settings describe, for a model that executes so many layers."""
    kind: Any = registry.load("transect.models.penalties", config.kind, Penalty)
    return kind(config, layers)


class PenaltyPass:
    """Active penalties of a pass, layer by layer.

    counted: the positions of each, as `Penalty.counted` gives them. `final_norm` and `raw_embedding` are called only
    for penalties that read those states.
    """

    def __init__(
        self,
        penalties: Sequence[Penalty],
        counted: Sequence[Tensor | None],
        step: int | None,
        final_norm: Callable[[Tensor], Tensor] | None,
        raw_embedding: Callable[[], Tensor],
    ) -> None:
        self.penalties, self.counted, self.step = penalties, counted, step
        self.final_norm, self.raw_embedding = final_norm, raw_embedding

    def layer(self, place: int, before: Tensor, after: Tensor) -> tuple[LayerSums, ...]:
        """What each penalty makes of one layer; safe to compute again in a checkpointed region."""
        return tuple(
            penalty.layer(place, self._before(penalty, place, before), self._after(penalty, place, after), counted)
            for penalty, counted in zip(self.penalties, self.counted, strict=True)
        )

    def totals(self, sums: Sequence[tuple[LayerSums, ...]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted losses by the penalties' names, and their statistics."""
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        for penalty, seen in zip(self.penalties, zip(*sums, strict=True), strict=True):
            loss, numbers = penalty.total(seen, self.step)
            name = penalty.config.kind
            losses[name] = losses[name] + loss if name in losses else loss
            stats.update({f"{name}.{key}": value for key, value in numbers.items()})
        return losses, stats

    def _before(self, penalty: Penalty, place: int, before: Tensor) -> Tensor:
        return self.raw_embedding() if place == 0 and penalty.reads_raw_embedding else before

    def _after(self, penalty: Penalty, place: int, after: Tensor) -> Tensor:
        last = place == penalty.layers - 1
        return self.final_norm(after) if last and penalty.reads_final_norm and self.final_norm else after
