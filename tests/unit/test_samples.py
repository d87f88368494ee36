"""The training sequences of a run: what each holds, that all are met, and that they are functions of their number."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from known_tokens import END, PAD, START, corpus, distinct, lengths
from transect.data.ahead import Ahead
from transect.data.config import DataConfig
from transect.data.corpus import Corpus
from transect.data.next_sentence import Pairs
from transect.data.order import Purpose, draws, shuffled
from transect.data.packing import Stream, document_ids
from transect.data.samples import Samples, TrainBatch
from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.heads import next_labels
from transect.models.loss import IGNORED

DOMAINS = distinct([lengths(0, 23, 29), lengths(1, 3, 5), lengths(2, 11, 61)])
TEXTS = [document for domain in DOMAINS for document in domain]
TOKENS = sum(map(len, TEXTS))
VOCAB = 17 + TOKENS
OF_TOKEN = {token: number for number, text in enumerate(TEXTS) for token in text}
SEQ = 19


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Corpus]:
    """The same documents with a tokenizer for masked models (True) and with one that knows only an end token."""
    splits = {"train": {f"domain {i}": rows for i, rows in enumerate(DOMAINS)}, "valid": {"domain 0": DOMAINS[0][:2]}}
    root = tmp_path_factory.mktemp("corpora")
    return {masked: corpus(root / str(masked), splits, VOCAB, masked) for masked in (False, True)}


def model(**changes: Any) -> ModelConfig:
    plain = {"vocab_size": VOCAB + 5, "width": 8, "layers": 1, "attention": {"heads": 2}, "max_positions": SEQ}
    return ModelConfig.parse(plain | changes)


CAUSAL = model()
MASKED = model(objective="masked")
ASKED_TWICE = model(objective="masked", head={"next_sentence": True}, embedding={"types": 2})
ACROSS, APART = DataConfig(across_documents=True), DataConfig()
PAIRED = DataConfig(next_sentence=True)
KINDS = {
    "causal": (CAUSAL, APART),
    "causal across": (CAUSAL, ACROSS),
    "masked": (MASKED, APART),
    "masked across": (MASKED, ACROSS),
    "paired": (ASKED_TWICE, PAIRED),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
WINDOWED = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "paired"])


@cache
def _samples(corpora: tuple[Corpus, Corpus], kind: str, seed: int) -> Samples:
    settings, data = KINDS[kind]
    return Samples(corpora[not settings.causal], data, settings, seed)


def samples(prepared: dict[bool, Corpus], kind: str, seed: int = 5) -> Samples:
    return _samples((prepared[False], prepared[True]), kind, seed)


def same(one: TrainBatch, two: TrainBatch) -> bool:
    for field in fields(TrainBatch):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif a != b:
            return False
    return True


def joined(batches: list[TrainBatch]) -> TrainBatch:
    made: dict[str, Any] = {}
    for field in fields(TrainBatch):
        values = [getattr(batch, field.name) for batch in batches]
        tensors = isinstance(values[0], torch.Tensor)
        made[field.name] = torch.cat(values) if tensors else sum(values) if field.name == "predicted" else values[0]
    return TrainBatch(**made)


def originals(batch: TrainBatch) -> np.ndarray:
    """The ids before masking."""
    ids, labels = batch.ids.numpy(), batch.labels.numpy()
    return np.where(labels == IGNORED, ids, labels)


# order


@pytest.mark.parametrize("size", [*range(1, 40), 97, 100, 101, 256, 1009, 65_537])
def test_a_shuffle_is_a_permutation(size: int):
    for epoch in range(3):
        keys = np.broadcast_to(draws(7, Purpose.ORDER, np.array([epoch])), (size,))
        assert np.array_equal(np.sort(shuffled(np.arange(size), size, keys)), np.arange(size))


def test_a_shuffle_of_a_number_does_not_depend_on_the_others():
    size = 10**12 + 39
    numbers = np.array([0, 1, 2, 5 * 10**11, size - 1])
    keys = draws(3, Purpose.ORDER, numbers % 2)
    whole = shuffled(numbers, size, keys)
    assert (whole >= 0).all() and (whole < size).all() and len(set(whole.tolist())) == len(numbers)
    for place in range(len(numbers)):
        assert shuffled(numbers[[place]], size, keys[[place]]) == whole[place]


@pytest.mark.parametrize("size", [2, 3, 5, 7, 11])
def test_each_number_goes_everywhere_equally_often(size: int):
    trials = 6000
    epochs = np.repeat(np.arange(trials), size)
    places = shuffled(np.tile(np.arange(size), trials), size, draws(1, Purpose.ORDER, epochs)).reshape(trials, size)
    for number in range(size):
        counts = np.bincount(places[:, number], minlength=size)
        spread = ((counts - trials / size) ** 2 / (trials / size)).sum()
        assert spread < size - 1 + 5 * (2 * (size - 1)) ** 0.5  # chi-square, five standard deviations
    if size > 3:  # neighbours do not stay neighbours
        follows = ((places[:, 1] - places[:, 0]) % size == 1).mean()
        assert abs(follows - 1 / (size - 1)) < 5 * (1 / (size - 1) / trials) ** 0.5


def test_draws_differ_by_seed_purpose_and_number():
    numbers = np.arange(50)
    found = [draws(seed, purpose, numbers) for seed in (0, 1, -1, 2**63) for purpose in Purpose]
    assert len(np.unique(np.concatenate(found))) == 50 * len(found)
    assert len(np.unique(draws(0, Purpose.MASK, numbers[:, None], numbers))) == 2500  # (a, b) is not (b, a)


# the ring of tokens


class Twin:
    """The ring, written out token by token."""

    def __init__(self, lead: int | None) -> None:
        self.ids: list[int] = []
        self.document: list[int] = []
        for number, text in enumerate(TEXTS):
            row = [*([] if lead is None else [lead]), *text, END]
            self.ids += row
            self.document += [number] * len(row)

    def window(self, start: int, length: int) -> tuple[list[int], list[int]]:
        places = [(start + i) % len(self.ids) for i in range(length)]
        numbers, seen = [], 0
        for i, place in enumerate(places):
            seen += i > 0 and self.document[place] != self.document[places[i - 1]]
            numbers.append(seen)
        return [self.ids[place] for place in places], numbers


@pytest.mark.parametrize("lead", [None, 7])
@pytest.mark.parametrize("length", [1, 2, 17, 101, TOKENS])
def test_windows_against_a_loop(prepared: dict[bool, Corpus], lead: int | None, length: int):
    parts = [prepared[False].part("train", domain) for domain in prepared[False].domains("train")]
    stream, twin = Stream(parts, lead), Twin(lead)
    assert stream.tokens == len(twin.ids)
    starts = np.arange(stream.tokens)
    ids, firsts = stream.windows(starts, length)
    numbers = document_ids(firsts)
    for start in starts.tolist():
        assert (ids[start].tolist(), numbers[start].tolist()) == twin.window(start, length)


# samples as functions of their number


@EVERY
def test_any_slicing_gives_the_same_samples(prepared: dict[bool, Corpus], kind: str):
    made = samples(prepared, kind)
    first, count = made.per_epoch - 13, 29  # across an epoch's end
    whole = made.batch(first, count)
    for sizes in ([1] * 29, [13, 16], [7, 11, 11]):
        cuts = np.cumsum([0, *sizes])
        wanted = list(zip(cuts.tolist(), sizes, strict=False))
        pieces = [made.batch(first + at, size) for at, size in reversed(wanted)]  # whatever was asked for before
        assert same(joined(pieces[::-1]), whole)
    settings, data = KINDS[kind]
    assert same(Samples(prepared[not settings.causal], data, settings, 5).batch(first, count), whole)


@EVERY
def test_seeds_and_epochs_differ(prepared: dict[bool, Corpus], kind: str):
    made = samples(prepared, kind)
    first = made.batch(0, made.per_epoch)
    assert not same(first, made.batch(made.per_epoch, made.per_epoch))
    assert not same(first, samples(prepared, kind, 6).batch(0, made.per_epoch))
    rows = [
        sorted(map(tuple, originals(batch).tolist())) for batch in (first, made.batch(made.per_epoch, made.per_epoch))
    ]
    assert rows[0] != rows[1]  # not only the order: the cuts move


@WINDOWED
def test_an_epoch_meets_each_token_once(prepared: dict[bool, Corpus], kind: str):
    """All but fewer than a window's worth, which are others in the next epoch."""
    made = samples(prepared, kind)
    inner = SEQ - 2 * (kind.startswith("masked"))
    lead = 0 if "across" in kind else len(TEXTS)
    ring = TOKENS + len(TEXTS) + lead
    assert made.per_epoch == ring // inner
    missed = []
    for epoch in range(3):
        ids = originals(made.batch(epoch * made.per_epoch, made.per_epoch))
        ids = ids[:, 1:-1] if kind.startswith("masked") else ids
        counts = Counter(ids.flatten().tolist())
        assert all(counts[token] <= 1 for token in OF_TOKEN)
        missed.append({token for token in OF_TOKEN if not counts[token]})
        assert len(missed[-1]) <= ring % inner < inner and ids.size == ring - ring % inner
    assert missed[0] != missed[1] or missed[1] != missed[2]


@WINDOWED
def test_windows_come_in_no_order(prepared: dict[bool, Corpus], kind: str):
    made = samples(prepared, kind)
    ids = originals(made.batch(0, made.per_epoch))
    firsts = np.array([min(set(row) & OF_TOKEN.keys()) for row in ids.tolist()])
    assert abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 4 / len(firsts) ** 0.5
    assert (np.diff(firsts) > 0).mean() < 0.75


# what the heads are given


@WINDOWED
def test_documents_are_told_apart(prepared: dict[bool, Corpus], kind: str):
    made = samples(prepared, kind)
    batch = made.batch(3, 53)
    assert batch.ids.shape == (53, SEQ) and batch.ids.dtype == batch.labels.dtype == torch.int64
    assert batch.attention_mask is batch.token_type_ids is batch.next_sentence_label is None
    if "across" in kind:
        assert batch.document_ids is None
        return
    assert batch.document_ids is not None
    for row, numbers in zip(originals(batch).tolist(), batch.document_ids.tolist(), strict=True):
        of = [(number, OF_TOKEN[token]) for number, token in zip(numbers, row, strict=True) if token in OF_TOKEN]
        assert len({number for number, _ in of}) == len({text for _, text in of}) == len(set(of))
        assert numbers[0] == 0 and set(np.diff(numbers).tolist()) <= {0, 1}
        for place in range(1, SEQ - 1):
            if row[place - 1] in OF_TOKEN and row[place] == END:
                assert numbers[place] == numbers[place - 1]  # the end token belongs to the text before it
            if row[place] in OF_TOKEN and OF_TOKEN[row[place]] != OF_TOKEN.get(row[place - 1], -1):
                start = START if kind == "masked" else END
                assert row[place - 1] == start and numbers[place - 1] == numbers[place]  # and its own leads a text


@WINDOWED
def test_predicted_is_what_the_heads_count(prepared: dict[bool, Corpus], kind: str):
    made = samples(prepared, kind)
    for first in range(0, 60, 7):
        batch = made.batch(first, 11)
        labels = next_labels(batch.labels, batch.document_ids) if kind.startswith("causal") else batch.labels
        assert batch.predicted == int((labels != IGNORED).sum()) > 0


@pytest.mark.parametrize("kind", ["causal", "causal across"])
def test_what_a_causal_model_is_asked(prepared: dict[bool, Corpus], kind: str):
    batch = samples(prepared, kind).batch(0, 61)
    assert torch.equal(batch.ids, batch.labels)
    asked = next_labels(batch.labels, batch.document_ids)
    pairs = {(int(a), int(b)) for a, b in zip(batch.ids.flatten(), asked.flatten(), strict=True) if b != IGNORED}
    ends = sum(b == END for _, b in pairs)
    begins = {b for a, b in pairs if a == END}
    assert ends > len(TEXTS) // 2  # the end of a text is predicted, by its last token
    assert begins <= {text[0] for text in TEXTS} and len(begins) > len(TEXTS) // 2  # and its first token by an end
    follows = {b: a for text in TEXTS for a, b in pairwise(text)}
    assert all(a == follows[b] for a, b in pairs if b not in begins and b != END)


@pytest.mark.parametrize("kind", ["masked", "masked across"])
def test_what_a_masked_model_is_asked(prepared: dict[bool, Corpus], kind: str):
    batch = samples(prepared, kind).batch(0, 61)
    ids = originals(batch)
    assert (ids[:, 0] == START).all() and (ids[:, -1] == END).all()
    asked = batch.labels[batch.labels != IGNORED].tolist()
    assert set(asked) <= OF_TOKEN.keys()
    text = np.isin(ids, list(OF_TOKEN)).sum(1)
    counts = (batch.labels != IGNORED).sum(1).numpy()
    assert np.array_equal(counts, np.maximum(1, np.rint(0.15 * text)))


# pairs of texts


@pytest.fixture(scope="module")
def pairs(prepared: dict[bool, Corpus]) -> tuple[Samples, TrainBatch]:
    made = samples(prepared, "paired")
    return made, made.batch(0, 40 * made.per_epoch)


def halves(batch: TrainBatch) -> Iterator[tuple[list[int], list[int], int]]:
    """A, B and the label of each sequence, and that the sequence is [CLS] A [SEP] B [SEP], then padding."""
    assert batch.token_type_ids is not None and batch.attention_mask is not None
    assert batch.next_sentence_label is not None and batch.document_ids is None
    rows = zip(
        originals(batch).tolist(),
        batch.token_type_ids.tolist(),
        batch.attention_mask.tolist(),
        batch.next_sentence_label.tolist(),
        strict=True,
    )
    for row, types, real, label in rows:
        a_end = row.index(END)
        b_end = row.index(END, a_end + 1)
        assert row[0] == START and set(row[b_end + 1 :]) <= {PAD} and len(row) == SEQ
        assert types == [0] * (a_end + 1) + [1] * (b_end - a_end) + [0] * (SEQ - b_end - 1)
        assert real == [1] * (b_end + 1) + [0] * (SEQ - b_end - 1)
        yield row[1:a_end], row[a_end + 1 : b_end], label


def test_pairs_follow_or_come_from_another_document(pairs: tuple[Samples, TrainBatch]):
    labels = []
    for first, second, label in halves(pairs[1]):
        assert first and second
        for text in (first, second):  # tokens of one document, in a row
            assert np.diff(text).tolist() == [1] * (len(text) - 1) and len({OF_TOKEN[token] for token in text}) == 1
        same_document = OF_TOKEN[first[0]] == OF_TOKEN[second[0]]
        assert same_document == (label == 0)
        if label == 0:
            assert second[0] == first[-1] + 1
        labels.append(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / len(labels) ** 0.5


def test_pieces_cover_every_document_once(pairs: tuple[Samples, TrainBatch]):
    """A and what follows it, told or not: the pieces of an epoch are the documents of two tokens or more."""
    made, batch = pairs
    room = SEQ - 3
    assert made.per_epoch == sum(-(-len(text) // room) for text in TEXTS if len(text) > 1)
    found = list(halves(batch))
    cuts = []
    for epoch in range(2):
        rows = found[epoch * made.per_epoch : (epoch + 1) * made.per_epoch]
        begins = sorted(first[0] for first, _, _ in rows)
        assert len(set(begins)) == len(begins)  # every piece once
        cuts.append(begins)
        seen = Counter(token for first, second, label in rows for token in first + (second if label == 0 else []))
        assert max(seen.values()) == 1
    assert {text[0] for text in TEXTS if len(text) > 1} <= set(cuts[0]) & set(cuts[1]) and cuts[0] != cuts[1]


def test_lengths_tell_little_of_the_answer(pairs: tuple[Samples, TrainBatch]):
    sizes: dict[int, list[int]] = {0: [], 1: []}
    for first, second, label in halves(pairs[1]):
        sizes[label].append(len(first))
        assert len(first) + len(second) <= SEQ - 3
    difference = abs(np.mean(sizes[0]) - np.mean(sizes[1]))
    assert difference < 5 * np.std(sizes[0]) / len(sizes[0]) ** 0.5


def test_every_document_gives_second_texts_by_its_pieces(pairs: tuple[Samples, TrainBatch]):
    drawn = Counter(OF_TOKEN[second[0]] for _, second, label in halves(pairs[1]) if label == 1)
    total, pieces = sum(drawn.values()), {n: -(-len(t) // (SEQ - 3)) * (len(t) > 1) for n, t in enumerate(TEXTS)}
    whole = sum(pieces.values())
    for number, count in pieces.items():
        # a document is open to the other documents' pieces alone
        share = sum(pieces[n] / whole * count / (whole - pieces[n]) for n in pieces if n != number)
        assert abs(drawn[number] - share * total) <= 5 * (share * total) ** 0.5


@pytest.mark.parametrize("room", [3, 4, 5, 7, 16])
def test_no_piece_is_too_long_or_too_short(room: int):
    """For documents of 2 to 99 tokens, in many epochs: A and B have a token each and fit into the room."""
    sizes = list(range(2, 100))
    offsets = np.cumsum([0, *(size + 1 for size in sizes)])

    def read(start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count)

    part = SimpleNamespace(documents=len(sizes), offsets=offsets, tokens=int(offsets[-1]), read=read)
    made = Pairs([part], room, 3, "here")  # pyright: ignore[reportArgumentType]
    cuts = set()
    for epoch in range(5):
        pieces = np.arange(made.count)
        begins = []
        for pair in made.make(pieces, np.full(made.count, epoch), pieces + epoch * made.count):
            assert 2 <= len(pair.first) + len(pair.second) <= room and len(pair.first) and len(pair.second)
            begins.append(int(pair.first[0]))
        assert begins == sorted(set(begins))
        cuts.add(tuple(begins))
    assert (len(cuts) > 1) == (room > 3)  # three tokens cannot be cut otherwise


def test_types_only_where_the_model_has_them(prepared: dict[bool, Corpus]):
    plain = model(objective="masked", head={"next_sentence": True})
    assert Samples(prepared[True], PAIRED, plain, 0).batch(0, 3).token_type_ids is None


# mistakes


@pytest.mark.parametrize(
    ("masked", "settings", "data", "words"),
    [
        (False, model(vocab_size=VOCAB - 1), APART, ("vocab_size is", str(VOCAB - 1), str(VOCAB))),
        (False, MASKED, APART, ("no mask token", "objective to causal")),
        (False, CAUSAL, DataConfig(seq_len=5003), ("5003", "seq_len lower")),
        (False, model(positions="learned"), DataConfig(seq_len=23), ("seq_len is 23", f"{SEQ} learned positions")),
        (True, MASKED, PAIRED, ("data.next_sentence is true", "model.head.next_sentence is false")),
        (True, ASKED_TWICE, APART, ("model.head.next_sentence is true", "data.next_sentence is false")),
        (True, MASKED, DataConfig(seq_len=2), ("seq_len is 2", "at least 3")),
        (True, ASKED_TWICE, DataConfig(seq_len=5, next_sentence=True), ("seq_len is 5", "at least 6")),
    ],
)
def test_what_does_not_fit_is_one_line(
    prepared: dict[bool, Corpus], masked: bool, settings: ModelConfig, data: DataConfig, words: tuple[str, ...]
):
    with pytest.raises(InputError) as refused:
        Samples(prepared[masked], data, settings, 0)
    text = str(refused.value)
    assert all(word in text for word in words) and "\n" not in text, text


def test_too_little_text(prepared: dict[bool, Corpus], tmp_path: Path):
    made = samples(prepared, "causal")
    made.check(made.per_epoch)
    with pytest.raises(InputError, match=rf"has {made.per_epoch} sequences .* takes {made.per_epoch + 1}; set train\."):
        made.check(made.per_epoch + 1)
    alone = corpus(tmp_path / "alone", {"train": {"a": [[20, 21, 22], [23]]}}, 29, masked=True)
    with pytest.raises(InputError, match="has 1 documents of two tokens or more"):
        Samples(alone, PAIRED, ASKED_TWICE, 0)
    no_train = corpus(tmp_path / "none", {"valid": {"a": [[20, 21, 22], [23]]}}, 29)
    with pytest.raises(InputError, match="has no split 'train'; it has valid"):
        Samples(no_train, APART, CAUSAL, 0)


# the thread


def worker_threads() -> int:
    return sum(thread.name == "batches ahead" for thread in threading.enumerate())


@given(first=st.integers(0, 50), count=st.integers(0, 9), depth=st.integers(1, 4))
def test_ahead_gives_the_same_in_the_same_order(first: int, count: int, depth: int):
    with Ahead(lambda number: number * number, first, first + count, depth) as made:
        assert list(made) == [number * number for number in range(first, first + count)]
        assert list(made) == []
    assert worker_threads() == 0


def test_ahead_is_bounded_and_stops(prepared: dict[bool, Corpus]):
    asked: list[int] = []
    loader = samples(prepared, "masked")

    def make(number: int) -> TrainBatch:
        asked.append(number)
        return loader.batch(number * 3, 3)

    with Ahead(make, 5, depth=2) as made:
        for number in (5, 6, 7):
            assert same(next(made), loader.batch(number * 3, 3))
        deadline = time.monotonic() + 10
        while len(asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert asked == [5, 6, 7, 8, 9]  # two are waiting, no third is made
        assert worker_threads() == 1
    assert worker_threads() == 0
    with pytest.raises(StopIteration):
        next(made)
    made.close()


def test_ahead_brings_exceptions_when_their_turn_comes():
    def make(number: int) -> int:
        if number == 3:
            raise InputError("the disk is gone")
        return number

    with Ahead(make, 1) as made:
        assert [next(made), next(made)] == [1, 2]
        with pytest.raises(InputError, match="the disk is gone"):
            next(made)
        with pytest.raises(StopIteration):
            next(made)
    assert worker_threads() == 0
