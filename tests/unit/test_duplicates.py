"""Near-duplicates: planted overlaps are found, and what only looks alike is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prepared import texts
from transect.data.duplicates import WORDS, Index, sequences
from transect.data.normalise import normalise, writable


def _plain(text: str) -> set[tuple[str, ...]]:
    words = "".join(sign.lower() if sign.isalnum() else " " for sign in text).split()
    return {tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)}


def test_sequences_are_those_of_13_words():
    text = "One two, three; four_five (six) seven-8 nine\nten ELEVEN twelve 13 fourteen one two three"
    assert len(sequences(text)) == len(_plain(text)) == 17 - 13 + 1
    np.testing.assert_array_equal(sequences(text), sequences(text.upper().replace(" ", " ... ")))
    assert len(sequences("a " * 12)) == 0 and len(sequences("a " * 13)) == 1 and len(sequences("a " * 99)) == 1


def test_word_order_matters():
    words = [f"w{number}" for number in range(13)]
    swapped = [words[1], words[0], *words[2:]]
    assert sequences(" ".join(words))[0] != sequences(" ".join(swapped))[0]


def test_signs_are_words_where_a_script_has_no_blanks():
    text = "吾輩は猫である。名前はまだ無い。どこで生れたか"
    assert len(sequences(text)) == sum(sign.isalnum() for sign in text) - 12
    assert len(sequences("abc" + text)) == len(sequences(text)) + 1


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shared", range(0, 60, 7))
def test_the_rule_against_sets(share: float, shared: int):
    mine, other = texts(2, seed=shared, words=59)
    train = " ".join([*mine.split()[:shared], *other.split()[shared:]])
    ours, theirs = _plain(mine), _plain(train)
    expected = len(ours & theirs) >= share * min(len(ours), len(theirs))
    assert Index.of([mine]).has_copy_of(train, share) is expected


def test_a_part_inside_a_long_document_counts_both_ways():
    short, long = texts(1, seed=1, words=17)[0], texts(1, seed=2, words=997)[0]
    both = f"{long} {short} {long}"
    assert Index.of([short]).has_copy_of(both, 1.0)
    assert Index.of([both]).has_copy_of(short, 1.0)
    assert not Index.of([long]).has_copy_of(short, 0.01)


def test_sequences_of_different_documents_do_not_add_up():
    first, second, train = texts(3, seed=3, words=53)  # 41 sequences each
    mixed = " ".join([*first.split()[:28], *second.split()[:28]])
    ours = _plain(mixed)
    assert max(len(ours & _plain(text)) for text in (first, second)) < 0.5 * 41
    assert len(ours & (_plain(first) | _plain(second))) > 0.75 * 41
    assert not Index.of([first, second]).has_copy_of(mixed, 0.5)
    assert Index.of([first, second, mixed]).has_copy_of(mixed, 1.0)
    assert not Index.of([first, second]).has_copy_of(train, 0.01)


def test_a_sequence_in_many_documents_still_finds_its_first_ones():
    same = texts(1, seed=4, words=31)[0]
    index = Index.of([f"{same} {text}" for text in texts(97, seed=5, words=5)])
    assert index.has_copy_of(same, 1.0)
    assert len(index.owners) < 64 * len(index.hashes)


def test_short_documents_take_no_part():
    assert not Index.of(["a b c"]).has_copy_of("a b c", 0.1)
    assert not Index.of([]).has_copy_of("a " * 20, 0.1)


def test_the_index_is_the_same_from_disk(tmp_path):
    many = texts(11, seed=6)
    index = Index.of(many)
    index.save(tmp_path)
    again = Index.load(tmp_path)
    for name in Index.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
    assert again.has_copy_of(many[3], 1.0) and not again.has_copy_of(texts(1, seed=7)[0], 0.01)


@given(st.text(alphabet=st.characters() | st.sampled_from("\r\n\x00\x0b\x0c\x85\ufeffe\u0301\u0327\ud800")))
def test_normalising_twice_changes_nothing(text: str):
    once = normalise(writable(text))
    assert normalise(once) == once
    assert once.encode().decode() == once
    assert not any((ord(sign) < 32 and sign not in "\n\t") or 127 <= ord(sign) < 160 for sign in once)


def test_what_normalising_does():
    assert normalise("\ufeffa\r\nb\rc\x0cd\x85e\x00f\tg ") == "a\nb\nc\nd\nef\tg "
    assert normalise("cafe\u0301") == "café"
    assert normalise("a\r\x00\nb") == "a\nb"
    assert normalise("a\ufeffb") == "a\ufeffb"
    assert writable("a\ud83d") == "a\ufffd"
