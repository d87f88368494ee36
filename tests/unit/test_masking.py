"""Masked language modelling: how much is asked, what stands in its place, and that both follow from the draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from known_tokens import END, MASK, PAD, SPECIAL, START
from transect.data.masking import masked, wanted
from transect.data.order import Purpose, draws
from transect.data.special import Special
from transect.models.loss import IGNORED

VOCAB = 61
TOKENS = Special(end=END, start=START, pad=PAD, mask=MASK, vocab_size=VOCAB)
ROWS, WIDTH = 4001, 126


def text(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Ids that are not special."""
    open_ids = np.array([one for one in range(VOCAB) if one not in SPECIAL])
    return np.random.default_rng(seed).choice(open_ids, (rows, width))


def chance(rows: int, width: int, first: int = 0) -> np.ndarray:
    return draws(3, Purpose.MASK, np.arange(first, first + rows)[:, None], np.arange(width))


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = text(ROWS, WIDTH)
    return ids, *masked(ids, np.ones(ids.shape, dtype=bool), chance(ROWS, WIDTH), TOKENS, 0.15)


def near(count: int, share: float, of: int) -> bool:
    return abs(count - share * of) <= 5 * (share * (1 - share) * of) ** 0.5


def test_how_many_are_asked(large: tuple[np.ndarray, np.ndarray, np.ndarray]):
    """128 positions, two of them special: 19 in every sequence, below the 20 that the papers allow."""
    asked = large[2] != IGNORED
    assert (asked.sum(1) == 19).all()
    places = asked.sum(0)
    assert all(near(int(count), 19 / WIDTH, ROWS) for count in places)  # everywhere equally often
    together = asked[:, 5] & asked[:, 6]
    assert near(int(together.sum()), 19 * 18 / (WIDTH * (WIDTH - 1)), ROWS)  # neighbours are not asked as one


@pytest.mark.parametrize(("available", "rate", "count"), [(0, 0.5, 0), (1, 0.1, 1), (7, 0.15, 1), (11, 0.15, 2)])
def test_how_many_of_few(available: int, rate: float, count: int):
    assert wanted(np.array([available]), rate).tolist() == [count]


def test_what_is_shown(large: tuple[np.ndarray, np.ndarray, np.ndarray]):
    ids, inputs, labels = large
    asked = labels != IGNORED
    assert np.array_equal(labels[asked], ids[asked]) and np.array_equal(inputs[~asked], ids[~asked])
    shown, original = inputs[asked], labels[asked]
    hidden, kept = shown == MASK, shown == original
    other = ~hidden & ~kept
    drawn = VOCAB - len(SPECIAL)
    assert near(int(hidden.sum()), 0.8, shown.size)
    assert near(int(other.sum()), 0.1 * (1 - 1 / drawn), shown.size)
    assert near(int(kept.sum()), 0.1 * (1 + 1 / drawn), shown.size)
    counts = np.bincount(shown[other], minlength=VOCAB)
    assert not counts[list(SPECIAL)].any()
    assert all(near(int(counts[one]), 1 / drawn, int(other.sum())) for one in range(VOCAB) if one not in SPECIAL)


def test_another_token_is_any_but_the_special_ones():
    found = TOKENS.others(np.arange(VOCAB - len(SPECIAL), dtype=np.uint64))
    assert found.tolist() == [one for one in range(VOCAB) if one not in SPECIAL]
    assert TOKENS.among(np.arange(VOCAB)).nonzero()[0].tolist() == sorted(SPECIAL)


@given(st.data())
def test_only_open_positions_are_asked(data: st.DataObject):
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 23))
    rate = data.draw(st.floats(0.01, 0.99))
    asked = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    ids = text(rows, width, 1)
    before = ids.copy()
    _, labels = masked(ids, asked, chance(rows, width), TOKENS, rate)
    found = labels != IGNORED
    assert np.array_equal(ids, before) and not (found & ~asked).any()
    assert found.sum(1).tolist() == [min(max(round(rate * n), 1), n) for n in asked.sum(1).tolist()]


def test_rows_do_not_depend_on_each_other():
    ids = text(11, 29)
    asked = text(11, 29, 2) > 19
    whole = masked(ids, asked, chance(11, 29), TOKENS, 0.3)
    for row in range(11):
        alone = masked(ids[[row]], asked[[row]], chance(1, 29, row), TOKENS, 0.3)
        assert all(np.array_equal(one[0], two[row]) for one, two in zip(alone, whole, strict=True))
