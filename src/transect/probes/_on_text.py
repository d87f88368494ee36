"""What edited models make of text after they were trained on other documents of it, by the model's own objective."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from transect.after_edit import Transfer
from transect.data import Batch, batches
from transect.data.objective import NONE
from transect.data.order import Purpose, draws
from transect.effects import SCORES, Effects, Measured, Recovered, measured, recovered
from transect.errors import InputError
from transect.interventions import outcomes
from transect.metrics.angles import widened
from transect.probes._continued import (
    BACKWARD,
    Course,
    Ticker,
    copies,
    descend,
    intact,
    load,
    tensors,
    with_weights,
    within,
)
from transect.probes.base import Outcome, Setting
from transect.results import Row
from transect.tasks._fine_tune import restored
from transect.view.variants import Variant

_LOSS = SCORES.index("loss")
PIECE = 8
"""Sequences whose logits are there at once."""


@dataclass(slots=True, eq=False)
class TextState:
    """The unedited model after its training, what the edited ones cost after theirs, reasons of those that failed."""

    effects: Effects
    weights: list[Tensor] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {"effects": self.effects.pack(), "weights": self.weights, "reasons": self.reasons}


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Trainings on the documents that are not scored, all on the same batches, the unedited model's first."""

    transfer: Transfer
    setting: Setting
    cases: int

    def start(self, packed: dict | None) -> TextState:
        """Nothing trained, or what a file holds."""
        if packed is None:
            return TextState(Effects.empty(self.cases, self.setting.units))
        return TextState(Effects(**packed["effects"]), packed["weights"], packed["reasons"])

    def memory(self) -> int:
        """Six copies of the weights while one model is trained, and the sums."""
        weights = sum(parameter.nbytes for parameter in self.setting.view.model.parameters())
        return 6 * weights + 2 * Effects.nbytes(self.cases, self.setting.units)

    def trainings(self) -> tuple[int, ...]:
        """The unedited model's training, and every case's."""
        lengths = self.setting.data.lengths
        learning = BACKWARD * sum(int(lengths[self._batch(step)].sum()) for step in range(self.transfer.steps))
        asking = int(lengths[self.setting.edit_sequences].sum())
        return learning + asking, *(learning + 2 * asking for _ in range(self.cases))

    def _batch(self, step: int) -> np.ndarray:
        """The sequences of a step: all in one order after the other."""
        everything, size = self.setting.train_sequences, self.transfer.batch_size
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), len(everything))
        chosen = []
        for epoch in np.unique(epochs):
            key = draws(self.setting.seed, Purpose.ORDER, np.array([epoch]), np.arange(len(everything)))
            chosen.append(everything[np.argsort(key)[places[epochs == epoch]]])
        return np.concatenate(chosen)

    def train(self, state: TextState, number: int, course_of: Callable[[int], Course], tick: Ticker) -> None:
        """One training, and its scores."""
        view = self.setting.view
        course = course_of(number - 1) if number else intact(view)
        if course.reason is not None:
            state.reasons[number] = course.reason
            return
        with restored(view):
            with within(view, course):
                reason = self._descend(course, tick)
                owners = tensors(view)
                values = [owner.detach().clone() for owner in owners]
            if number == 0:
                if reason is not None:
                    raise InputError(f"{view.name}: {reason}")
                found, weights = self._scores((), tick), copies(view)
                state.weights = weights
                for _, outcome in found:
                    state.effects.add(None, outcome)
            elif reason is not None:
                state.reasons[number] = reason
            else:
                load(view, state.weights)
                found = self._scores((with_weights(course.variant, owners, values),), tick)
                for at, outcome in found:
                    if at is not None:
                        state.effects.add(number - 1, outcome)

    def _descend(self, course: Course, tick: Ticker) -> str | None:
        view, data = self.setting.view, self.setting.data
        module = nn.ModuleDict({"model": view.model})

        def losses(step: int) -> Iterator[tuple[Tensor, int]]:
            pieces = list(batches(data, self._batch(step), PIECE))
            asked = max(1, sum(int((_target(piece) != NONE).sum()) for piece in pieces))
            for piece in pieces:
                target = _target(piece).to(view.device)
                logits = view.run(piece.ids, piece.mask, head=True)[target != NONE]
                loss = nn.functional.cross_entropy(widened(logits), target[target != NONE], reduction="sum") / asked
                yield loss, int(piece.mask.sum())

        steps = self.transfer.steps
        return descend(view, module, losses, steps, self.transfer, course.frozen, self.setting.seed, tick)

    def _scores(self, variants: tuple[Variant, ...], tick: Ticker) -> list[tuple[int | None, Outcome]]:
        """What the model as it stands, and a variant, make of every sequence that edits are judged on."""
        setting, found = self.setting, []
        for batch in batches(setting.data, setting.edit_sequences, PIECE):
            units = torch.from_numpy(setting.unit_of)[batch.sequence]
            found += outcomes(setting.view, batch, units, variants, lambda layers: None)
            tick((1 + len(variants)) * int(batch.mask.sum()))
        return found

    def found(self, state: TextState, direct: Effects) -> list[tuple[str, "Continued"]]:
        """What the rows say, with what stands behind their variant; direct: the effects without any training."""
        made, cases = measured(state.effects, self.setting), len(direct.sums) - 1
        filled = direct.counts[:, 1] > 0
        before, after = (one.sums[: cases + 1, filled, _LOSS].numpy().T for one in (direct, state.effects))
        shares = recovered(before, after, self.setting.unit_keys[filled.numpy()], self.setting.seed)
        return [("/continued", Continued(made, shares, state.reasons))]


@dataclass(frozen=True, slots=True, eq=False)
class Continued:
    """The costs after training, and which share of the direct ones is gone."""

    costs: Measured
    shares: Recovered
    reasons: dict[int, str]

    def rows(self, case: int | None, like: Row) -> Iterator[Row]:
        """The rows of one case; `like` holds its layers, its edit and how it is called."""
        at = 0 if case is None else case + 1
        reason = self.reasons.get(at)
        for row in self.costs.rows(case, like):
            yield row if reason is None else row.missing(reason)
        if 0 < at <= self.shares.cases:
            like = replace(like, unit="1", n=self.costs.targets, documents=self.costs.units)
            yield self.shares.row(at, like, reason)


def _target(batch: Batch) -> Tensor:
    assert batch.target is not None
    return batch.target
