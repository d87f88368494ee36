"""Errors over documents: the bootstrap and the jackknife against what is known in closed form."""

import numpy as np
import pytest

from transect.metrics.errors import bootstrap, jackknife


def ratio(totals: np.ndarray) -> np.ndarray:
    return totals[:, :1] / totals[:, 1:]


def documents(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each document's sum of values and number of tokens, and its hash."""
    tokens = rng.integers(3, 17, count).astype(float)
    sums = np.column_stack([rng.normal(2, 1, count) * np.sqrt(tokens), tokens])
    return sums, rng.integers(0, 2**63, count).astype(np.uint64)


def test_order_of_documents_changes_no_bit():
    rng = np.random.default_rng(3)
    sums, keys = documents(rng, 67)
    value, errors = bootstrap(sums, keys, ratio, seed=5)
    for _ in range(3):
        order = rng.permutation(67)
        other, others = bootstrap(sums[order], keys[order], ratio, seed=5)
        assert other.tobytes() == value.tobytes()
        assert others == errors


def test_order_of_documents_with_equal_keys_changes_no_bit():
    rng = np.random.default_rng(4)
    sums = np.column_stack([np.full(31, 7.0), rng.normal(2, 1, 31)])  # equal counts, as of equal texts
    keys = np.full(31, 11, dtype=np.uint64)
    order = rng.permutation(31)
    assert bootstrap(sums, keys, ratio, 0)[1] == bootstrap(sums[order], keys[order], ratio, 0)[1]


def test_seed_changes_the_draws_but_not_the_value():
    sums, keys = documents(np.random.default_rng(5), 41)
    (value, errors), (other, others) = (bootstrap(sums, keys, ratio, seed) for seed in (0, 1))
    assert value == other
    assert errors != others


def test_standard_error_of_a_mean_is_recovered():
    rng = np.random.default_rng(6)
    values = rng.normal(3, 2, 997)
    value, (error,) = bootstrap(np.column_stack([values, np.ones(997)]), np.arange(997, dtype=np.uint64), ratio, 0)
    expected = values.std(ddof=1) / np.sqrt(997)
    assert value[0] == pytest.approx(values.mean(), abs=1e-12)
    assert error.stderr == pytest.approx(expected, rel=0.1)
    assert error.low == pytest.approx(values.mean() - 1.96 * expected, abs=0.35 * expected)
    assert error.high == pytest.approx(values.mean() + 1.96 * expected, abs=0.35 * expected)


def test_documents_are_drawn_not_tokens():
    """Tokens of one document all alike: the error is that of 53 documents, whatever the tokens."""
    means = np.random.default_rng(7).normal(0, 1, 53)
    errors = []
    for tokens in (1, 101):
        sums = np.column_stack([means * tokens, np.full(53, tokens)])
        errors.append(bootstrap(sums, np.arange(53, dtype=np.uint64), ratio, 0)[1][0].stderr)
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)
    assert errors[0] == pytest.approx(means.std(ddof=1) / np.sqrt(53), rel=0.1)


def test_one_document_has_no_error():
    value, errors = bootstrap(np.array([[6.0, 4.0]]), np.array([1], dtype=np.uint64), ratio, 0)
    assert value.tolist() == [1.5]
    assert errors == [None]


def test_a_draw_without_a_value_leaves_no_error():
    sums = np.array([[1.0, 1.0], [2.0, 0.0]])  # both draws of the second document have no count
    with np.errstate(divide="ignore"):
        value, errors = bootstrap(sums, np.array([1, 2], dtype=np.uint64), ratio, 0)
    assert value.tolist() == [3.0]
    assert errors == [None]


def test_several_values_at_once():
    sums, keys = documents(np.random.default_rng(8), 37)
    value, errors = bootstrap(sums, keys, lambda t: np.column_stack([t[:, 0] / t[:, 1], t[:, 1]]), 0)
    assert value.tolist() == pytest.approx([sums[:, 0].sum() / sums[:, 1].sum(), sums[:, 1].sum()], rel=1e-12)
    assert errors[0] == bootstrap(sums, keys, ratio, 0)[1][0]
    assert errors[1].low < value[1] < errors[1].high


def test_jackknife_of_a_mean_is_its_closed_form():
    values = np.random.default_rng(9).normal(1, 3, 11)
    left_out = [float(np.delete(values, index).mean()) for index in range(11)]
    error = jackknife(float(values.mean()), left_out)
    expected = values.std(ddof=1) / np.sqrt(11)
    assert error.stderr == pytest.approx(expected, rel=1e-12)
    assert (error.low, error.high) == pytest.approx((values.mean() - 1.96 * expected, values.mean() + 1.96 * expected))


@pytest.mark.parametrize("left_out", [[], [1.0], [1.0, float("nan"), 2.0]])
def test_too_little_for_a_jackknife(left_out: list[float]):
    assert jackknife(1.0, left_out) is None
