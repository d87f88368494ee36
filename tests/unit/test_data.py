import gzip
import json
import logging
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from transect.data import (
    assign,
    batches,
    builtin_text,
    error_units,
    from_text,
    from_tokens,
    load_tokens,
    sample_tokens,
)
from transect.data import split as split_module
from transect.data import text as text_module
from transect.errors import InputError

PAD, UNK, CLS, SEP = 0, 1, 2, 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "##x", "longword"]


def wordpiece(wrapped=True, truncation=None):
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if wrapped:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
    if truncation:
        core.enable_truncation(truncation)
        core.enable_padding(length=truncation)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def ragged(documents, seed=0, longest=30, shortest=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, size=rng.integers(shortest, longest + 1)).tolist() for _ in range(documents)]


def same(left, right):
    for name in ("ids", "special", "starts", "lengths", "document", "document_hash"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert left.seq_len == right.seq_len


def sequences(data):
    return [data.ids[s : s + n].tolist() for s, n in zip(data.starts, data.lengths, strict=True)]


# --- from_tokens -----------------------------------------------------------------------------------------------------


def test_documents_are_cut_and_the_tail_is_kept():
    data = from_tokens([[1, 2, 3, 4, 5], [6], [7, 8]], seq_len=2)
    assert sequences(data) == [[1, 2], [3, 4], [5], [6], [7, 8]]
    assert data.document.tolist() == [0, 0, 0, 1, 2]
    assert (data.num_tokens, data.num_sequences, data.num_documents) == (8, 5, 3)
    assert data.ids.dtype == np.int32 and data.starts.dtype == np.int64 and data.document_hash.dtype == np.uint64
    assert not data.special.any() and not data.builtin


def test_seq_len_defaults_to_the_row_width():
    assert from_tokens(np.arange(12).reshape(3, 4)).seq_len == 4
    assert from_tokens([[1, 2, 3], [4]]).seq_len == 3


def test_padding_side_cannot_matter():
    rows = ragged(25)
    rng = np.random.default_rng(1)
    width = 40
    left, right, scattered = (np.full((25, width), fill) for fill in (0, -100, 7))
    masks = [np.zeros((25, width), dtype=bool) for _ in range(3)]
    for i, row in enumerate(rows):
        places = np.arange(width - len(row), width), np.arange(len(row)), np.sort(rng.permutation(width)[: len(row)])
        for ids, mask, place in zip((left, right, scattered), masks, places, strict=True):
            ids[i, place], mask[i, place] = row, True
    plain = from_tokens(rows, seq_len=8)
    same(plain, from_tokens(left, masks[0], seq_len=8))
    same(plain, from_tokens(torch.tensor(right), torch.tensor(masks[1]).long(), seq_len=8))
    same(plain, from_tokens(scattered, masks[2].astype(float), seq_len=8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 2, 3],), "2-D"),
        ((np.arange(3),), "2-D"),
        ((np.zeros((2, 2, 2), dtype=int),), "2-D"),
        ((np.zeros((2, 2)),), "integers"),
        ((np.zeros((2, 2), dtype=bool),), "integers"),
        (([["a", "b"]],), "integers"),
        (([[1, [2]]],), "not a list of numbers"),
        (([[[1]], [[2]]],), "not a list of numbers"),
        (([[1, -1]],), "negative id -1"),
        (([[1, 2**31]],), "end at"),
        (([[1, 2]], [[1, 1, 1]]), "mask has shape"),
        (([[1, 2]], [[1, 2]]), "other than 0 and 1"),
        (([[1, 2], [3]], [[1, 1], [1]]), "unequal length"),
        (([[1, 2], [3, 4]], [[1, 1], [0, 0]]), "row 1 of ids has no real token"),
        (([[1], []],), "row 1 of ids has no real token"),
        (([],), "no rows"),
        ((np.zeros((0, 4), dtype=int),), "no rows"),
        (([[1, 2]], None, 1), "at least 2"),
    ],
)
def test_from_tokens_refuses(arguments, words):
    with pytest.raises(InputError, match=words) as error:
        from_tokens(*arguments)
    assert "\n" not in str(error.value)


def test_load_tokens(tmp_path):
    ids = np.arange(20).reshape(2, 10)
    np.save(tmp_path / "ids.npy", ids)
    data = load_tokens(tmp_path / "ids.npy", seq_len=4)
    same(data, from_tokens(ids, seq_len=4))
    assert data.name == "ids.npy"
    np.save(tmp_path / "objects.npy", np.array([[1], [1, 2]], dtype=object))
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "several.npz", ids=ids)
    wrong = {"objects.npy": "plain numbers", "text.npy": "plain numbers", "several.npz": "several", "none.npy": "read"}
    for name, words in wrong.items():
        with pytest.raises(InputError, match=words):
            load_tokens(tmp_path / name)


# --- hashes and fingerprint ------------------------------------------------------------------------------------------


def test_document_hash_is_blake2b_of_int64():
    from hashlib import blake2b

    data = from_tokens([[1, 2, 3, 4, 5], [6]], seq_len=2)
    expected = blake2b(np.array([1, 2, 3, 4, 5], dtype="<i8").tobytes(), digest_size=8).digest()
    assert data.document_hash[0] == int.from_bytes(expected, "little")
    expected = blake2b(np.array([3, 4], dtype="<i8").tobytes(), digest_size=8).digest()
    assert data.sequence_hash[1] == int.from_bytes(expected, "little")


def test_fingerprint_sees_tokens_cuts_and_seq_len_but_not_order():
    rows = ragged(30)
    prints = from_tokens(rows, seq_len=8).fingerprint
    assert len(prints) == 16 and int(prints, 16) >= 0
    assert from_tokens(rows[::-1], seq_len=8).fingerprint == prints
    assert from_tokens(rows, seq_len=9).fingerprint != prints
    assert from_tokens([*rows, rows[0]], seq_len=8).fingerprint != prints
    changed = [[*rows[0][:-1], rows[0][-1] + 1], *rows[1:]]
    assert from_tokens(changed, seq_len=8).fingerprint != prints
    short = from_tokens([[1, 2], [3]], seq_len=4).fingerprint
    assert from_tokens([[1, 2, 3]], seq_len=4).fingerprint != short
    assert from_tokens([[1, 2], [3]], seq_len=5).fingerprint != short
    data = from_tokens(rows, seq_len=8)
    assert replace(data, special=np.arange(data.num_tokens) == 0).fingerprint != prints


# --- text ------------------------------------------------------------------------------------------------------------


def test_every_sequence_is_wrapped_inside_seq_len(tmp_path):
    (tmp_path / "t.txt").write_text("a b c d e ax", encoding="utf-8")
    data = from_text(tmp_path / "t.txt", wordpiece(), seq_len=5)
    assert sequences(data) == [[CLS, 4, 5, 6, SEP], [CLS, 7, 8, 4, SEP], [CLS, 9, SEP]]
    assert data.special.tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1]
    assert data.name == "t.txt"
    plain = from_text(tmp_path / "t.txt", wordpiece(), seq_len=5, special_tokens=False)
    assert sequences(plain) == [[4, 5, 6, 7, 8], [4, 9]] and not plain.special.any()
    assert plain.document_hash == data.document_hash
    same(plain, from_text(tmp_path / "t.txt", wordpiece(wrapped=False), seq_len=5))
    assert plain.fingerprint != data.fingerprint


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    texts = ["a b c d", "e a", "b b b"]
    lines = "".join(json.dumps({"text": text, "title": "-"}) + "\n" for text in texts)
    (tmp_path / "r.jsonl").write_text("\ufeff" + lines + "\n" + json.dumps({"text": " \n"}), encoding="utf-8")
    with gzip.open(tmp_path / "r.jsonl.gz", "wt", encoding="utf-8") as handle:
        handle.write(lines)
    pd.DataFrame({"text": [*texts, " "], "title": "-"}).to_parquet(tmp_path / "r.parquet")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "1.txt").write_text("\ufeff" + texts[0], encoding="utf-8")
    with gzip.open(folder / "2.txt.gz", "wt", encoding="utf-8") as handle:
        handle.write(texts[1])
    (folder / "sub" / "3.md").write_text(texts[2], encoding="utf-8")
    expected = from_tokens([[4, 5, 6, 7], [8, 4], [5, 5, 5]], seq_len=3)
    for name in ("r.jsonl", "r.jsonl.gz", "r.parquet", "folder"):
        same(expected, from_text(str(tmp_path / name), wordpiece(wrapped=False), seq_len=3))
    parts = [folder / "1.txt", folder / "2.txt.gz", folder / "sub" / "3.md"]
    same(expected, from_text(parts, wordpiece(wrapped=False), seq_len=3))


def test_limit_counts_text_tokens_first_and_ends_reading(tmp_path):
    (tmp_path / "1.txt").write_text("a b c", encoding="utf-8")
    (tmp_path / "2.txt").write_text("d e a b c", encoding="utf-8")
    (tmp_path / "3.txt").write_bytes(b"\xff not UTF-8")
    data = from_text(tmp_path, wordpiece(), seq_len=4, limit_tokens=5)
    assert sequences(data) == [[CLS, 4, 5, SEP], [CLS, 6, SEP], [CLS, 7, 8, SEP]]
    with pytest.raises(InputError, match="not UTF-8"):
        from_text(tmp_path, wordpiece(), seq_len=4, limit_tokens=9)


def test_limit_gives_the_head_of_the_unlimited_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "_MARGIN", 4)
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(["a", "bxx", "cx", "qqqq"], size=500))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    tokenizer = wordpiece(wrapped=False)
    whole = from_text(tmp_path / "long.txt", tokenizer, seq_len=7)
    for limit in (7, 50, 499, 10_000):
        data = from_text(tmp_path / "long.txt", tokenizer, seq_len=7, limit_tokens=limit)
        np.testing.assert_array_equal(data.ids, whole.ids[:limit])
    # Nine characters a token: at some of these limits the first cut falls inside the last token that is kept.
    (tmp_path / "words.txt").write_text("longword " * 500, encoding="utf-8")
    for limit in range(30, 45):
        data = from_text(tmp_path / "words.txt", tokenizer, seq_len=7, limit_tokens=limit)
        assert data.ids.tolist() == [WORDS.index("longword")] * limit


def test_long_text_of_one_file_is_not_encoded_beyond_the_limit(tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("a b c d " * 50_000, encoding="utf-8")
    encoded = []
    encode = text_module._encode
    monkeypatch.setattr(text_module, "_encode", lambda texts, t: encoded.extend(map(len, texts)) or encode(texts, t))
    assert from_text(tmp_path / "long.txt", wordpiece(), seq_len=8, limit_tokens=100).num_documents == 1
    assert sum(encoded) < 20_000


def test_truncation_in_the_tokenizer_file_does_not_truncate(tmp_path):
    (tmp_path / "t.txt").write_text("a b c d e " * 10, encoding="utf-8")
    data = from_text(tmp_path / "t.txt", wordpiece(truncation=8), seq_len=12)
    assert (~data.special).sum() == 50 and PAD not in data.ids


def test_long_documents_give_no_warning(tmp_path, caplog):
    tokenizer = wordpiece()
    tokenizer.model_max_length = 4
    (tmp_path / "t.txt").write_text("a b c d e " * 10, encoding="utf-8")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        from_text(tmp_path / "t.txt", tokenizer, seq_len=4)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
        ("broken.jsonl", b'{"text": "a b c"}\n{"text"', "line 2 of .* is not JSON"),
        ("other.jsonl", b'{"body": "a b c"}', 'line 1 of .* no "text" string'),
        ("number.jsonl", b'{"text": 3}', 'no "text" string'),
        ("list.jsonl", b"[1]", 'no "text" string'),
        ("blank.jsonl", b'{"text": ""}\n', "0 tokens, less than one sequence"),
        ("not.txt.gz", b"plain", "cannot read"),
        ("cut.txt.gz", gzip.compress(b"a b c" * 100, mtime=0)[:20], "cannot read"),
        ("not.parquet", b"plain", "not a Parquet file"),
        ("short.txt", b"a", "1 tokens, less than one sequence of 2"),
    ],
)
def test_from_text_refuses_a_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        from_text(tmp_path / name, wordpiece(), seq_len=4)
    assert "\n" not in str(error.value)


def test_from_text_refuses_parquet_without_text(tmp_path):
    pd.DataFrame({"body": ["a"]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"text": ["a b c", None]}).to_parquet(tmp_path / "b.parquet")
    for name, words in (("a", 'no column "text"'), ("b", 'without a "text" string')):
        with pytest.raises(InputError, match=words):
            from_text(tmp_path / f"{name}.parquet", wordpiece(), seq_len=4)


def test_from_text_refuses_arguments(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("a b c d e a b c d e", encoding="utf-8")
    (tmp_path / "none").mkdir()
    for arguments, words in (
        ((file, None), "--tokens"),
        (([], wordpiece()), "no text files"),
        ((tmp_path / "other.txt", wordpiece()), "no file or folder"),
        ((tmp_path / "none", wordpiece()), "has no files"),
        ((file, wordpiece(), 8, 0), "limit_tokens is 0"),
        ((file, wordpiece(), 8, 5), "5 tokens, less than one sequence of 6"),
        ((file, wordpiece(), 2), "seq_len is 2; it must be at least 3"),
        ((file, wordpiece(wrapped=False), 1), "seq_len is 1; it must be at least 2"),
    ):
        with pytest.raises(InputError, match=words):
            from_text(*arguments)


def test_special_tokens_that_cannot_be_found_are_refused(tmp_path):
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    (tmp_path / "t.txt").write_text("b c d e " * 4, encoding="utf-8")
    with pytest.raises(InputError, match="special tokens are unknown"):
        from_text(tmp_path / "t.txt", tokenizer, seq_len=8)
    assert from_text(tmp_path / "t.txt", tokenizer, seq_len=8, special_tokens=False).num_tokens == 16


def test_builtin_text():
    data = builtin_text(wordpiece(), 128)
    assert data.builtin and "State of the Union" in data.name
    assert data.num_documents == 40 and data.num_tokens > 200_000
    assert len(set(data.document_hash.tolist())) == 40
    small = builtin_text(wordpiece(), 64, limit_tokens=1000)
    tokens = np.bincount(small.document, weights=small.lengths) - 2 * np.bincount(small.document)
    assert small.seq_len == 64 and small.num_documents == 1000 // 62  # a sequence of each speech, spread over the years
    assert set(tokens) == {1000 // small.num_documents}
    assert set(small.document_hash.tolist()) & set(data.document_hash.tolist()) == set()
    with pytest.raises(InputError, match="less than one sequence"):
        builtin_text(wordpiece(), 64, limit_tokens=30)


# --- split -----------------------------------------------------------------------------------------------------------


def test_split_has_the_asked_sizes_and_keeps_documents_together():
    data = from_tokens(ragged(100), seq_len=8)
    split = assign(data, 0.25, 0.125, "hash", seed=0)
    part = np.array([set(split.part[data.document == d].tolist()) for d in range(100)])
    assert all(len(parts) == 1 for parts in part)
    assert np.bincount([parts.pop() for parts in part]).tolist() == [66, 9, 25]
    assert split.unit == "document" and split.part.dtype == np.uint8
    assert (assign(data, 0.25, 0.125, "hash", seed=1).part != split.part).any()
    assert set(assign(data, 0.25, 0, "hash", 0).part.tolist()) == {0, 2}
    assert (assign(data, 0.001, 0.001, "hash", 0).part == 2).any() and (assign(data, 0.1, 0.001).part == 1).any()


@pytest.mark.parametrize("documents", [12, 60])
def test_split_and_sample_do_not_depend_on_order(documents):
    rows = ragged(documents, longest=50)
    order = np.random.default_rng(3).permutation(documents)
    data, shuffled = from_tokens(rows, seq_len=8), from_tokens([rows[i] for i in order], seq_len=8)
    assert shuffled.fingerprint == data.fingerprint

    def parts(data):
        return sorted(zip(data.sequence_hash.tolist(), assign(data, seed=5).part.tolist(), strict=True))

    assert parts(data) == parts(shuffled)

    def sampled(data):
        index = sample_tokens(data, 50, seed=5)
        owner = np.repeat(data.document, data.lengths)[index]
        first = np.searchsorted(np.repeat(data.document, data.lengths), owner)
        return [
            *zip(data.document_hash[owner].tolist(), (index - first).tolist(), data.ids[index].tolist(), strict=True)
        ]

    assert sampled(data) == sampled(shuffled)


def test_equal_documents_stay_together():
    rows = ragged(10, shortest=20) * 5
    data = from_tokens(rows, seq_len=8)
    for seed in range(10):
        part = assign(data, seed=seed).part
        for hashed in np.unique(data.document_hash):
            documents = np.flatnonzero(data.document_hash == hashed)
            assert len(set(part[np.isin(data.document, documents)].tolist())) == 1


def test_under_twenty_documents_the_unit_is_the_sequence():
    assert assign(from_tokens(ragged(19, shortest=20), seq_len=8)).unit == "sequence"
    assert assign(from_tokens(ragged(20, shortest=20), seq_len=8)).unit == "document"
    part = assign(from_tokens([list(range(800))], seq_len=8)).part
    assert np.bincount(part).tolist() == [66, 9, 25]


def test_ordered_split_scores_the_end():
    part = assign(from_tokens(ragged(30, longest=8), seq_len=8), 0.2, 0.25, "ordered").part
    assert part.tolist() == [0] * 18 + [1] * 6 + [2] * 6


def test_split_refuses():
    data = from_tokens(ragged(30), seq_len=8)
    for arguments, words in (
        ((data, 0.0), "between 0 and 1"),
        ((data, 0.5, 1.0), "between 0 and 1"),
        ((data, 0.5, 0.5, "random"), "unknown"),
        ((data, 0.99, 0.5), "30 different documents"),
        ((from_tokens([[1, 2, 3, 4]], seq_len=2),), "2 different sequences, too few .* at least 3"),
        ((from_tokens([[1, 2]]), 0.25, 0.0), "1 different sequences, too few .* at least 2"),
        ((from_tokens([[1, 2]] * 40),), "1 different documents"),
        ((from_tokens([[1, 2]] * 2), 0.25, 0.1, "ordered"), "2 different sequences"),
    ):
        with pytest.raises(InputError, match=words):
            assign(*arguments)


def test_error_units(monkeypatch):
    data = from_tokens(ragged(30), seq_len=8)
    unit, hashes, kind = error_units(data)
    assert kind == "document"
    np.testing.assert_array_equal(unit, data.document)
    np.testing.assert_array_equal(hashes, data.document_hash)
    few = from_tokens(ragged(5), seq_len=8)
    unit, hashes, kind = error_units(few)
    assert kind == "sequence" and unit.tolist() == list(range(few.num_sequences))
    np.testing.assert_array_equal(hashes, few.sequence_hash)
    monkeypatch.setattr(split_module, "MOST_UNITS", 8)
    unit, hashes, kind = error_units(data)
    assert kind == "document" and 2 <= len(hashes) <= 8 and unit.max() == len(hashes) - 1
    for d in range(30):
        assert len(set(unit[data.document == d].tolist())) == 1
    for group, smallest in enumerate(hashes):
        assert smallest == data.document_hash[np.unique(data.document[unit == group])].min()
    reversed_hashes = error_units(from_tokens(ragged(30)[::-1], seq_len=8))[1]
    np.testing.assert_array_equal(reversed_hashes, hashes)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_width", [False, True])
def test_batches_hold_every_token_once(tmp_path, full_width):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"text": "a b c d " * n}) + "\n" for n in range(1, 9)))
    data = from_text(tmp_path / "r.jsonl", wordpiece(), seq_len=7)
    order = np.random.default_rng(0).permutation(data.num_sequences)
    seen = []
    for batch in batches(data, order, 3, pad_id=99, full_width=full_width):
        assert batch.ids.dtype == torch.int64 and batch.mask.dtype == batch.special.dtype == torch.bool
        longest = data.lengths[batch.sequence.numpy()].max()
        assert batch.ids.shape == batch.mask.shape == batch.special.shape
        assert batch.ids.shape[1] == (7 if full_width else longest)
        assert (batch.ids[~batch.mask] == 99).all() and not batch.special[~batch.mask].any()
        for row, sequence in enumerate(batch.sequence.tolist()):
            start, size = data.starts[sequence], data.lengths[sequence]
            assert batch.mask[row].tolist() == [True] * size + [False] * (batch.mask.shape[1] - size)
            assert batch.ids[row, :size].tolist() == data.ids[start : start + size].tolist()
            assert batch.special[row, :size].tolist() == data.special[start : start + size].tolist()
        seen += batch.sequence.tolist()
    assert seen == order.tolist()


def test_sample_is_seeded_nested_and_even():
    data = from_tokens(np.random.default_rng(0).integers(0, 9, size=(100, 100)))
    sample = sample_tokens(data, 1000, seed=0)
    assert len(set(sample.tolist())) == 1000
    assert sample[:100].tolist() == sample_tokens(data, 100, seed=0).tolist()
    assert sample.tolist() != sample_tokens(data, 1000, seed=1).tolist()
    assert sorted(sample_tokens(data, 10**9, seed=0).tolist()) == list(range(10_000))
    # Uniform over documents and positions: ten in a hundred, standard deviation three.
    assert np.abs(np.bincount(sample // 100, minlength=100) - 10).max() < 16
    assert np.abs(np.bincount(sample % 100, minlength=100) - 10).max() < 16
