"""What an extra loss on the residual stream is to the model that trains with it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor

from transect.config import misfit
from transect.errors import InputError
from transect.models.plug import PlugConfig


class PenaltyConfig(PlugConfig):
    """Settings that any penalty has beside its own.

    strength: lambda, what the penalty is multiplied with where it joins the main loss; settings may call it `lambda`
    too, a word that Python keeps for itself. schedule: `constant`; `warmup`, from 0 at step 0 in a line to full
    strength at step `schedule_steps`; `decay`, from full strength at step 0 in a line to 0 at `schedule_steps`.
    penalty_positions: the positions that the main loss counts (`loss_mask`), or every one but padding (`all`).
    Source: arXiv 2601.18302; strength, schedule and positions are ASSUMED, the paper's values are not known.
    """

    strength: Annotated[float, Field(ge=0, validation_alias=AliasChoices("strength", "lambda"))] = 0.1
    schedule: Annotated[
        Literal["constant", "warmup", "decay"], Field(validation_alias=AliasChoices("schedule", "lambda_schedule"))
    ] = "constant"
    schedule_steps: Annotated[int, Field(ge=1)] | None = None
    penalty_positions: Literal["loss_mask", "all"] = "loss_mask"

    @model_validator(mode="after")
    def _scheduled(self) -> Self:
        if (self.schedule == "constant") != (self.schedule_steps is None):
            raise misfit("schedule_steps", self.schedule_steps, "warmup and decay need it, constant has none")
        return self

    def strength_at(self, step: int | None) -> float:
        """lambda at a training step, counted from 0; raises InputError where a schedule is not told the step."""
        if self.schedule == "constant" or self.schedule_steps is None:
            return self.strength
        if step is None:
            raise InputError(f"penalty schedule is {self.schedule!r}: say the training step, or use constant")
        done = min(1.0, step / self.schedule_steps)
        return self.strength * (done if self.schedule == "warmup" else 1 - done)


class LayerSums(NamedTuple):
    """One layer's sums over counted tokens, which add up exactly over micro-batches and ranks.

    values [columns] in float32 or better, the penalised quantity first, which alone has a gradient;
    count: how many tokens, a whole number.
    """

    values: Tensor
    count: Tensor


class PenaltyOutput(NamedTuple):
    """loss: lambda(step) times the penalty, ready to be added; stats for the log, detached."""

    loss: Tensor
    stats: dict[str, Tensor]


class Penalty(ABC):
    """An extra loss on the stream around each executed layer; it has no parameters and keeps no state of a batch.

    The model asks `active(step)` first and, where that is False, leaves the penalty out altogether: the run is equal to
    one without it to the last bit. Otherwise it calls `layer` for each executed layer (inside the checkpointed region
    where there is one, so that sums are kept and states are not) and `total` once.

    reads_final_norm: for the last layer, `after` is to be the final norm's output. reads_raw_embedding: for the first
    layer, `before` is to be the embedding before its norm, in a model that has one.
    """

    Config: ClassVar[type[PenaltyConfig]]
    reads_final_norm: bool = False
    reads_raw_embedding: bool = False

    def __init__(self, config: PenaltyConfig, layers: int) -> None:
        """`layers` is how many are executed; raises InputError for settings that do not fit so many."""
        self.config = config
        self.layers = layers

    def active(self, step: int | None = None) -> bool:
        """Whether the penalty has any weight at this step."""
        return self.config.strength_at(step) > 0

    def counted(self, loss_mask: Tensor | None, real: Tensor | None) -> Tensor | None:
        """The positions to count [batch, positions] bool, None for all.

        loss_mask: those of the main loss, see `loss_positions`; real: False at padding. None stands for all of them.
        """
        return real if loss_mask is None or self.config.penalty_positions == "all" else loss_mask

    @abstractmethod
    def layer(self, place: int, before: Tensor, after: Tensor, counted: Tensor | None) -> LayerSums:
        """The sums of the layer executed in this place (0-based), from the stream entering and leaving it.

        before and after [batch, positions, width]; counted [batch, positions] bool, None for all.
        """

    @abstractmethod
    def total(
        self, sums: Sequence[LayerSums], step: int | None = None, tokens: Tensor | int | None = None
    ) -> PenaltyOutput:
        """The weighted loss from the sums of all places in order.

        tokens: how many tokens the whole step counts, over all micro-batches and ranks, where `sums` are a part of it;
        the losses of the parts then add up to that of the whole. With None it is what `sums` counted. A part that
        counted no token has loss 0, and not-a-number in its statistics.
        """

    @abstractmethod
    def stats(self, sums: Sequence[LayerSums]) -> dict[str, Tensor]:
        """Means for the log, detached: of one pass, or of several by `combined`."""


def combined(parts: Sequence[Sequence[LayerSums]]) -> list[LayerSums]:
    """The detached float64 sums of several passes (micro-batches, ranks) as if they had been one, layer by layer."""
    return [
        LayerSums(
            torch.stack([part.values.detach().double() for part in layer]).sum(0),
            torch.stack([part.count for part in layer]).sum(),
        )
        for layer in zip(*parts, strict=True)
    ]


def loss_positions(labels: Tensor, causal: bool, ignored: int = -100) -> Tensor:
    """The positions [batch, positions] whose state a cross-entropy over `labels` is computed from.

    A causal model predicts labels[t + 1] at position t, so the last position never counts; a masked one labels[t] at t.
    """
    counted = labels != ignored
    if not causal:
        return counted
    return torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
