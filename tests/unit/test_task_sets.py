"""Data sets of tasks: every shipped one reads its layouts, files are found, records are read from any format."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transect.errors import InputError, NotAtHand
from transect.tasks import _records, _sets
from transect.tasks._items import limited, option_items

LAYOUTS = {  # records of every layout, official ones and those of common copies, and what they are read as
    "hellaswag": (
        {
            "ctx_a": "A man [header] stands.", "ctx_b": "he", "activity_label": "Roof", "label": "1",
            "endings": ["runs [title] far", "jumps", "x", "y"], "ctx": "unused",
        },
        ("Roof: A man stands. He", ["runs. far", "jumps", "x", "y"], 1),
    ),
    "piqa": ({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}, ("Question: g\nAnswer:", ["a", "b"], 1)),
    "arc_easy": (
        {
            "question": {"stem": "q", "choices": [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]},
            "answerKey": "2",
        },
        ("Question: q\nAnswer:", ["x", "y"], 1),
    ),
    "arc_challenge": (
        {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        ("Question: q\nAnswer:", ["x", "y", "z"], 2),
    ),
    "openbookqa": (
        {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        ("q", ["x", "y"], 0),
    ),
    "commonsense_qa": (
        {"question": {"stem": "q", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
         "answerKey": "B"},
        ("Question: q\nAnswer:", ["x", "y"], 1),
    ),
    "copa": (
        {"premise": "It rained.", "choice1": "We left.", "choice2": "I ran.", "question": "cause", "label": 0},
        ("It rained because", ["we left.", "i ran."], 0),
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        ("P.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1),
    ),
    "bigbench": ({"input": "Q", "target_scores": {"x": 0, "y": 1}}, ("Q", ["x", "y"], 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_options_of_a_layout(name: str):
    record, (context, options, gold) = LAYOUTS[name]
    (item,) = option_items(_sets.data_set(name, "options"), [(0, record)])
    assert [before for before, _ in item.pairs] == [context] * len(options)
    assert [text for _, text in item.pairs] == [f" {option}" for option in options]
    assert (list(item.options), item.gold) == (options, gold)


@pytest.mark.parametrize("name", _sets.names())
def test_every_shipped_set_is_described_and_parsed(name: str):
    one = next(_sets.data_set(name, kind) for kind in [_sets._parsed(_sets._file(name)).kind])
    assert one.description.endswith(".") and one.source and "test" in one.files
    assert all(patterns for patterns in one.files.values())


@pytest.mark.parametrize("name", ["continuation", "word_order", "last_word", "era", "next_sentence"])
def test_builtin_sets_have_items_that_fit_and_stay_the_same(name: str):
    one = _sets._parsed(_sets._file(name))
    for split in one.files:
        records = one.records(split, ())
        assert len(records) > 200 and records == one.records(split, ())
        made = [one.read(record, number) for number, record in enumerate(records)]
        assert all(made)
        if name == "continuation":
            for item in made:
                lengths = sorted(len(option) for option in item["options"])
                assert len(set(item["options"])) == 4 and lengths[-1] - lengths[0] < 40
            golds = [item["gold"] for item in made]
            assert all(0.2 < golds.count(place) / len(golds) < 0.3 for place in range(4))
            for ends in (max, min):  # length gives nothing away
                best = [ends(len(option) for option in item["options"]) for item in made]
                at = [[len(o) for o in item["options"]] for item in made]
                right = [
                    (lengths[item["gold"]] == end) / lengths.count(end)
                    for item, lengths, end in zip(made, at, best, strict=True)
                ]
                assert 0.15 < sum(right) / len(right) < 0.28  # no rule by length is much better than chance
        if name == "word_order":
            assert all(
                sorted(item["good"].split()) == sorted(item["bad"].split()) and item["good"] != item["bad"]
                for item in made
            )
        if name == "last_word":
            assert all(item["text"].split()[-1] in item["text"].rpartition(" ")[0] for item in made)
    if one.kind == "labelled":
        groups = [{one.read(r, 0)["group"] for r in one.records(split, ())} for split in ("train", "test")]
        assert not groups[0] & groups[1]
        labels = [one.read(record, 0)["label"] for record in one.records("train", ())]
        assert all(labels.count(label) > len(labels) / 8 for label in set(labels))


def test_splits_of_one_file_do_not_meet(tmp_path: Path):
    records = [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(211)]
    (tmp_path / "sentiment.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    one = _sets.data_set("sentiment", "labelled")
    train, test = (one.records(split, [tmp_path]) for split in ("train", "test"))
    assert len(train) + len(test) == 211 and 20 < len(test) < 70
    assert not {r["text"] for r in train} & {r["text"] for r in test}


def test_labels_beside_the_records(tmp_path: Path):
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": "g", "sol1": "a", "sol2": "b"}] * 2
    (tmp_path / "piqa" / "valid.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    labels = tmp_path / "piqa" / "valid-labels.lst"
    labels.write_text("1\n0\n")
    one = _sets.data_set("piqa", "options")
    assert [r["label"] for r in one.records("test", [tmp_path])] == ["1", "0"]
    labels.write_text("1\n")
    with pytest.raises(InputError, match="1 labels for the 2 records"):
        one.records("test", [tmp_path])


def test_a_table_without_a_head_line(tmp_path: Path):
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "dev.tsv").write_text('gj04\t1\t\tThey "drank it.\ngj04\t0\t*\tThey drank the.\n')
    one = _sets.data_set("glue_cola", "labelled")
    made = [one.read(record, number) for number, record in enumerate(one.records("test", [tmp_path]))]
    assert made == [{"text": 'They "drank it.', "label": "1"}, {"text": "They drank the.", "label": "0"}]
    (tmp_path / "CoLA" / "dev.tsv").write_text("sentence\tlabel\nThey drank it.\t1\n")
    with pytest.raises(InputError, match=r"dev\.tsv: record 1 has not the 4 columns origin, label, mark, sentence"):
        one.records("test", [tmp_path])


def test_hugging_face_data_sets_are_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = {"country": ["France", "Spain"], "capital": ["Paris", "Madrid"], "others": [["Lyon"], ["Vigo"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "capitals")
    (tmp_path / "mine.yaml").write_text(
        f"description: d\nsource: s\nkind: options\nfiles: {{test: ['hf:{tmp_path / 'capitals'}']}}\n"
        "layouts: [{context: 'Of {{ country }}', options: '[capital] + others', gold: '0'}]\n"
    )
    one = _sets.data_set(str(tmp_path / "mine.yaml"), "options")
    items = option_items(one, list(enumerate(one.records("test", ()))))
    assert [item.options for item in items] == [("Paris", "Lyon"), ("Madrid", "Vigo")]
    with pytest.raises(InputError, match="cannot open hf:"):
        _records.hugging_face(f"hf:{tmp_path / 'absent'}")


def test_records_of_every_format(tmp_path: Path):
    rows = [{"text": 'a "quoted", word', "label": "x"}, {"text": "b\ttab", "label": "y"}]
    made = {
        "r.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "r.json": json.dumps(rows),
        "examples.json": json.dumps({"examples": rows}),
        "r.csv": 'text,label\n"a ""quoted"", word",x\nb\ttab,y\n',
    }
    for name, text in made.items():
        (tmp_path / name).write_text(text)
        assert _records.read(tmp_path / name) == rows, name
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as handle:
        handle.write(made["r.jsonl"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert _records.read(tmp_path / "z.jsonl.gz") == _records.read(tmp_path / "r.parquet") == rows
    (tmp_path / "r.tsv").write_text('text\tlabel\na "lone quote\tx\n')
    assert _records.read(tmp_path / "r.tsv") == [{"text": 'a "lone quote', "label": "x"}]
    (tmp_path / "clinc.json").write_text(json.dumps({"train": [["a", "x"]], "test": [["b", "y"]]}))
    assert _records.read(tmp_path / "clinc.json")[1] == {"text": "b", "label": "y", "split": "test"}


WRONG_FILES = {
    "a.jsonl": ('{"text": 1}\n{"text"', "line 2"),
    "b.jsonl": ("[1, 2]\n", "line 1"),
    "c.json": ("{", "cannot read"),
    "d.json": ('{"a": 1}', "no list of records"),
    "e.txt": ("text", "no .jsonl"),
    "f.jsonl.gz": ("no gzip", "cannot read"),
    "g.parquet": ("no parquet", "cannot read"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_are_no_records(tmp_path: Path, name: str):
    text, message = WRONG_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        _records.read(tmp_path / name)


def test_files_are_found_by_pattern_and_folder(tmp_path: Path):
    for name in ("other/dev.jsonl", "winogrande_1.1/dev.jsonl", "winogrande_1.1/train_xl.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    files = _sets.data_set("winogrande", "options").files
    assert _records.located(files["test"], [tmp_path]) == tmp_path / "winogrande_1.1/dev.jsonl"
    assert _records.located([str(tmp_path / "other/dev.jsonl")], []) == tmp_path / "other/dev.jsonl"
    assert _records.located(files["test"], []) is None
    with pytest.raises(NotAtHand, match=r"winogrande is not at hand.*--data"):
        _records.found(files["test"], [tmp_path / "other"], "winogrande")


def test_sets_that_are_not_there():
    with pytest.raises(InputError, match=r"unknown data set 'hellswag'; did you mean 'hellaswag'"):
        _sets.data_set("hellswag", "options")
    with pytest.raises(InputError, match="a set of cloze, not of options"):
        _sets.data_set("lambada", "options")
    with pytest.raises(InputError, match="no data set file"):
        _sets.data_set("no/such.yaml", "options")


def test_templates_cannot_reach_python(tmp_path: Path):
    text = (
        "description: d\nsource: s\nkind: cloze\nfiles: {test: [x.jsonl]}\nlayouts: [{text: \"{{ ''.__class__ }}\"}]\n"
    )
    (tmp_path / "bad.yaml").write_text(text)
    one = _sets.data_set(str(tmp_path / "bad.yaml"), "cloze")
    with pytest.raises(InputError, match="record 0 of bad"):
        one.read({"text": "a"}, 0)


def test_limited_keeps_the_same_records_for_everyone():
    records = [{"n": n} for n in range(101)]
    few, more = limited(records, 7), limited(records, 31)
    assert len(few) == 7 and set(n for n, _ in few) < set(n for n, _ in more)
    assert [n for n, _ in few] == sorted(n for n, _ in few) and limited(records, None)[100] == (100, {"n": 100})
