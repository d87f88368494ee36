"""A prepared folder gives back what was written, and what was damaged is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from prepared import word_tokenizer
from transect.data.card import NAME
from transect.data.corpus import Corpus, folder_name
from transect.data.shards import Encoded, PartWriter, Size, write_corpus
from transect.errors import InputError

END = 5
VOCAB = 23
VOCABULARY = {f"w{number}": number for number in range(VOCAB)} | {"<end>": END, "<mask>": 7}
Documents = list[tuple[list[int], int]]


def _documents(count: int, seed: int) -> Documents:
    rng = np.random.default_rng(seed)
    return [(rng.integers(8, VOCAB, rng.integers(1, 31)).tolist(), int(rng.integers(1, 99))) for _ in range(count)]


SPLITS = {
    "train": {"law/new": _documents(37, 0), ".x": _documents(3, 1)},
    "valid": {"law/new": _documents(2, 2)},
    "ood": {"ré % ..": _documents(5, 3)},
}


def _tokenizer() -> object:
    vocabulary = {name: number for name, number in VOCABULARY.items() if name not in ("w5", "w7")}
    return word_tokenizer(vocabulary, eos_token="<end>", mask_token="<mask>", unk_token="w0")


def _write(folder: Path, splits: dict = SPLITS, shard_tokens: int = 101) -> Corpus:
    write_corpus(folder, splits, _tokenizer(), shard_tokens)
    return Corpus.open(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return _write(tmp_path / "corpus")


@pytest.mark.parametrize(("split", "domain"), [(split, domain) for split, own in SPLITS.items() for domain in own])
def test_every_document_comes_back_with_one_end_token(corpus: Corpus, split: str, domain: str):
    part, planted = corpus.part(split, domain), SPLITS[split][domain]
    flat = np.concatenate([[*ids, END] for ids, _ in planted])
    assert part.documents == len(planted) and part.tokens == len(flat)
    assert part.offsets.dtype == part.bytes.dtype == np.int64
    assert part.bytes.tolist() == [size for _, size in planted]
    for number, (ids, _) in enumerate(planted):
        first, behind = part.offsets[number : number + 2]
        assert part.read(first, behind - first).tolist() == [*ids, END]
    assert part.read(0, part.tokens).dtype == np.int64
    np.testing.assert_array_equal(part.read(0, part.tokens), flat)


@pytest.mark.parametrize("shard_tokens", [1, 2, 53, 10_007])
def test_stretches_that_span_shards_are_the_same_however_they_are_cut(tmp_path: Path, shard_tokens: int):
    corpus = _write(tmp_path / "corpus", shard_tokens=shard_tokens)
    part = corpus.part("train", "law/new")
    flat = np.concatenate([[*ids, END] for ids, _ in SPLITS["train"]["law/new"]])
    assert len(list((corpus.path / "train" / "law%2Fnew").glob("0*.bin"))) == -(-len(flat) // shard_tokens)
    rng = np.random.default_rng(shard_tokens)
    for start in rng.integers(0, len(flat), 31):
        count = int(rng.integers(0, len(flat) - start + 1))
        np.testing.assert_array_equal(part.read(int(start), count), flat[start : start + count])


def test_outside_a_part_nothing_is_read(corpus: Corpus):
    part = corpus.part("valid", "law/new")
    for start, count in ((-1, 2), (0, part.tokens + 1), (part.tokens, 1), (1, -1)):
        with pytest.raises(ValueError, match="law/new"):
            part.read(start, count)


def test_names_and_ids(corpus: Corpus):
    assert corpus.splits == ("train", "valid", "ood")
    assert corpus.domains("train") == (".x", "law/new")
    card = corpus.card
    assert (card.end_id, card.mask_id, card.start_id, card.pad_id, card.unknown_id) == (END, 7, None, None, 0)
    assert card.vocab_size == VOCAB and card.dtype == "uint16" and card.name == "corpus"
    with pytest.raises(InputError, match="no split 'test'"):
        corpus.domains("test")
    with pytest.raises(InputError, match="no domain 'law'; it has law/new"):
        corpus.part("valid", "law")


def test_labels_become_folders_that_differ_and_stay_inside():
    labels = ["a", "a/b", "a%2Fb", ".", "..", ".a", "%2Ea", "a b", "é", "A.b", "~"]
    names = [folder_name(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert not any("/" in name or name.startswith(".") for name in names)


def test_counts_of_the_train_split(corpus: Corpus):
    ids = [token for documents in SPLITS["train"].values() for row, _ in documents for token in [*row, END]]
    np.testing.assert_array_equal(corpus.token_counts(), np.bincount(ids, minlength=VOCAB))


def test_the_tokenizer_comes_back(corpus: Corpus):
    tokenizer = corpus.tokenizer()
    assert tokenizer("w11 w8 w22")["input_ids"] == [11, 8, 22]
    assert tokenizer.eos_token_id == END


def test_large_vocabularies_take_four_bytes(tmp_path: Path):
    vocabulary = {f"w{number}": number for number in range((1 << 16) + 1)}
    tokenizer = word_tokenizer(vocabulary, eos_token="w3", unk_token="w0")
    write_corpus(tmp_path / "c", {"train": {"a": [([1 << 16, 9], 4)]}}, tokenizer)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.card.dtype == "uint32"
    assert corpus.part("train", "a").read(0, 3).tolist() == [1 << 16, 9, 3]


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="vocabulary of 23"):
        write_corpus(tmp_path / "c", {"train": {"a": [([VOCAB], 4)]}}, _tokenizer())


def test_the_fingerprint_is_of_content_only(tmp_path: Path, corpus: Corpus):
    assert _write(tmp_path / "else" / "where", shard_tokens=7).fingerprint == corpus.fingerprint
    train, other = SPLITS["train"], dict(SPLITS["train"])
    first, *rest = train[".x"]
    other[".x"] = [(first[0], first[1] + 1), *rest]
    changed = [
        SPLITS | {"train": other},
        SPLITS | {"train": {"law": train["law/new"], ".x": train[".x"]}},
        SPLITS | {"train": train | {".x": [([9, *first[0]], first[1]), *rest]}},
        SPLITS | {"train": train | {".x": rest}},
    ]
    prints = {_write(tmp_path / str(number), splits).fingerprint for number, splits in enumerate(changed)}
    assert len(prints | {corpus.fingerprint}) == len(changed) + 1


def test_documents_cut_elsewhere_are_another_corpus(tmp_path: Path):
    one = _write(tmp_path / "a", {"train": {"a": [([9, END, 8], 2), ([8], 2)]}})
    two = _write(tmp_path / "b", {"train": {"a": [([9], 2), ([8, END, 8], 2)]}})
    assert one.part("train", "a").read(0, 6).tolist() == two.part("train", "a").read(0, 6).tolist()
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    "name", ["train/law%2Fnew/00001.bin", "valid/law%2Fnew/offsets.bin", "tokenizer/tokenizer.json"]
)
def test_a_short_or_missing_file_is_named(corpus: Corpus, name: str):
    file = corpus.path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{name} has .* should have"):
        Corpus.open(corpus.path)
    file.unlink()
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        Corpus.open(corpus.path)


def test_verify_names_the_edited_file(corpus: Corpus):
    corpus.verify()
    for name in corpus.card.files:
        file = corpus.path / name
        before = file.read_bytes()
        file.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        Corpus.open(corpus.path)
        with pytest.raises(InputError, match="was changed after it was prepared") as caught:
            corpus.verify()
        assert str(file) in str(caught.value)
        file.write_bytes(before)
    corpus.verify()


@pytest.mark.parametrize(("field", "value"), [("end_id", 4), ("content", "0" * 16), ("name", "b"), ("seal", "")])
def test_an_edited_card_is_refused(corpus: Corpus, field: str, value: object):
    file = corpus.path / NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(InputError, match="edited by hand"):
        Corpus.open(corpus.path)


def test_what_is_no_corpus_is_refused(tmp_path: Path, corpus: Corpus):
    with pytest.raises(InputError, match="not a prepared corpus"):
        Corpus.open(tmp_path / "nothing")
    (tmp_path / "half" / ".preparing").mkdir(parents=True)
    with pytest.raises(InputError, match="half prepared; run the same"):
        Corpus.open(tmp_path / "half")
    for content, words in (
        ("{", "damaged"),
        ("[]", "format 1"),
        ('{"format": 2}', "format 1"),
        ('{"format": 1}', "card"),
    ):
        (corpus.path / NAME).write_text(content)
        with pytest.raises(InputError, match=words) as caught:
            Corpus.open(corpus.path)
        assert "\n" not in str(caught.value)


def test_a_writer_goes_on_from_where_it_was_told(tmp_path: Path):
    dtype = np.dtype("<u2")
    rng = np.random.default_rng(0)
    pieces = []
    for documents in (3, 7, 5, 11):
        lengths = rng.integers(1, 29, documents)
        pieces.append(Encoded(rng.integers(0, 99, lengths.sum()).astype(dtype), lengths, lengths * 3, int(lengths[0])))
    whole = PartWriter(tmp_path / "a" / "b" / "whole", dtype, 31, Size())
    for piece in pieces:
        whole.append(piece)
    stopped = PartWriter(tmp_path / "a" / "b" / "stopped", dtype, 31, Size())
    sizes = []
    for piece in pieces:
        stopped.append(piece)
        sizes.append(Size(*(getattr(stopped.size, name) for name in Size.__slots__)))
    for kept in (0, 1, 2):
        again = PartWriter(stopped.folder, dtype, 31, sizes[kept])
        for piece in pieces[kept + 1 :]:
            again.append(piece)
        found = {file.name: file.read_bytes() for file in stopped.folder.iterdir()}
        assert found == {file.name: file.read_bytes() for file in whole.folder.iterdir()}
        assert again.card(tmp_path)[0] == whole.card(tmp_path)[0]
    (stopped.folder / "00000.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"00000.bin lost what was written"):
        PartWriter(stopped.folder, dtype, 31, sizes[0])


def test_a_moved_corpus_is_the_same(tmp_path: Path, corpus: Corpus):
    shutil.move(corpus.path, tmp_path / "moved")
    moved = Corpus.open(tmp_path / "moved")
    moved.verify()
    assert moved.fingerprint == corpus.fingerprint
