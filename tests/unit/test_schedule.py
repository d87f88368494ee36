"""The learning rate's factor: values at every border."""

import math
from itertools import pairwise

import pytest

from transect.errors import InputError
from transect.train.config import ScheduleConfig
from transect.train.schedule import factor


def curve(steps: int, **given) -> list[float]:
    config = ScheduleConfig.parse(given)
    return [factor(config, step, steps) for step in range(steps + 3)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_starts_above_zero_and_is_complete_at_its_last_step(kind: str):
    found = curve(23, kind=kind, warmup=5)
    assert found[:5] == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0]
    assert found[5] == 1.0
    assert all(0 < value <= 1 for value in found)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_without_warm_up_the_first_step_is_whole(kind: str):
    assert curve(7, kind=kind)[0] == 1.0


def test_constant_stays():
    assert curve(11, kind="constant", warmup=2, horizon=5)[1:] == [1.0] * 13


def test_linear_by_hand():
    found = curve(10, kind="linear", warmup=2, final=0.2)
    assert found[2:] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2], abs=1e-15)


def test_cosine_by_hand():
    found = curve(8, kind="cosine", warmup=4, final=0.1)
    by_hand = [1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1, 0.1, 0.1]
    assert found[4:] == pytest.approx(by_hand, abs=1e-15)


def test_wsd_by_hand():
    found = curve(10, kind="wsd", warmup=1, final=0.0, decay=0.4)
    assert found == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25, 0, 0, 0], abs=1e-15)


def test_wsd_does_not_decay_in_its_warm_up():
    found = curve(10, kind="wsd", warmup=6, final=0.0, decay=1.0)
    assert found[:6] == [(step + 1) / 6 for step in range(6)]
    assert found[6:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0, 0, 0], abs=1e-15)


def test_final_zero_loses_no_step():
    for kind in ("linear", "cosine", "wsd"):
        found = curve(13, kind=kind, warmup=3, final=0.0)
        assert min(found[:13]) > 0 and found[13] == 0


def test_a_horizon_beyond_the_end_is_never_completed():
    long = curve(40, kind="linear", warmup=4, final=0.0)
    short = curve(10, kind="linear", warmup=4, final=0.0, horizon=40)
    assert short == long[:13]
    assert short[9] == 1 - 5 / 36


def test_after_a_horizon_inside_the_run_the_final_value_holds():
    found = curve(20, kind="cosine", warmup=2, final=0.3, horizon=11)
    assert found[11:] == [0.3] * 12
    assert found[10] > 0.3


def test_a_run_may_end_in_its_warm_up():
    assert curve(3, kind="cosine", warmup=100)[:3] == [1 / 100, 2 / 100, 3 / 100]


def test_a_horizon_before_the_end_of_the_warm_up_is_refused():
    with pytest.raises(InputError, match=r"horizon is 5: warm-up alone takes 8 steps") as error:
        curve(20, kind="linear", warmup=8, horizon=5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_never_rises_after_the_warm_up(kind: str):
    found = curve(101, kind=kind, warmup=13, decay=0.37)[12:]
    assert all(late <= early for early, late in pairwise(found))
    assert found[-1] == 0.1
