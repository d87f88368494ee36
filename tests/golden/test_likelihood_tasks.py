"""Likelihood tasks against numbers put together by hand from passes over one sequence at a time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from corpora import documents, write_texts
from judged import causal_nats, masked_nats, tokenizer, view
from transect.errors import InputError
from transect.tasks._encoding import encoded
from transect.tasks.base import Subject
from transect.tasks.cloze import Cloze
from transect.tasks.language_modelling import LanguageModelling
from transect.tasks.minimal_pairs import MinimalPairs
from transect.tasks.options import Options

ITEMS = [
    {"question": "the cat sees", "choices": ["a dog", "a small red bird", "old"], "gold": 1},
    {"question": "never goes to the tree", "choices": ["from the river", "then"], "gold": 0},
    {"question": "house", "choices": ["and then finds", "dog a", "small", "the bird"], "gold": 3},
    {"question": "the old dog hears", "choices": ["river", "the small cat and"], "gold": 1},
]


def _ids(text: str) -> list[int]:
    return encoded(tokenizer(), text)


def _jsonl(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def _set(folder: Path, kind: str, layout: str, records: list[dict], extra: str = "") -> str:
    """A data set of its own in a folder: its YAML and its records."""
    _jsonl(folder / "items.jsonl", records)
    (folder / "mine.yaml").write_text(
        f"description: test\nsource: test\nkind: {kind}\nfiles: {{test: [items.jsonl], train: [items.jsonl]}}\n"
        f"{extra}layouts:\n  - {layout}\n"
    )
    return str(folder / "mine.yaml")


def _options(folder: Path, records: list[dict] = ITEMS) -> str:
    layout = "{context: 'Q: {{ question }}', options: choices, gold: gold}"
    return _set(folder, "options", layout, records, "unconditional: 'A:'\n")


def _rows(task, one, folder: Path, **given) -> dict:
    return {(row.metric, row.variant): row for row in task.rows(Subject(view=one, folders=(folder,), **given))}


def _score(model, before: list[int], asked: list[int]) -> float:
    return sum(causal_nats(model, before, asked))


@pytest.mark.parametrize("batch", [1, 8])
def test_options_by_every_rule(tmp_path: Path, batch: int):
    one = view()
    rows = _rows(Options(data=_options(tmp_path)), one, tmp_path, batch_size=batch)
    right = {rule: [] for rule in ("option", "whole", "option less unconditional")}
    right = {f"{rule}{length}": [] for rule in right for length in ("", " per token", " per character")}
    gold = []
    for item in ITEMS:
        context = f"Q: {item['question']}"
        scores = {rule: [] for rule in right}
        for choice in item["choices"]:
            before, whole = _ids(context), _ids(f"{context} {choice}")
            asked = whole[len(before) :]
            option = _score(one.model, before, asked)
            text = option + _score(one.model, before[:1], before[1:])
            alone = _ids(f"A: {choice}")
            less = option - _score(one.model, _ids("A:"), alone[len(_ids("A:")) :])
            lengths = (len(asked), len(choice)), (len(whole) - 1, len(f"{context} {choice}")), (len(asked), len(choice))
            for rule, total, (tokens, characters) in zip(
                ("option", "whole", "option less unconditional"), (option, text, less), lengths, strict=True
            ):
                for word, by in (("", 1), (" per token", tokens), (" per character", characters)):
                    scores[rule + word].append(total / by)
        for rule, found in scores.items():
            right[rule].append(int(np.argmax(found)) == item["gold"])
        powers = np.exp(np.array(scores["option"]))
        gold.append(powers[item["gold"]] / powers.sum())
    for rule, hits in right.items():
        assert rows["accuracy", f"0-shot: {rule}"].value == pytest.approx(np.mean(hits), abs=1e-12), rule
    assert len({np.mean(hits) for hits in right.values()}) > 1  # the rules do differ on these items
    assert rows["gold_probability", "0-shot"].value == pytest.approx(np.mean(gold), abs=1e-9)
    assert rows["accuracy", "chance"].value == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    best = max(right, key=lambda rule: np.mean(right[rule]))
    assert rows["accuracy", f"0-shot: best ({best})"].value == pytest.approx(np.mean(right[best]))
    assert rows["accuracy", "0-shot: option"].n == len(ITEMS)


def test_rows_name_the_items_they_are_of(tmp_path: Path):
    one, data = view(), _options(tmp_path)
    names = [
        {row.data for row in task.rows(Subject(view=one, folders=(tmp_path,)))}
        for task in (Options(data=data), Options(data=data, unconditional=False), Options(data=data, limit=3))
    ]
    assert [len(found) for found in names] == [1, 1, 1]
    assert names[0] == names[1] != names[2] and next(iter(names[0])).startswith("mine [")


def test_first_shots_stand_before_the_item(tmp_path: Path):
    one = view()
    records = [*ITEMS, *(record | {"question": record["question"] + " and"} for record in ITEMS)]
    rows = _rows(Options(data=_options(tmp_path, records), shots=2, order="first"), one, tmp_path)
    shown = [f"Q: {item['question']} {item['choices'][item['gold']]}\n\n" for item in records]
    right = []
    for number, item in enumerate(records):
        shots = [text for place, text in enumerate(shown) if place != number][:2]
        context = "".join(shots) + f"Q: {item['question']}"
        scores = []
        for choice in item["choices"]:
            before, whole = _ids(context)[-64:], _ids(f"{context} {choice}")
            asked = whole[len(_ids(context)) :]
            scores.append(_score(one.model, [*before, *asked][-65:][: -len(asked)], asked))
        right.append(int(np.argmax(scores)) == item["gold"])
    assert rows["accuracy", "2-shot: option"].value == pytest.approx(np.mean(right))


def test_drawn_shots_follow_from_the_seed_and_leave_the_item_out(tmp_path: Path):
    one = view()
    data, seen = _options(tmp_path), {}
    for seed in (0, 0, 1):
        task, subject = Options(data=data, shots=2), Subject(view=one, folders=(tmp_path,), seed=seed)
        from transect.tasks._items import option_items
        from transect.tasks._sets import data_set

        items = option_items(data_set(data, "options"), list(enumerate(ITEMS)))
        made = [tuple(task._shots(subject, items, "\n\n", draw)) for draw in range(3)]
        for shots, item in zip(zip(*made, strict=True), ITEMS, strict=True):
            assert all(item["question"] not in text and text.count("Q:") == 2 for text in shots)
        assert len(set(made)) == 3  # draws differ
        assert seen.setdefault(seed, made) == made
    assert seen[0] != seen[1]


def test_contexts_that_differ_are_scored_by_the_same_continuation(tmp_path: Path):
    one = view()
    records = [
        {
            "sentence": "the cat sees the dog and _ goes to the house",
            "option1": "cat",
            "option2": "bird",
            "answer": "2",
        },
        {"sentence": "a tree or _ never finds", "option1": "a river", "option2": "the dog", "answer": "1"},
    ]
    _jsonl(tmp_path / "winogrande_validation.jsonl", records)
    rows = _rows(Options(data="winogrande", unconditional=False), one, tmp_path)
    right = []
    for record in records:
        head, tail = record["sentence"].split("_")
        scores = []
        for option in (record["option1"], record["option2"]):
            before, whole = _ids(head + option), _ids(head + option + tail)
            scores.append(_score(one.model, before, whole[len(before) :]))
        right.append(int(np.argmax(scores)) == int(record["answer"]) - 1)
    assert rows["accuracy", "0-shot: option"].value == np.mean(right)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_minimal_pairs_by_file_and_over_files(tmp_path: Path, name: str):
    one = view(name)
    (tmp_path / "blimp").mkdir()
    texts = documents(20, 3, length=5)
    files = {"first": texts[:12], "second": texts[12:]}
    want, counts = {}, {}
    for file, own in files.items():
        pairs = [{"sentence_good": good, "sentence_bad": bad} for good, bad in zip(own[::2], own[1::2], strict=True)]
        _jsonl(tmp_path / "blimp" / f"{file}.jsonl", pairs)
        hits = []
        for pair in pairs:
            totals = []
            for sentence in pair.values():
                ids = _ids(sentence)
                if name == "bert":
                    words = tokenizer(wrapped=True)
                    whole = [words.bos_token_id, *ids, words.eos_token_id]
                    totals.append(sum(masked_nats(one.model, whole, range(1, 1 + len(ids)), words.mask_token_id)))
                else:
                    totals.append(_score(one.model, [tokenizer().bos_token_id], ids))
            hits.append(totals[0] > totals[1])
        want[file], counts[file] = float(np.mean(hits)), len(hits)
    subject = Subject(view=one, folders=(tmp_path,))
    rows = {(row.part, row.variant): row for row in MinimalPairs(data="blimp").rows(subject)}
    for file in files:
        assert rows[file, "whole"].value == pytest.approx(want[file]) and rows[file, "whole"].n == counts[file]
    whole = rows[None, "whole"]
    assert len({row.data for row in rows.values()}) == 3  # of each file, and of all
    assert whole.value == pytest.approx(np.mean(list(want.values()))) and whole.n == 10
    assert whole.stderr == pytest.approx(np.hypot(*(rows[file, "whole"].stderr for file in files)) / 2)


def test_cloze_asks_for_the_last_word(tmp_path: Path):
    one = view()
    passages = [" ".join(text.split()[:7]) for text in documents(7, 11)]
    _jsonl(tmp_path / "lambada_test.jsonl", [{"text": text} for text in passages])
    rows = _rows(Cloze(data="lambada"), one, tmp_path)
    nats = []
    for text in passages:
        before = _ids(text.rpartition(" ")[0])
        nats.append(_score(one.model, before, _ids(text)[len(before) :]))
    assert rows["nats_per_word", None].value == pytest.approx(-np.mean(nats), abs=1e-9)
    assert rows["perplexity", None].value == pytest.approx(math.exp(-np.mean(nats)), rel=1e-9)
    low, high = rows["perplexity", None].low, rows["perplexity", None].high
    assert low == pytest.approx(math.exp(rows["nats_per_word", None].low)) and high > rows["perplexity", None].value


@pytest.mark.parametrize(("length", "stride"), [(13, None), (13, 5), (64, None)])
def test_language_modelling_asks_for_every_token_once(tmp_path: Path, length: int, stride: int | None):
    one = view()
    texts = documents(5, 17, length=20)
    write_texts(tmp_path / "mine.jsonl", texts)
    task = LanguageModelling(data="mine.jsonl", length=length, stride=stride)
    rows = _rows(task, one, tmp_path)
    nats = tokens = size = 0
    for text in texts:
        ids = _ids(text)
        begin = done = 0
        while done < len(ids):
            end = min(begin + length, len(ids))
            lead = [tokenizer().bos_token_id] if begin == 0 else [ids[begin - 1]]
            before = [*lead, *ids[begin:done]]
            nats -= _score(one.model, before, ids[done:end])
            done, begin = end, begin + (stride or length)
        tokens += len(ids)
        size += len(text.encode())
    how = f"window {length}, stride {stride or length}"
    assert rows["nats_per_token", how].value == pytest.approx(nats / tokens, abs=1e-9)
    assert rows["bits_per_byte", how].value == pytest.approx(nats / size / math.log(2), abs=1e-9)
    assert rows["nats_per_token", how].n == tokens and rows["nats_per_token", how].documents == 5
    assert rows["nats_per_token", how].split == "ood" and rows["nats_per_token", how].domain == "mine"


def test_masked_language_modelling_of_all_tokens_and_of_a_share(tmp_path: Path):
    one, words = view("bert"), tokenizer(wrapped=True)
    texts = documents(3, 19, length=9)
    write_texts(tmp_path / "mine.jsonl", texts)
    nats = tokens = 0
    for text in texts:
        ids = [words.bos_token_id, *_ids(text), words.eos_token_id]
        nats -= sum(masked_nats(one.model, ids, range(1, len(ids) - 1), words.mask_token_id))
        tokens += len(ids) - 2
    rows = _rows(LanguageModelling(data="mine.jsonl", masked_share=1.0), one, tmp_path)
    row = rows["nats_per_token", "100% hidden one by one"]
    assert row.value == pytest.approx(nats / tokens, abs=1e-9) and row.n == tokens
    bits = rows["bits_per_byte", "100% hidden one by one"].value
    assert bits == pytest.approx(nats / sum(len(text.encode()) for text in texts) / math.log(2), abs=1e-9)
    share = _rows(LanguageModelling(data="mine.jsonl", masked_share=0.3), one, tmp_path)
    row = share["nats_per_token", "30% hidden one by one"]
    assert 0.15 * tokens < row.n < 0.45 * tokens
    other = _rows(LanguageModelling(data="mine.jsonl", masked_share=0.3), one, tmp_path, seed=1)
    assert other["nats_per_token", "30% hidden one by one"].value != row.value
    write_texts(tmp_path / "mine.jsonl", texts[:1])  # of one document the bytes are its own times the share asked for
    share = _rows(LanguageModelling(data="mine.jsonl", masked_share=0.3), one, tmp_path)
    bits, each = (share[name, "30% hidden one by one"].value for name in ("bits_per_byte", "nats_per_token"))
    size = len(texts[0].encode()) * math.log(2)
    assert bits / each == pytest.approx(len(_ids(texts[0])) / size, abs=1e-9)


def test_text_is_cut_alike_for_every_model(tmp_path: Path):
    texts = [f"{'word ' * 40}{number}" for number in range(11)]
    write_texts(tmp_path / "mine.jsonl", texts)
    one = view()
    whole = _rows(LanguageModelling(data="mine.jsonl", limit_bytes=500, document_bytes=100), one, tmp_path)
    row = whole["nats_per_token", "window 64, stride 64"]
    assert row.documents == 6  # five of at most 100 bytes do not reach 500, as each is cut at a blank
    write_texts(tmp_path / "mine.jsonl", texts[::-1])
    again = _rows(LanguageModelling(data="mine.jsonl", limit_bytes=500, document_bytes=100), one, tmp_path)
    assert again == whole


def test_edits_that_are_open_are_judged(tmp_path: Path):
    from transect.view import edits

    one = view()
    data = _options(tmp_path)
    plain = _rows(Options(data=data), one, tmp_path)["gold_probability", "0-shot"].value
    with edits.remove(one, "ffn", 1):
        edited = _rows(Options(data=data), one, tmp_path)["gold_probability", "0-shot"].value
        before, whole = _ids("Q: house"), _ids("Q: house small")
        with torch.no_grad():
            want = _score(one.model, before, whole[len(before) :])
        reader_score = sum(causal_nats(one.model, before, whole[len(before) :]))
    assert edited != plain and want == pytest.approx(reader_score)
    assert _rows(Options(data=data), one, tmp_path)["gold_probability", "0-shot"].value == plain


WRONG = {
    "no right option": ({"question": "a", "choices": ["b", "c"], "gold": 2}, "record 0 of mine.*right option 2"),
    "one option": ({"question": "a", "choices": ["b"], "gold": 0}, "1 options"),
    "no gold": ({"question": "a", "choices": ["b", "c"]}, "record 0 of mine: 'gold'"),
    "too long": ({"question": "a", "choices": ["b", "zq " * 99], "gold": 0}, "more than the 64"),
    "empty": ({"question": "a", "choices": ["b", ""], "gold": 0}, "option without text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_cannot_be_scored_are_refused(tmp_path: Path, case: str):
    record, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        Options(data=_options(tmp_path, [record])).check(Subject(view=view(), folders=(tmp_path,)))
