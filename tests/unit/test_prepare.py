"""Preparing: every document lands where it should, once, whatever the processes; mistakes are one line."""

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from prepared import jsonl, sentence, texts, word_tokenizer
from shell import ENVIRONMENT, contents
from transect.data.card import SPLITS
from transect.data.corpus import WORK, Corpus
from transect.data.encoding import Encoder
from transect.data.learning import learn
from transect.data.making import PrepareConfig, prepare
from transect.errors import InputError

TEXTS = texts(307)


def made(folder: Path, *sources: object, workers: int = 1, skip: bool = False, **given: object) -> Corpus:
    given = {"vocab_size": 300} | given if "tokenizer" not in given else given
    config = PrepareConfig.parse({"sources": tuple(map(str, sources))} | given)
    return prepare(config, folder, workers, skip)


def decoded(corpus: Corpus, split: str) -> dict[str, list[str]]:
    """The text of every document, by domain."""
    tokenizer = corpus.tokenizer()
    found: dict[str, list[str]] = {}
    for domain in corpus.domains(split):
        part = corpus.part(split, domain)
        spans = zip(part.offsets[:-1].tolist(), part.offsets[1:].tolist(), strict=True)
        rows = [part.read(start, end - start).tolist() for start, end in spans]
        assert all(row.count(corpus.card.end_id) == 1 and row[-1] == corpus.card.end_id for row in rows)
        found[domain] = [tokenizer.decode(row[:-1]) for row in rows]
        assert part.bytes.tolist() == [len(text.encode()) for text in found[domain]]
    return found


def every(corpus: Corpus) -> dict[str, dict[str, list[str]]]:
    return {split: decoded(corpus, split) for split in corpus.splits}


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        made(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_text_comes_back_letter_by_letter(tmp_path: Path, kind: str):
    odd = ["  two  blanks\n\n\tand tabs \n", "<|end|> <|pad|><|mask|>", "naïve 日本語 🙂 \u00a0x \u2003y", *TEXTS]
    corpus = made(tmp_path / "c", jsonl(tmp_path / "a.jsonl", odd), tokenizer_kind=kind)
    found = every(corpus)
    assert sorted(found["train"]["a"] + found["valid"]["a"]) == sorted(odd)
    assert corpus.card.unknown_id is None and corpus.card.mask_id is not None and corpus.card.pad_id is not None


def test_valid_is_the_share_asked_for_and_does_not_depend_on_order(tmp_path: Path):
    corpus = made(tmp_path / "c", jsonl(tmp_path / "a.jsonl", TEXTS), valid_fraction=0.2)
    other = made(tmp_path / "d", jsonl(tmp_path / "b.jsonl", TEXTS[::-1]), valid_fraction=0.2)
    valid = every(corpus)["valid"]["a"]
    assert 0.1 * 307 < len(valid) < 0.3 * 307
    assert sorted(valid) == sorted(every(other)["valid"]["b"])
    more = every(made(tmp_path / "e", tmp_path / "a.jsonl", valid_fraction=0.4))["valid"]["a"]
    assert set(valid) < set(more)
    least = made(tmp_path / "f", tmp_path / "a.jsonl", valid_fraction=1e-9)
    assert least.card.splits["valid"]["a"].documents == 1
    none = made(tmp_path / "g", tmp_path / "a.jsonl", valid_fraction=0.0)
    assert none.splits == ("train",) and decoded(none, "train")["a"] == TEXTS


def test_splits_domains_and_kinds_of_files(tmp_path: Path):
    (tmp_path / "books" / "deep").mkdir(parents=True)
    (tmp_path / "books" / "b.txt").write_text(TEXTS[0])
    (tmp_path / "books" / "deep" / "c.md").write_text(TEXTS[1])
    (tmp_path / "books" / ".hidden").write_text("no")
    with gzip.open(tmp_path / "web.jsonl.gz", "wt") as out:
        out.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[2:5]))
    pq.write_table(pa.table({"text": TEXTS[5:8], "kind": ["x", "y/z", "x"]}), tmp_path / "t.parquet")
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress(TEXTS[8].encode()))
    (tmp_path / "a=b.txt").write_text(TEXTS[9])
    corpus = made(
        tmp_path / "c",
        *(tmp_path / name for name in ("books", "web.jsonl.gz", "a=b.txt")),
        f"valid={tmp_path / 'v.txt.gz'}",
        f"ood/law={tmp_path / 't.parquet'}",
        f"train/more={jsonl(tmp_path / 'more.jsonl', TEXTS[10:12])}",
    )
    assert every(corpus) == {
        "train": {"books": TEXTS[:2], "web": TEXTS[2:5], "a=b": [TEXTS[9]], "more": TEXTS[10:12]},
        "valid": {"v": [TEXTS[8]]},
        "ood": {"law": TEXTS[5:8]},
    }


def test_domains_from_a_column(tmp_path: Path):
    labels = ["news/uk", 7, " web "]
    rows = [{"body": text, "kind": labels[i % 3]} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"text_column": "body", "domain_column": "kind", "valid_fraction": 0.0}
    corpus = made(tmp_path / "c", tmp_path / "a.jsonl", **given)
    assert every(corpus)["train"] == {str(label).strip(): TEXTS[i::3] for i, label in enumerate(labels)}
    rows[5]["kind"] = None
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "line 6 of" in (line := refused(tmp_path / "d", tmp_path / "a.jsonl", **given)) and '"kind"' in line


def test_the_speeches_of_the_package(tmp_path: Path):
    corpus = made(tmp_path / "c", "builtin", vocab_size=512)
    sizes = {split: corpus.card.splits[split] for split in SPLITS}
    assert {split: list(domains) for split, domains in sizes.items()} == {
        "train": ["sotu"], "valid": ["sotu"], "ood": ["sotu_1950"]
    }  # fmt: skip
    assert sizes["train"]["sotu"].documents + sizes["valid"]["sotu"].documents == 27
    assert sizes["ood"]["sotu_1950"].documents == 13
    assert not any("Truman" in text or "Internet" in text for text in decoded(corpus, "train")["sotu"])


def test_copies_of_evaluation_text_leave_train_and_only_train(tmp_path: Path):
    rng = np.random.default_rng(9)
    valid, ood = TEXTS[:5], ["short text", *TEXTS[5:9]]
    near = [f"{sentence(rng, 7)} {valid[1].upper()}", ood[2].replace(" ", ",\n")]
    kept = [*TEXTS[20:60], f"{valid[2][:90]} {TEXTS[19]}"]
    train = [kept[0], valid[0], *near, kept[1], "short text", *kept, kept[3]]
    sources = [
        f"train/a={jsonl(tmp_path / 'a.jsonl', train)}",
        f"valid/a={jsonl(tmp_path / 'v.jsonl', [*valid, valid[0]])}",
        f"ood/o={jsonl(tmp_path / 'o.jsonl', [*ood, valid[3]])}",
    ]
    corpus = made(tmp_path / "c", *sources)
    found = every(corpus)
    assert found["train"]["a"] == [kept[0], kept[1], *kept[2:]]
    assert found["valid"]["a"] == [*valid, valid[0]] and found["ood"]["o"] == [*ood, valid[3]]
    removed = corpus.card.removed
    assert (removed.copies_of_evaluation, removed.near_copies_of_evaluation, removed.repeats) == (2, 2, 3)
    repeated = made(tmp_path / "d", *sources, keep_repeats=True)
    assert decoded(repeated, "train")["a"] == [kept[0], kept[1], *kept, kept[3]]
    assert decoded(made(tmp_path / "e", *sources, deduplicate=False), "train")["a"] == train


def test_text_is_normalised_unless_told_otherwise(tmp_path: Path):
    (tmp_path / "a").mkdir()
    raw = ["cafe\u0301\r\nx\x00y\x0c", *TEXTS[:9]]
    file = jsonl(tmp_path / "a.jsonl", raw)
    given = {"valid_fraction": 0.0}
    assert decoded(made(tmp_path / "c", file, **given), "train")["a"][0] == "café\nxy\n"
    assert decoded(made(tmp_path / "d", file, normalise=False, **given), "train")["a"] == raw


def test_the_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transect.data.making._WORTH", 1 << 12)
    monkeypatch.setattr("transect.data.filling._BATCH", 1 << 10)
    monkeypatch.setattr("transect.data.comparing._BATCH", 1 << 10)
    file = jsonl(tmp_path / "a.jsonl", [*TEXTS, *(text[5:] for text in TEXTS)], kind=["a", "b"] * len(TEXTS))
    before = dict(os.environ)
    folders = []
    for workers in (1, 2, 3):
        folders.append(tmp_path / str(workers) / "c")
        made(folders[-1], file, workers=workers, domain_column="kind", valid_fraction=0.1, shard_tokens=1009)
    assert dict(os.environ) == before
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert len(contents(folders[0])) > 20
    for name in contents(folders[0]):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "characters"])
def test_a_learned_tokenizer_does_not_depend_on_hash_tables_or_threads(tmp_path: Path, kind: str):
    code = (
        "import sys; from transect.data.learning import learn; from prepared import texts;"
        f"print(learn({kind!r}, lambda: texts(97), 400).fingerprint)"
    )
    prints = set()
    for seed, threads in (("1", "true"), ("2", "false"), ("3", "true")):
        environment = ENVIRONMENT | {
            "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads, "PYTHONPATH": str(Path(__file__).parents[1])
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=120
        )
        prints.add(done.stdout)
    assert len(prints) == 1
    assert learn(kind, lambda: [*texts(97), "§§§§ " * 997], 400).fingerprint + "\n" not in prints


def test_word_pieces(tmp_path: Path):
    file = jsonl(tmp_path / "a.jsonl", [*TEXTS, "Élan 日本 [SEP] ☃"])
    corpus = made(tmp_path / "c", file, tokenizer_kind="wordpiece", lower_case=True, valid_fraction=0.0)
    tokenizer = corpus.tokenizer()
    card = corpus.card
    assert [card.pad_id, card.unknown_id, card.start_id, card.end_id, card.mask_id] == [0, 1, 2, 3, 4]
    ids = tokenizer("Alder elm", "OAK")
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"])[0] == "[CLS]"
    assert ids["input_ids"].count(3) == 2 and sorted(set(ids["token_type_ids"])) == [0, 1]
    assert tokenizer.decode(ids["input_ids"], skip_special_tokens=True) == "alder elm oak"
    part = corpus.part("train", "a")
    last = part.read(int(part.offsets[-2]), int(part.offsets[-1] - part.offsets[-2]))
    assert np.count_nonzero(last == 3) == 1 and last[-1] == 3 and 2 not in last


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "characters"])
def test_words_looked_up_are_encoded_as_the_whole_text_is(kind: str):
    odd = [
        "a \u00a0b\u2003 c\x1c d\x1f\n\n e  ",
        " \n x",
        "don't  stop!\x1c !?\r\n",
        "日本 語\u3000x",
        "1\u0301 \u0301a",
        "<|end|> ",
    ]
    many = [*odd, *TEXTS[:50]]
    taken = learn(kind, lambda: many, 400)
    encoder = Encoder(taken.rules, taken.end_id, taken.unknown_id, "uint16")
    raw = Tokenizer.from_str(taken.rules)
    raw.encode_special_tokens = True
    for batch in (many, many[::-1]):
        part = encoder([("train", "a", text) for text in batch]).parts["train", "a"]
        expected = [[*raw.encode(text, add_special_tokens=False).ids, taken.end_id] for text in batch]
        assert part.ids.tolist() == [token for row in expected for token in row]
        assert part.lengths.tolist() == list(map(len, expected))


def test_a_taken_tokenizer(tmp_path: Path):
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *words[:500]])}
    tokenizer = word_tokenizer(vocabulary, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(str(tmp_path / "t"))
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    corpus = made(tmp_path / "c", file, tokenizer=str(tmp_path / "t"), valid_fraction=0.0)
    part = corpus.part("train", "a")
    expected = [token for text in TEXTS for token in [*(vocabulary.get(word, 0) for word in text.split()), 1]]
    assert part.read(0, part.tokens).tolist() == expected
    assert corpus.card.splits["train"]["a"].unknown == expected.count(0) > 0
    # The same rules as a bare tokenizer.json: its end is found by name.
    (tmp_path / "bare").mkdir()
    bare = (tmp_path / "t" / "tokenizer.json").rename(tmp_path / "bare" / "tokenizer.json")
    again = made(tmp_path / "d", file, tokenizer=str(bare), valid_fraction=0.0)
    assert again.fingerprint == corpus.fingerprint and again.card.end_id == 1


def test_tokenizers_that_cannot_be_taken(tmp_path: Path):
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    word_tokenizer({"<unk>": 0, "a": 1}, unk_token="<unk>").save_pretrained(str(tmp_path / "endless"))
    line = refused(tmp_path / "c", file, tokenizer=str(tmp_path / "endless"))
    assert "has no end token; set its eos_token" in line
    word_tokenizer({"<unk>": 0, "</s>": 1}, unk_token="<unk>", eos_token="</s>").save_pretrained(
        str(tmp_path / "blind")
    )
    assert "has no token for this text" in refused(tmp_path / "d", file, tokenizer=str(tmp_path / "blind"))
    assert "no tokenizer at" in refused(tmp_path / "e", file, tokenizer=str(tmp_path / "nothing"))
    (tmp_path / "bad.json").write_text("{}")
    assert "cannot open the tokenizer" in refused(tmp_path / "f", file, tokenizer=str(tmp_path / "bad.json"))
    assert "have no use" in refused(tmp_path / "g", file, tokenizer=str(tmp_path / "blind"), vocab_size=300)
    assert "needs at least 259" in refused(tmp_path / "h", file, vocab_size=258)


def test_sources_that_cannot_be_used(tmp_path: Path):
    good = jsonl(tmp_path / "good.jsonl", TEXTS)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "blank.jsonl").write_text('{"text": " \\n"}\n{"text": "\\u0000"}\n')
    (tmp_path / "none").mkdir()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    cases = {
        (f"test/a={good}",): "with the split train, valid, ood or train+valid",
        (f"train/={good}",): "does not fit",
        ("ood/x=builtin",): "write `builtin` alone",
        (tmp_path / "missing.txt",): "no file or folder",
        (tmp_path / "none",): "has no files",
        (tmp_path / "latin.txt",): "latin.txt is not UTF-8 text (byte 2)",
        (tmp_path / "blank.jsonl",): "no document with text",
        (tmp_path / "cut.jsonl.gz",): "cannot read",
        (f"valid/a={good}",): "no train split",
        (f"ood/a={good}",): "no train split",
        (good, good): "is given twice",
        (f"train/a={good}", f"valid/b={jsonl(tmp_path / 'same.jsonl', TEXTS)}"): "is a copy of an evaluation document",
    }
    for number, (sources, words) in enumerate(cases.items()):
        assert words in refused(tmp_path / str(number), *sources)
        assert not (tmp_path / str(number) / "card.json").exists()
    one = jsonl(tmp_path / "one.jsonl", TEXTS[:1])
    assert "1 document and none left for train" in refused(tmp_path / "one", one)
    assert "0" in refused(tmp_path / "w", good, workers=0)
    assert "valid_fraction" in refused(tmp_path / "v", good, valid_fraction=1.5)
    assert 'no "body" string' in refused(tmp_path / "b", good, text_column="body")


def test_without_the_package_datasets_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "transect[data]"' in refused(tmp_path / "c", "hf:some/where")
    assert "hf:NAME:CONFIG:SPLIT" in refused(tmp_path / "c", "hf:")


def test_an_unreadable_file_among_many_is_named_or_skipped(tmp_path: Path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03d}.txt").write_text(text)
    (folder / "100.txt").write_bytes(b"abc\xff")
    (folder / "half.jsonl").write_text('{"text": "this is lost with its file"}\n{"text"')
    line = refused(tmp_path / "c", folder, valid_fraction=0.0)
    assert "100.txt is not UTF-8" in line
    corpus = made(tmp_path / "c", folder, valid_fraction=0.0, skip=True)
    assert decoded(corpus, "train")["many"] == TEXTS[:100] + TEXTS[101:]
    assert [Path(reason.split(" is not ")[0].split()[-1]).name for reason in corpus.card.skipped] == [
        "100.txt", "half.jsonl"
    ]  # fmt: skip


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(tmp_path: Path):
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    corpus = made(tmp_path / "c", file)
    times = {name: (corpus.path / name).stat().st_mtime_ns for name in contents(corpus.path)}
    assert made(tmp_path / "c", file, workers=2).fingerprint == corpus.fingerprint
    assert {name: (corpus.path / name).stat().st_mtime_ns for name in contents(corpus.path)} == times
    assert "vocab_size = 300, now it is 301" in refused(tmp_path / "c", file, vocab_size=301)
    jsonl(file, TEXTS[1:])
    assert "the text of" in refused(tmp_path / "c", file)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert "holds thesis.tex" in refused(tmp_path / "full", file)
    (tmp_path / "file").write_text("x")
    assert "cannot write to" in refused(tmp_path / "file" / "c", file)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path):
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    command = [sys.executable, "-m", "transect", "data", "prepare", str(file), "-o", str(tmp_path / "c")]
    command += ["--vocab-size", "300", "--workers", "1"]
    limit = 20_000  # bytes; the ids take more
    stopped = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert stopped.returncode == 2 and len(stopped.stderr.splitlines()) == 1, stopped.stderr
    assert "cannot write" in stopped.stderr and "make room" in stopped.stderr
    assert (tmp_path / "c" / WORK).is_dir() and not (tmp_path / "c" / "card.json").exists()
    corpus = made(tmp_path / "c", file)
    assert corpus.fingerprint == made(tmp_path / "d", file).fingerprint


def test_text_that_changes_between_two_readings_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    fresh = made(tmp_path / "fresh", file).fingerprint

    def learn_and_change(*arguments: object) -> object:
        taken = learn(*arguments)
        file.write_text(file.read_text().replace(TEXTS[50], TEXTS[50][::-1]))
        return taken

    with monkeypatch.context() as patch:
        patch.setattr("transect.data.making.learn", learn_and_change)
        assert "changed while it was read, at document 50" in refused(tmp_path / "c", file)
    assert made(tmp_path / "c", file).fingerprint != fresh
