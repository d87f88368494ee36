"""Evaluation text: every token is asked for once, after what stands before it, whatever the windows and batches."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from known_tokens import END, MASK, PAD, START, corpus, distinct, lengths
from transect.data.config import DataConfig
from transect.data.corpus import Corpus
from transect.data.evaluation import EvaluationText
from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.heads import next_labels
from transect.models.loss import IGNORED

DOMAINS = distinct([lengths(3, 31, 43), [1, 2, 3, 16, 17, 18, 19, 33, 34, 35, 36, 37]])
VOCAB = 17 + sum(len(text) for domain in DOMAINS for text in domain)
SEQ = 19


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Corpus]:
    splits = {"train": {"x": DOMAINS[0][:3]}, "valid": {"x": DOMAINS[0], "edges": DOMAINS[1]}}
    root = tmp_path_factory.mktemp("corpora")
    return {masked: corpus(root / str(masked), splits, VOCAB, masked) for masked in (False, True)}


def model(**changes: Any) -> ModelConfig:
    plain = {"vocab_size": VOCAB, "width": 8, "layers": 1, "attention": {"heads": 2}, "max_positions": SEQ}
    return ModelConfig.parse(plain | changes)


CAUSAL, MASKED = model(), model(objective="masked")
DATA = DataConfig()


def windows(text: EvaluationText, batch_size: int) -> list[tuple[list[int], list[int], list[bool], int, list[int]]]:
    """ids, labels, predicted, document and real marks of every window."""
    rows = []
    for number in range(text.count(batch_size)):
        batch = text.batch(number, batch_size)
        real = torch.ones_like(batch.ids) if batch.attention_mask is None else batch.attention_mask
        assert batch.attention_mask is None or not bool(real.all())
        parts = (batch.ids, batch.labels, batch.predicted, batch.document, real)
        rows += list(zip(*(part.tolist() for part in parts), strict=True))
    return rows


def documents(text: EvaluationText, domain: int) -> list[list[int]]:
    """The documents as the text numbers them, found by their first token."""
    first = {}
    for ids, _, _, document, _ in windows(text, 1):
        if ids[1] in {one[0] for one in DOMAINS[domain]}:
            first[document] = ids[1]
    by_first = {one[0]: one for one in DOMAINS[domain]}
    return [by_first[first[place]] for place in range(text.documents)]


@pytest.mark.parametrize("domain", [0, 1])
@pytest.mark.parametrize("stride", [None, 1, 5, 17, 18])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_a_causal_model_is_asked_for_every_token_once(
    prepared: dict[bool, Corpus], domain: int, stride: int | None, batch_size: int
):
    text = EvaluationText(prepared[False], "valid", ("x", "edges")[domain], DATA, CAUSAL, stride=stride)
    order = documents(text, domain)
    assert sorted(order) == sorted(DOMAINS[domain])
    assert text.lengths.tolist() == [len(one) for one in order]
    assert text.bytes.tolist() == [3 * len(one) + 1 for one in order] and len(set(text.keys.tolist())) == len(order)
    asked: Counter = Counter()
    for ids, labels, predicted, document, real in windows(text, batch_size):
        whole = [END, *order[document]]
        used = sum(real)
        assert real == [1] * used + [0] * (len(ids) - used) and len(ids) <= SEQ
        begin = whole.index(ids[0])
        assert ids[:used] == whole[begin : begin + used]  # as in the text, and nothing after its end
        assert begin == 0 or used > 1
        following = next_labels(torch.tensor([labels]), None)[0].tolist()
        assert predicted == [one != IGNORED for one in following]
        for place, marked in enumerate(predicted):
            if marked:
                assert following[place] == ids[place + 1] == whole[begin + place + 1]
                asked[following[place]] += 1
                looked_back = min(begin + place, SEQ - 2 if stride is None else SEQ - 1 - stride)
                assert place >= (looked_back if stride is not None or begin == 0 else 0)
    assert asked == Counter(token for one in order for token in one)


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_what_a_masked_model_is_asked(prepared: dict[bool, Corpus], stride: int | None, batch_size: int):
    text = EvaluationText(prepared[True], "valid", "x", DATA, MASKED, stride=stride)
    order = documents_of_masked(text)
    counts = np.zeros(text.documents, dtype=int)
    seen: set[int] = set()
    for ids, labels, predicted, document, real in windows(text, batch_size):
        used = sum(real)
        assert ids[0] == START and ids[used - 1] == END and ids[used:] == [PAD] * (len(ids) - used)
        original = [label if label != IGNORED else one for one, label in zip(ids, labels, strict=True)]
        begin = order[document].index(original[1])
        assert original[1 : used - 1] == order[document][begin : begin + used - 2]
        assert predicted == [label != IGNORED for label in labels] and MASK not in original
        counts[document] += sum(predicted)
        seen |= set(original[1 : used - 1])
    assert seen == {token for one in order for token in one}
    room = SEQ - 2
    new = [
        [min(room, n), *(min(s, n - at) for s in [stride or room] for at in range(room, n, s))] for n in map(len, order)
    ]
    expected = [sum(max(1, round(0.15 * part)) for part in parts) for parts in new]
    assert counts.tolist() == expected
    bytes_of_these = [(3 * n + 1) * count / n for n, count in zip(map(len, order), expected, strict=True)]
    assert np.allclose(text.bytes, bytes_of_these, rtol=1e-12)


def documents_of_masked(text: EvaluationText) -> list[list[int]]:
    """The documents as the text numbers them, found by any token that is not special."""
    of_token = {token: one for one in DOMAINS[0] for token in one}
    found: dict[int, list[int]] = {}
    for _, labels, predicted, document, _ in windows(text, 1):
        found[document] = of_token[next(label for label, one in zip(labels, predicted, strict=True) if one)]
    return [found[place] for place in range(text.documents)]


def test_masks_follow_from_seed_and_document(prepared: dict[bool, Corpus]):
    def chosen(seed: int, tokens: int | None, batch_size: int) -> dict[int, list[int]]:
        text = EvaluationText(prepared[True], "valid", "x", DATA, MASKED, tokens=tokens, seed=seed)
        found: dict[int, list[int]] = {}
        for ids, labels, _, _, real in windows(text, batch_size):
            pairs = zip(ids[: sum(real)], labels, strict=False)
            asked = [(label, one) for one, label in pairs if label != IGNORED]
            for label, shown in asked:
                found.setdefault(label, []).append(shown)
        return found

    whole = chosen(0, None, 5)
    assert chosen(0, None, 1) == whole and chosen(1, None, 5).keys() != whole.keys()
    some = chosen(0, 150, 3)
    assert 0 < len(some) < len(whole) and all(whole[label] == shown for label, shown in some.items())


def test_as_many_documents_as_the_limit_allows(prepared: dict[bool, Corpus]):
    whole = EvaluationText(prepared[False], "valid", "x", DATA, CAUSAL)
    order = documents(whole, 0)
    assert order != DOMAINS[0]  # by hash
    ends = np.cumsum([len(one) for one in order])
    for limit in (1, int(ends[0]), int(ends[4]) - 1, int(ends[4]), int(ends[-1]), 10**9):
        some = EvaluationText(prepared[False], "valid", "x", DATA, CAUSAL, tokens=limit)
        count = max(1, int((ends <= limit).sum()))
        assert some.documents == count and documents(some, 0) == order[:count]
        assert np.array_equal(some.keys, whole.keys[:count])


def test_the_longest_windows_come_first(prepared: dict[bool, Corpus]):
    text = EvaluationText(prepared[False], "valid", "x", DATA, CAUSAL)
    sizes = [sum(real) for *_, real in windows(text, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert text.count(7) == -(-len(sizes) // 7)
    assert text.batch(0, 7).attention_mask is None and set(text.batch(0, 7).inputs(torch.device("cpu"))) == {
        "input_ids",
        "labels",
    }


def test_mistakes_are_one_line(prepared: dict[bool, Corpus]):
    with pytest.raises(InputError, match=r"stride is 19; with sequences of 19 tokens it goes from 1 to 18"):
        EvaluationText(prepared[False], "valid", "x", DATA, CAUSAL, stride=19)
    with pytest.raises(InputError, match="no mask token"):
        EvaluationText(prepared[False], "valid", "x", DATA, MASKED)
    with pytest.raises(InputError, match="no domain 'y'"):
        EvaluationText(prepared[False], "valid", "y", DATA, CAUSAL)
