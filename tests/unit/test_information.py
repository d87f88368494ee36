"""Mutual information: worked examples, scikit-learn as oracle, bias, and groups left out."""

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from transect.metrics.information import mutual_information, mutual_information_without, permuted


def drawn(seed: int, n: int = 4999, labels: int = 41, targets: int = 211) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and targets that depend on them half of the time, with a long tail."""
    generator = np.random.default_rng(seed)
    left = generator.integers(0, labels, n)
    tail = np.minimum(generator.zipf(1.3, n), targets) - 1
    return left, np.where(generator.random(n) < 0.5, left * 3 % targets, tail)


def from_table(table: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array(table)
    return tuple(np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))


@pytest.mark.parametrize(
    ("table", "nats"),
    [
        ([[2, 0], [0, 2]], 0.693147),
        ([[1, 1], [1, 1]], 0),
        ([[3, 1], [1, 3]], 0.130812),
        ([[2, 1, 0], [0, 1, 2]], 0.462098),
    ],
)
def test_worked_examples(table: list[list[int]], nats: float):
    labels, targets = from_table(table)
    assert mutual_information(labels, targets) == pytest.approx(nats, abs=1e-6)
    assert mutual_information(targets, labels) == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed: int):
    labels, targets = drawn(seed)
    assert mutual_information(labels, targets) == pytest.approx(mutual_info_score(labels, targets), abs=1e-12)


def test_information_about_itself_is_entropy():
    labels, _ = drawn(0)
    assert mutual_information(labels, labels) == pytest.approx(entropy(np.bincount(labels)), abs=1e-12)


def test_rounding_never_makes_it_negative():
    for size in range(2, 20):
        table = np.outer(np.arange(1, size), np.arange(1, 2 * size))
        assert 0 <= mutual_information(*from_table(table.tolist())) < 1e-13


def test_order_changes_nothing():
    labels, targets = drawn(1)
    order = np.random.default_rng(2).permutation(len(labels))
    assert mutual_information(labels[order], targets[order]) == mutual_information(labels, targets)


def independent(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return generator.integers(0, 20, 10_000), generator.integers(0, 50, 10_000)


def test_bias_of_independent_labels_and_its_corrections():
    generator = np.random.default_rng(7)
    draws = [independent(generator) for _ in range(40)]
    plain = [mutual_information(*draw) for draw in draws]
    assert np.mean(plain) == pytest.approx(0.0466, abs=0.002)
    assert np.mean([mutual_information(*draw, "shuffle", 3) for draw in draws]) == pytest.approx(0, abs=0.002)
    assert np.mean([mutual_information(*draw, "miller_madow") for draw in draws]) == pytest.approx(0, abs=0.002)


def test_corrections_by_hand():
    labels, targets = drawn(3)
    plain = mutual_information(labels, targets)
    shuffled = mutual_information(labels, permuted(targets, 11))
    assert mutual_information(labels, targets, "shuffle", 11) == pytest.approx(plain - shuffled, abs=1e-15)
    cells = [len(np.unique(side, axis=0)) for side in (np.stack([labels, targets], 1), labels, targets)]
    expected = plain - (cells[0] - cells[1] - cells[2] + 1) / (2 * len(labels))
    assert mutual_information(labels, targets, "miller_madow") == pytest.approx(expected, abs=1e-12)


def test_permutation_is_seeded_and_keeps_the_targets():
    _, targets = drawn(0)
    assert np.array_equal(permuted(targets, 5), permuted(targets, 5))
    assert not np.array_equal(permuted(targets, 5), permuted(targets, 6))
    assert np.array_equal(np.sort(permuted(targets, 5)), np.sort(targets))


@pytest.mark.parametrize("debias", ["off", "miller_madow"])
def test_groups_left_out_one_by_one(debias: str):
    labels, targets = drawn(5)
    groups = np.random.default_rng(6).integers(0, 7, len(labels))
    found = mutual_information_without(labels, targets, groups, debias)[1:]
    expected = [mutual_information(labels[groups != g], targets[groups != g], debias) for g in range(7)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert len({round(value, 9) for value in found}) == 7


def test_groups_left_out_of_the_shuffled_value():
    labels, targets = drawn(5)
    groups = np.random.default_rng(6).integers(0, 5, len(labels))
    found = mutual_information_without(labels, targets, groups, "shuffle", 9)[1:]
    shuffled = permuted(targets, 9)
    for group in range(5):
        rest = groups != group
        expected = mutual_info_score(labels[rest], targets[rest]) - mutual_info_score(labels[rest], shuffled[rest])
        assert found[group] == pytest.approx(expected, abs=1e-12)


def test_empty_group_leaves_nothing_out_and_a_full_one_everything():
    labels, targets = drawn(8, n=97)
    found = mutual_information_without(labels, targets, np.full(97, 2))[1:]
    np.testing.assert_allclose(found[:2], mutual_information(labels, targets), atol=1e-14)
    assert np.isnan(found[2])


@pytest.mark.parametrize(
    ("labels", "targets", "match"),
    [
        ([], [], "0 labels"),
        ([0, 1], [1], "2 labels, 1 targets"),
        ([0, -1], [1, 0], "labels: give"),
        ([0, 1], [0.5, 1.0], "targets: give"),
        ([0, 2**40], [0, 2**40], "too large"),
    ],
)
def test_refusals(labels: list, targets: list, match: str):
    with pytest.raises(ValueError, match=match):
        mutual_information(np.array(labels, int), np.array(targets) if targets else np.array(targets, int))


def test_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="allowed are off, shuffle, miller_madow"):
        mutual_information(*drawn(0), debias="panzeri")
