"""Errors over documents: the same statistic from other draws of the documents, whatever their order."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""From totals [draws, sums] to values [draws, ...]."""

DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Error:
    """Standard error and 95 % interval."""

    stderr: float
    low: float
    high: float


def bootstrap(sums: np.ndarray, keys: np.ndarray, statistic: Statistic, seed: int) -> tuple[np.ndarray, list]:
    """Value and errors of a statistic of totals, by drawing documents with replacement 1,000 times.

    `sums` [documents, sums] are each document's sums, `keys` [documents] its hash; documents are put in the order of
    their keys, so the draws do not depend on the order they came in. Returns the value on all documents and an Error
    for each of its elements, None where fewer than two documents contribute or a draw has no value.
    """
    ties = sums.T if len(np.unique(keys)) < len(keys) else ()
    order = np.lexsort((*ties, keys))
    sums = sums[order]
    value = np.atleast_1d(statistic(sums.sum(0, keepdims=True))[0])
    if len(sums) < 2:
        return value, [None] * value.size
    generator = np.random.Generator(np.random.PCG64(seed))
    draws = []
    for start in range(0, DRAWS, 100):
        weights = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=min(100, DRAWS - start))
        draws.append(statistic(weights.astype(np.float64) @ sums).reshape(len(weights), -1))
    return value, [_interval(column) for column in np.concatenate(draws).T]


def _interval(draws: np.ndarray) -> Error | None:
    if not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return Error(float(draws.std(ddof=1)), float(low), float(high))


def jackknife(value: float, left_out: list[float]) -> Error | None:
    """Delete-group jackknife: stderr^2 = (g - 1)/g sum (v_i - mean)^2 over values with one group left out.

    The interval is the value plus or minus 1.96 standard errors. None for fewer than two groups.
    """
    groups = len(left_out)
    if groups < 2 or not np.isfinite(left_out).all():
        return None
    values = np.asarray(left_out)
    stderr = float(np.sqrt((groups - 1) / groups * np.square(values - values.mean()).sum()))
    return Error(stderr, float(value) - 1.96 * stderr, float(value) + 1.96 * stderr)


def t_interval(values: np.ndarray, level: float = 0.95) -> Error | None:
    """Of the mean of independent values, such as seeds: s / sqrt(n), and plus or minus t((1 + level) / 2, n - 1) of it.

    None for fewer than two values. Source: Student (1908).
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    mean, stderr = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * stderr
    return Error(stderr, mean - half, mean + half)
