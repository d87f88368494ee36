"""Accuracy and macro F1 of predicted labels as rows, with errors over items and over seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from transect.metrics.errors import bootstrap, t_interval
from transect.results import Row
from transect.tasks._sequences import Coded
from transect.tasks.base import named


@dataclass(frozen=True, slots=True)
class Grader:
    """Grades predictions [items] int64 for the items of a test. row: what is the same of all rows.

    accuracy: the share of right ones, 0 to 1. macro_f1: the mean of 2 tp / (predicted + actual) over classes that the
    test has, 0 to 1; options, which are no classes, have none. Errors are those of `bootstrap` over items.
    """

    test: Coded
    row: Row
    seed: int

    def rows(self, predicted: np.ndarray, **columns: object) -> Iterator[Row]:
        """Both metrics, with the columns given."""
        blank = replace(self._blank, **columns)  # pyright: ignore[reportArgumentType]
        values, errors = bootstrap(self._sums(predicted), self.test.keys, self._statistic, self.seed)
        for metric, value, error in zip(self._metrics, values, errors, strict=True):
            yield replace(blank, metric=metric).measured(float(value), error)

    def mean_rows(self, predictions: Sequence[np.ndarray], **columns: object) -> Iterator[Row]:
        """The mean of both metrics over seeds; error and interval are those of a t-distribution over seeds."""
        blank = replace(self._blank, **columns)  # pyright: ignore[reportArgumentType]
        values = np.array([self.values(predicted) for predicted in predictions])
        for metric, column in zip(self._metrics, values.T, strict=True):
            yield replace(blank, metric=metric).measured(float(column.mean()), t_interval(column))

    def values(self, predicted: np.ndarray) -> np.ndarray:
        """Accuracy and, of classes, macro F1."""
        return self._statistic(self._sums(predicted).sum(0, keepdims=True))[0]

    @property
    def _blank(self) -> Row:
        count = len(self.test)
        return replace(self.row, n=count, documents=count, data=named(str(self.row.domain), self.test.keys))

    @property
    def _metrics(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1") if self.test.classes else ("accuracy",)

    def _sums(self, predicted: np.ndarray) -> np.ndarray:
        """[items, 2 + 3 classes]: one, right, and for each class right, predicted, actual."""
        right = predicted == self.test.labels
        made = one_hot(predicted, self.test.classes), one_hot(self.test.labels, self.test.classes)
        return np.column_stack([np.ones(len(right)), right, made[1] * right[:, None], *made])

    def _statistic(self, totals: np.ndarray) -> np.ndarray:
        accuracy = totals[:, 1] / totals[:, 0]
        if not self.test.classes:
            return accuracy[:, None]
        right, predicted, actual = np.split(totals[:, 2:], 3, axis=1)
        there = actual > 0
        scores = np.divide(2 * right, predicted + actual, where=there, out=np.zeros_like(right))
        return np.column_stack([accuracy, scores.sum(1) / there.sum(1)])


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """[items, classes] float64."""
    return (labels[:, None] == np.arange(classes)).astype(np.float64)
