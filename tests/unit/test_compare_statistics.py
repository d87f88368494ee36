"""Intervals over seeds cover the truth as often as they say; Holm and seeds needed against other computations."""

import numpy as np
import pytest
from scipy import stats

from transect.comparing.curves import crossing, median_of_three, read_off
from transect.comparing.quantities import Quantity
from transect.comparing.statistics import bootstrapped, difference, holm, mean_of, seeds_needed

EXPERIMENTS = 2000


def test_three_seeds_cover_a_planted_difference_at_the_nominal_rate():
    rng = np.random.default_rng(7)
    truth, covered, false_alarms = -0.021, 0, 0
    for _ in range(EXPERIMENTS):
        shared, own, other = rng.normal(0, (0.3, 0.02, 0.02), (3, 3)).T
        found = difference(dict(enumerate(truth + shared + own)), dict(enumerate(shared + other)))
        assert found is not None and found.mean.error is not None and found.p is not None
        covered += found.mean.error.low <= truth <= found.mean.error.high
        nothing = difference(dict(enumerate(shared + own)), dict(enumerate(shared + other)))
        assert nothing is not None and nothing.p is not None
        false_alarms += nothing.p < 0.05
    low, high = stats.binom.interval(0.999, EXPERIMENTS, 0.95)
    assert low <= covered <= high
    assert EXPERIMENTS - high <= false_alarms <= EXPERIMENTS - low


def test_the_p_value_is_that_of_a_paired_t_test():
    arm, baseline = {0: 1.0, 1: 2.2, 2: 3.1, 3: 2.9}, {0: 1.1, 1: 2.0, 2: 2.7, 3: 2.1}
    found = difference(arm, baseline)
    test = stats.ttest_rel(list(arm.values()), list(baseline.values()))
    interval = test.confidence_interval(0.95)
    assert found is not None and found.mean.error is not None
    assert found.p == pytest.approx(test.pvalue)
    assert (found.mean.error.low, found.mean.error.high) == pytest.approx((interval.low, interval.high))


def test_unpaired_seeds_cover_it_too():
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(EXPERIMENTS):
        found = difference(dict(enumerate(rng.normal(1.5, 0.1, 7))), dict(enumerate(rng.normal(1, 0.1, 7), start=10)))
        assert found is not None and found.mean.error is not None
        covered += found.mean.error.low <= 0.5 <= found.mean.error.high
    low, high = stats.binom.interval(0.999, EXPERIMENTS, 0.95)
    assert low <= covered <= high


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04: times 4, 3, 2, 1 is .04 .06 .06 .04, and never lower than the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


@pytest.mark.parametrize(("effect", "deviation"), [(0.02, 0.013), (0.01, 0.02), (0.3, 0.4)])
def test_seeds_needed_by_brute_force(effect: float, deviation: float):
    needed = seeds_needed(effect, deviation)
    assert needed is not None
    rng = np.random.default_rng(5)
    share = {}
    for seeds in (needed - 1, needed):
        draws = rng.normal(effect, deviation, (40_000, seeds))
        share[seeds] = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert share[needed] > 0.8 - 0.008 and share[needed - 1] < 0.8 + 0.008


def test_seeds_needed_at_the_ends():
    assert seeds_needed(1.0, 0.001) == 2
    assert seeds_needed(1e-6, 1.0) is None
    assert seeds_needed(-0.02, 0.013) == seeds_needed(0.02, 0.013)


def test_without_spread_there_is_no_p_value():
    found = difference({0: 1.5, 1: 2.5, 2: 3.5}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None and found.p is None and found.mean.value == 0.5
    assert difference({}, {0: 1.0}) is None
    one = difference({0: 1.0}, {1: 2.0})
    assert one is not None and one.mean.error is None and "no seed is common" in str(one.mean.reason)


def test_bootstrap_is_the_same_in_any_order():
    values = [0.1, 0.5, 0.2, 0.9, 0.3]
    assert bootstrapped(values) == bootstrapped(values[::-1])
    assert "it takes 5" in str(bootstrapped(values[:4]))
    low, high = bootstrapped(values)
    assert 0.1 < float(low) < 0.4 < float(high) < 0.9  # 0.4 is the mean
    assert mean_of(values).value == pytest.approx(0.4)


def test_crossing():
    falling = np.array([3.6, 3.4, 3.2])
    assert read_off(np.array([4.5, 4.35, 4.25]), crossing(falling, 3.3) or (0, 0)) == pytest.approx(4.30)
    assert crossing(falling, 3.1) is None and crossing(falling, 3.7) is None
    assert crossing(falling, 3.6) == (0, 0.0)
    assert crossing(np.array([4.0, 3.0, 3.5, 2.0]), 3.25) == (0, 0.75)  # the first time


def test_running_median():
    assert median_of_three(np.array([5.0, 1.0, 4.0, 9.0, 3.0])).tolist() == [5.0, 4.0, 4.0, 4.0, 3.0]
    assert median_of_three(np.array([2.0, 1.0])).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("metric", "unit", "direction", "worth"),
    [
        ("nats_per_token", "nats/token", -1, 0.01),
        ("bits_per_byte", "bits/byte", -1, None),
        ("accuracy", "1", 1, 0.02),
        ("macro_f1", "1", 1, 0.02),
        ("share_mha", "1", 0, 0.02),
        ("jump_rate", "1", 0, None),
    ],
)
def test_directions(metric: str, unit: str, direction: int, worth: float | None):
    quantity = Quantity(metric=metric, unit=unit)
    assert (quantity.direction, quantity.worth) == (direction, worth)
