"""Fine-tuning: a model is trained further on labelled texts and judged on others."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from transect.errors import InputError
from transect.results import Row
from transect.tasks._classifier import Pool
from transect.tasks._fine_tune import Settings, Tuned, fine_tune, refusal, restored
from transect.tasks._frozen import chosen
from transect.tasks._grading import Grader
from transect.tasks._labelled import LabelledTask, Parts
from transect.tasks._sequences import Coded, coded
from transect.tasks.base import Subject, Tick
from transect.view.view import View


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One training: what it came to on the held-out part, and what it says of the test."""

    lr: float
    seed: int
    tuned: Tuned
    predicted: np.ndarray

    @property
    def held_out(self) -> float:
        return self.tuned.accuracy[self.tuned.epoch - 1]


@dataclass(frozen=True, kw_only=True)
class FineTuning(LabelledTask):
    """Accuracy and macro F1 after fine-tuning with a new classifier; the model has its own weights again after it.

    data: a set of kind `labelled` (a text or a pair and its class) or `options` (each option with its context is
    scored). lr: learning rates; the one with the highest mean accuracy on the held-out part over seeds counts, as does
    the best epoch of each run; the test chooses nothing. seeds: how many trainings for each rate. freeze: parts that do
    not move, such as `ffn:3` or `embeddings`. Others: see `Settings` and `LabelledTask`.
    Rows: variant `seed 0`, ... (errors over items), `mean` (t-interval over seeds), `majority` (always the most
    frequent label of training); part says the rate and the epoch.
    Range and unit: 0..1.
    Source: papers/ffn_wider_cea, X8; papers/nonlinearity_commutativity, section 5.
    Raises: InputError for texts without labels, a single class, a label of the test that training has not, options
    out of range, and weights that cannot be trained.
    Cost: for each rate, seed and epoch
    three forward passes' work for a training item, one for a held-out item; one for a test item and run.
    """

    title: ClassVar[str] = "Fine-tuning"
    source: ClassVar[str] = "papers/ffn_wider_cea, X8"
    needs_head: ClassVar[bool] = False

    lr: float | tuple[float, ...] = 2e-5
    epochs: int = 10
    batch_size: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float | None = 1.0
    dropout: float = 0.1
    pool: Pool = "auto"
    adapters: int | None = None
    patience: int | None = 3
    seeds: int = 3
    freeze: tuple[str, ...] = ()

    def refusal(self, view: View) -> str | None:
        return super().refusal(view) or refusal(view)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1 or not self.rates:
            raise InputError(f"fine_tuning: seeds is {self.seeds} and lr {self.lr}; at least one of each is needed")
        for rate in self.rates:
            self._settings(rate).check()

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    def check(self, subject: Subject) -> None:
        self.tokens(subject.view)
        chosen(subject.view, self.freeze, norms_only=self.adapters is not None)
        self.parts(subject)

    def rows(self, subject: Subject) -> Iterator[Row]:
        parts = self.parts(subject)
        length = self.tokens(subject.view)
        training, held_out, test = (
            coded(subject.view, examples, parts.classes, length)
            for examples in (parts.training, parts.held_out, parts.test)
        )
        runs = self._runs(subject, training, held_out, test)
        best = max(self.rates, key=lambda rate: np.mean([run.held_out for run in runs if run.lr == rate]))
        runs = [run for run in runs if run.lr == best]
        row = Row(metric="accuracy", value=0.0, unit="1", domain=self.label, split=self.test)
        grader = Grader(test, row, subject.seed)
        for run in runs:
            named = f"lr {best:g}, epoch {run.tuned.epoch}"
            yield from grader.rows(run.predicted, variant=f"seed {run.seed}", part=named)
        yield from grader.mean_rows([run.predicted for run in runs], variant="mean", part=f"lr {best:g}")
        yield from grader.rows(np.full(len(test), _majority(parts)), variant="majority")
        yield from self.left_out_rows(parts)

    def _runs(self, subject: Subject, training: Coded, held_out: Coded, test: Coded) -> list[_Run]:
        made = []
        plan = list(product(range(subject.seed, subject.seed + self.seeds), self.rates))
        for number, (seed, rate) in enumerate(plan):
            tick = _later(subject.tick, number, len(plan))
            with restored(subject.view):
                tuned = fine_tune(subject.view, training, held_out, self._settings(rate), seed, self.freeze, tick)
                predicted = tuned.predict(subject.view, test, subject.batch_size)
            made.append(_Run(rate, seed, tuned, predicted))
        return made

    def _settings(self, rate: float) -> Settings:
        return Settings(
            lr=rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            clip=self.clip,
            dropout=self.dropout,
            pool=self.pool,
            adapters=self.adapters,
            patience=self.patience,
        )


def _majority(parts: Parts) -> int:
    return parts.classes.index(parts.majority) if parts.classes else int(parts.majority)


def _later(tick: Tick, number: int, runs: int) -> Tick:
    return lambda done, total: tick(number * total + done, runs * total)
