"""What each position is asked for: no target crosses a border, masks follow from seed, document and position alone."""

from dataclasses import replace

import numpy as np
import pytest

from families import FIRST_TEXT_ID, VOCAB
from plants import text
from transect.data import Dataset, batches, from_tokens
from transect.data.batches import sample_tokens, token_keys
from transect.data.dataset import assemble
from transect.data.objective import NONE, Objective, with_targets
from transect.errors import InputError

CLS, SEP, MASK = 1, 2, 3
CAUSAL = Objective(kind="causal")
MASKED = Objective(kind="masked", mask_id=MASK)


def rows(documents: int = 31, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(FIRST_TEXT_ID, VOCAB, size).tolist() for size in rng.integers(1, 43, documents)]


def wrapped(documents: list[list[int]], seq_len: int = 13) -> Dataset:
    """Sequences with a beginning and an end that the tokenizer added."""
    return assemble([np.array(row) for row in documents], seq_len, "wrapped", (CLS,), (SEP,))


def sequences(data: Dataset) -> list[slice]:
    return [slice(start, start + length) for start, length in zip(data.starts, data.lengths, strict=True)]


# the next token


@pytest.mark.parametrize("data", [from_tokens(rows(), seq_len=13), wrapped(rows())], ids=["plain", "wrapped"])
def test_the_next_token_of_the_same_sequence(data: Dataset):
    asked = with_targets(data, CAUSAL, VOCAB, 0)
    assert asked.target is not None and np.array_equal(asked.ids, data.ids) and data.target is None
    expected = np.full(data.num_tokens, NONE)
    for part in sequences(data):
        ids, special = data.ids[part], data.special[part]
        for at in range(len(ids) - 1):
            if not special[at + 1]:
                expected[part.start + at] = ids[at + 1]
    assert np.array_equal(asked.target, expected)
    assert asked.target.dtype == np.int32 and not CAUSAL.changes_input


def test_special_tokens_are_never_asked_for():
    data = wrapped(rows())
    for objective in (CAUSAL, MASKED):
        target = with_targets(data, objective, VOCAB, 0).target
        assert target is not None and not {CLS, SEP} & set(target.tolist())
    first = with_targets(data, CAUSAL, VOCAB, 0).target[data.starts]
    assert (first >= FIRST_TEXT_ID).all()  # the text's first token is asked for after [CLS]


# masks


def test_fifteen_in_a_hundred_of_them_eighty_ten_ten():
    data = from_tokens(np.random.default_rng(3).integers(FIRST_TEXT_ID, VOCAB, (101, 997)), seq_len=83)
    asked = with_targets(data, MASKED, VOCAB, 0)
    chosen = asked.target != NONE
    assert np.array_equal(asked.target[chosen], data.ids[chosen])
    assert np.array_equal(asked.ids[~chosen], data.ids[~chosen])

    def within(count: int, of: int, rate: float) -> bool:
        return abs(count - of * rate) <= 4 * (of * rate * (1 - rate)) ** 0.5

    total = int(chosen.sum())
    assert within(total, data.num_tokens, 0.15)
    now, before = asked.ids[chosen], data.ids[chosen]
    lucky = 0.1 / VOCAB  # a random id may be the mask's or the original one
    assert within(int((now == MASK).sum()), total, 0.8 + lucky)
    assert within(int((now == before).sum()), total, 0.1 + lucky)
    other = now[(now != MASK) & (now != before)]
    assert within(len(other), total, 0.1 * (1 - 2 / VOCAB))
    assert set(other.tolist()) == set(range(VOCAB)) - {MASK}
    counts = np.bincount(other, minlength=VOCAB)
    assert counts.max() < 2.5 * np.median(counts[counts > 0])


@pytest.mark.parametrize("rate", [0.03, 0.5])
def test_another_rate(rate: float):
    data = from_tokens(np.random.default_rng(3).integers(FIRST_TEXT_ID, VOCAB, (101, 997)), seq_len=83)
    share = (with_targets(data, replace(MASKED, rate=rate), VOCAB, 0).target != NONE).mean()
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / data.num_tokens) ** 0.5


def test_which_tokens_are_masked_does_not_lean_on_the_position():
    data = from_tokens(np.random.default_rng(3).integers(FIRST_TEXT_ID, VOCAB, (5003, 11)), seq_len=11)
    by_place = (with_targets(data, MASKED, VOCAB, 0).target != NONE).reshape(-1, 11).mean(0)
    assert np.abs(by_place - 0.15).max() <= 4 * (0.15 * 0.85 / 5003) ** 0.5


def by_document(data: Dataset) -> dict[int, tuple[list[int], list[int]]]:
    """Inputs and targets of each document, by its hash."""
    assert data.target is not None
    found: dict[int, tuple[list[int], list[int]]] = {}
    for part, document in zip(sequences(data), data.document, strict=True):
        ids, target = found.setdefault(int(data.document_hash[document]), ([], []))
        ids += data.ids[part].tolist()
        target += data.target[part].tolist()
    return found


def test_masks_do_not_depend_on_the_order_of_the_documents():
    documents = rows(53)
    order = np.random.default_rng(7).permutation(53)
    one = by_document(with_targets(wrapped(documents), MASKED, VOCAB, 5))
    other = by_document(with_targets(wrapped([documents[at] for at in order]), MASKED, VOCAB, 5))
    assert one == other and len(one) == 53
    assert by_document(with_targets(wrapped(documents), MASKED, VOCAB, 5)) == one
    assert by_document(with_targets(wrapped(documents), MASKED, VOCAB, 6)) != one


def test_masks_come_through_batches_of_any_size():
    data = with_targets(wrapped(rows(53)), MASKED, VOCAB, 0)

    def taken(size: int) -> tuple[list[int], list[int]]:
        ids, target = [], []
        for batch in batches(data, np.arange(data.num_sequences), size):
            assert batch.target is not None and (batch.target[~batch.mask] == NONE).all()
            ids += batch.ids[batch.mask].tolist()
            target += batch.target[batch.mask].tolist()
        return ids, target

    assert taken(1) == taken(7) == taken(1000) == (data.ids.tolist(), data.target.tolist())
    plain = next(batches(wrapped(rows()), np.arange(3), 3))
    assert plain.target is None


def test_nothing_to_ask_for_is_refused():
    single = from_tokens([[7], [9], [11]], seq_len=13)
    with pytest.raises(InputError, match="no causal target"):
        with_targets(single, CAUSAL, VOCAB, 0)
    with pytest.raises(InputError, match="no masked target"):
        with_targets(single, replace(MASKED, rate=1e-9), VOCAB, 0)
    with pytest.raises(InputError, match="'prefix' is unknown; allowed are causal, masked"):
        Objective(kind="prefix")
    for rate in (0, 1, -0.1, float("nan")):
        with pytest.raises(InputError, match="between 0 and 1"):
            Objective(kind="masked", mask_id=MASK, rate=rate)


# keys and samples


def test_keys_are_those_of_document_and_position():
    documents = rows(29)
    data, other = from_tokens(documents, seq_len=13), from_tokens(documents[::-1], seq_len=17)
    keys, others = token_keys(data, 3), token_keys(other, 3)
    assert len(set(keys.tolist())) == data.num_tokens
    assert sorted(keys.tolist()) == sorted(others.tolist())
    assert not set(keys.tolist()) & set(token_keys(data, 4).tolist())


def test_a_sample_among_some_tokens():
    data = text()
    among = np.zeros(data.num_tokens, dtype=bool)
    among[::3] = True
    found = sample_tokens(data, 47, 1, among)
    assert len(found) == 47 and among[found].all() and len(set(found.tolist())) == 47
    keys = token_keys(data, 1)
    assert sorted(keys[among])[:47] == keys[found].tolist()
    assert len(sample_tokens(data, 10**6, 1, among)) == among.sum()
    assert np.array_equal(sample_tokens(data, 10**6, 1), np.argsort(keys))
    assert len(sample_tokens(data, 5, 1, np.zeros(data.num_tokens, dtype=bool))) == 0


def test_the_causal_objective_of_a_model_is_told_by_the_model():
    from plants import view_of
    from transect.targets import objective_for

    assert objective_for(view_of("gpt2"), "ablation", "auto", None, 0.15) == CAUSAL
    assert objective_for(view_of("bert"), "ablation", "auto", MASK, 0.15) == MASKED
    assert objective_for(view_of("gpt2"), "ablation", "masked", MASK, 0.3) == replace(MASKED, rate=0.3)
    with pytest.raises(InputError, match=r"names its mask token; give --set ablation\.mask_id=ID"):
        objective_for(view_of("bert"), "ablation", "auto", None, 0.15)
    for wrong in (-1, VOCAB):
        with pytest.raises(InputError, match=f"mask_id {wrong} is out of range"):
            objective_for(view_of("bert"), "ablation", "auto", wrong, 0.15)
