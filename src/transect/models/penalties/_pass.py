"""The penalties of one forward pass: which are active, what they saw of each layer, what they add to the loss."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from transect import registry
from transect.models.loss import LossRule
from transect.models.penalties.base import LayerSums, Penalty
from transect.models.plug import PlugConfig


def build_penalty(config: PlugConfig, layers: int) -> Penalty:
    """The penalty that the settings describe, for a model that executes so many layers."""
    kind: Any = registry.load("transect.models.penalties", config.kind, Penalty)
    return kind(config, layers)


class PenaltyPass:
    """Active penalties of a pass, layer by layer.

    counted: the positions of each, as `Penalty.counted` gives them. final_norm: None where the model has none.
    raw_embedding gives what the embedding's norm receives; None where there is no such norm, and the first layer's
    input is the embedding. Both are called once, and only for penalties that read those states.
    """

    def __init__(
        self,
        penalties: Sequence[Penalty],
        counted: Sequence[Tensor | None],
        step: int | None,
        final_norm: Callable[[Tensor], Tensor] | None,
        raw_embedding: Callable[[], Tensor] | None,
    ) -> None:
        self.penalties, self.counted, self.step = penalties, counted, step
        self.final_norm, self.raw_embedding = final_norm, raw_embedding
        self._final: Tensor | None = None

    def layer(self, place: int, before: Tensor, after: Tensor) -> tuple[LayerSums, ...]:
        """What each penalty makes of one layer; safe to compute again in a checkpointed region."""
        raw, normed = self._raw(place, before), self._normed(place, after)
        return tuple(
            penalty.layer(
                place,
                raw if penalty.reads_raw_embedding else before,
                normed if penalty.reads_final_norm else after,
                counted,
            )
            for penalty, counted in zip(self.penalties, self.counted, strict=True)
        )

    def final(self) -> Tensor | None:
        """The final norm's output after the last layer; None where no penalty asked for it."""
        return self._final

    def totals(
        self, sums: Sequence[tuple[LayerSums, ...]], rule: LossRule | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted losses by the penalties' names, and their statistics.

        With a rule they are parts: of the step's predicted tokens where a penalty counts those, else, as it counts all
        that is not padding, the pass' own mean times its share of these.
        """
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        for penalty, seen in zip(self.penalties, zip(*sums, strict=True), strict=True):
            everywhere = penalty.config.penalty_positions == "all"
            loss, numbers = penalty.total(seen, self.step, None if rule is None or everywhere else rule.tokens)
            name = penalty.config.kind
            losses[name] = loss * rule.share if rule is not None and everywhere else loss
            stats.update({f"{name}.{key}": value for key, value in numbers.items()})
        return losses, stats

    def _raw(self, place: int, before: Tensor) -> Tensor:
        read = place == 0 and any(penalty.reads_raw_embedding for penalty in self.penalties)
        return self.raw_embedding() if read and self.raw_embedding is not None else before

    def _normed(self, place: int, after: Tensor) -> Tensor:
        read = any(penalty.reads_final_norm and place == penalty.layers - 1 for penalty in self.penalties)
        if not read or self.final_norm is None:
            return after
        normed = self.final_norm(after)
        if self._final is None:  # the backward pass of a checkpointed region comes here again
            self._final = normed
        return normed
