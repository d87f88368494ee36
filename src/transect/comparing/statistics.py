"""Means and paired differences over seeds: t-intervals, bootstrap, p values, Holm's correction, seeds needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transect.metrics.errors import DRAWS, Error, t_interval

LEVEL = 0.95
ALPHA, POWER = 0.05, 0.8
LEAST_BOOTSTRAP = 5
MOST_SEEDS = 100_000
_SEED = 0
_NO_SPREAD = 1e-12
ONE_SEED = "one seed is a demonstration, no verdict"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with its t-interval; `reason` says why there is no interval."""

    value: float
    n: int
    error: Error | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm minus the baseline.

    p: of the two-sided t-test, None for `mean.reason`. each: the differences by seed, empty where no seed is common
    and the interval is Welch's. left_out: how many seeds of either arm have no partner.
    """

    mean: Mean
    p: float | None
    each: tuple[float, ...]
    left_out: int


def mean_of(values: Sequence[float]) -> Mean:
    """The mean and its 95 % t-interval, half-width t(0.975, n - 1) s / sqrt(n); values [seeds], any unit."""
    numbers = np.asarray(values, np.float64)
    error = t_interval(numbers, LEVEL)
    return Mean(float(numbers.mean()), len(numbers), error, ONE_SEED if error is None else None)


def bootstrapped(values: Sequence[float]) -> tuple[float, float] | str:
    """The 95 % percentile interval of the mean over 1,000 seeded draws of seeds, or the reason for none."""
    from scipy import stats

    if len(values) < LEAST_BOOTSTRAP:
        return f"{len(values)} seeds give too few different draws for a bootstrap; it takes {LEAST_BOOTSTRAP}"
    found = stats.bootstrap(
        (np.sort(values),), np.mean, n_resamples=DRAWS, confidence_level=LEVEL, method="percentile", rng=_SEED
    ).confidence_interval
    return float(found.low), float(found.high)


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The arm's values minus the baseline's, by seed where seeds are common, else by Welch's test; None without values.

    arm, baseline: values by seed, any unit. Where the seeds of both differ only the common ones count.
    """
    if not arm or not baseline:
        return None
    common = sorted(arm.keys() & baseline.keys())
    if not common:
        return _welch(list(arm.values()), list(baseline.values()))
    each = tuple(arm[seed] - baseline[seed] for seed in common)
    left_out = len(arm.keys() ^ baseline.keys())
    mean = mean_of(each)
    return Difference(mean, _p(mean) if len(each) > 1 and spread(each) else None, each, left_out)


def _p(mean: Mean) -> float:
    """Of the two-sided t-test that the mean is 0."""
    from scipy import stats

    assert mean.error is not None
    return float(2 * stats.t.sf(abs(mean.value) / mean.error.stderr, mean.n - 1))


def spread(each: Sequence[float]) -> float:
    """The standard deviation over seeds, 0 where it is only rounding."""
    found = float(np.std(each, ddof=1))
    return found if found > _NO_SPREAD * max(map(abs, each)) else 0.0


def _welch(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    from scipy import stats

    centre, left_out = float(np.mean(arm) - np.mean(baseline)), len(arm) + len(baseline)
    least = min(len(arm), len(baseline))
    if least < 2 or not (spread(arm) or spread(baseline)):
        why = "no seed is common to both arms, and one of them has a single seed" if least < 2 else "no seed differs"
        return Difference(Mean(centre, least, None, why), None, (), left_out)
    test: Any = stats.ttest_ind(arm, baseline, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    stderr = math.sqrt(np.var(arm, ddof=1) / len(arm) + np.var(baseline, ddof=1) / len(baseline))
    error = Error(stderr, float(interval.low), float(interval.high))
    return Difference(Mean(centre, least, error), float(test.pvalue), (), left_out)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a family corrected by Holm's step-down rule, in their order; 0 .. 1."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    found: Any = multipletests(p_values, method="holm")
    return [float(p) for p in found[1]]


def seeds_needed(effect: float, deviation: float) -> int | None:
    """The fewest seeds with which a paired two-sided t-test at 0.05 sees the effect with probability 0.8.

    effect, deviation: mean and standard deviation of the differences over seeds, in one unit. None for more than
    100,000. The true deviation is taken to be the one of these seeds, which of few seeds is a rough guess.
    """
    from statsmodels.stats.power import TTestPower

    size = abs(effect) / deviation
    test = TTestPower()

    def enough(seeds: int) -> bool:
        # Beyond some size of the effect the non-central t of statsmodels has no number; it is seen with certainty.
        power = test.power(size, seeds, ALPHA, alternative="two-sided")
        return bool(np.isnan(power)) or power >= POWER

    high = 2
    while not enough(high):
        if high >= MOST_SEEDS:
            return None
        high = min(2 * high, MOST_SEEDS)
    low = 1 if high == 2 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
