"""Which records train, choose and test: no text and no group on two sides, whatever the order of the file."""

from collections import Counter

import pytest
import torch

from labelled_texts import items, marked, subject, tokenizer, view, word, written
from transect.errors import InputError
from transect.tasks._labelled import Example
from transect.tasks._sequences import coded
from transect.tasks.fine_tuning import FineTuning
from transect.tasks.linear_probe import LinearProbe


def task(data: str, **options) -> FineTuning:
    return FineTuning(data=data, **options)


def keys(examples: list[Example]) -> set[int]:
    return {example.key for example in examples}


def test_parts_are_disjoint_and_what_is_left_out_is_counted(tmp_path):
    test = marked(31, 2)
    training = [*marked(97, 1), test[3], {"text": f"  {test[5]['text'].upper()} ", "label": "class 0"}]
    parts = task(written(tmp_path, training, test)).parts(subject(view()))
    assert parts.left_out == {"training text equal to a test text": 2}
    assert len(parts.test) == 31 and len(parts.held_out) == 10 and len(parts.training) == 87
    assert not keys(parts.training) & keys(parts.test) and not keys(parts.training) & keys(parts.held_out)
    assert not keys(parts.held_out) & keys(parts.test)
    assert parts.classes == ("class 0", "class 1")


def test_groups_stay_together(tmp_path):
    training = [record | {"owner": number % 13} for number, record in enumerate(marked(101, 1))]
    test = [record | {"owner": 11 + number % 13} for number, record in enumerate(marked(29, 2))]
    layout = {"text": "{{ text }}", "label": "label", "group": "owner"}
    for held_out in (0.1, 0.3, 0.5):
        parts = task(written(tmp_path, training, test, **layout), held_out=held_out).parts(subject(view()))
        groups = [{example.group for example in part} for part in (parts.training, parts.held_out, parts.test)]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        lost = sum(record["owner"] >= 11 for record in training)
        assert parts.left_out == {"training group of a test text": lost}
        total = len(parts.training) + len(parts.held_out)
        assert total == 101 - lost
        assert abs(len(parts.held_out) - held_out * total) <= max(Counter(r["owner"] for r in training).values())


def test_equal_texts_of_training_are_not_split(tmp_path):
    training = marked(53, 1) * 2
    parts = task(written(tmp_path, training, marked(11, 2)), held_out=0.4).parts(subject(view()))
    assert not keys(parts.training) & keys(parts.held_out)
    assert len(parts.training) + len(parts.held_out) == 106


def test_the_order_of_the_file_does_not_matter(tmp_path):
    training, test = marked(97, 1), marked(31, 2)
    options = {"limit_training": 41, "limit_test": 13}
    forward = task(written(tmp_path, training, test), **options).parts(subject(view()))
    backward = task(written(tmp_path, training[::-1], test[::-1]), **options).parts(subject(view()))
    assert forward == backward
    other = task(written(tmp_path, training, test), **options).parts(subject(view(), seed=1))
    assert keys(other.training) != keys(forward.training)


def test_a_limit_keeps_the_shares_of_classes(tmp_path):
    training = [
        record for record in marked(997, 1, marks=(5, 6, 7)) if record["label"] != "class 2" or hash_of(record) < 3
    ]
    parts = task(written(tmp_path, training, marked(31, 2)), limit_training=61).parts(subject(view()))
    whole = Counter(record["label"] for record in training)
    kept = Counter(example.label for example in (*parts.training, *parts.held_out))
    assert sum(kept.values()) == 61
    for label, count in whole.items():
        assert abs(kept[label] - 61 * count / len(training)) <= 1


def hash_of(record: dict) -> int:
    return len(record["text"]) % 10


def test_held_out_may_be_a_split(tmp_path):
    data = written(tmp_path, marked(31, 1), marked(29, 2))
    path = tmp_path / "made.yaml"
    path.write_text(
        path.read_text().replace("files:", f"files:\n  valid: ['{tmp_path}/valid.jsonl']"), encoding="utf-8"
    )
    (tmp_path / "valid.jsonl").write_text(
        (tmp_path / "train.jsonl").read_text().split("\n")[0] + "\n", encoding="utf-8"
    )
    parts = task(data, held_out="valid").parts(subject(view()))
    assert (len(parts.training), len(parts.held_out), len(parts.test)) == (30, 1, 29)
    assert parts.left_out == {"training text equal to a held-out text": 1}


@pytest.mark.parametrize(
    ("training", "test", "message"),
    [
        ([{"text": "w11"}], [], "label"),
        ([{"text": "w11", "label": None}], [], "has no label"),
        ([{"text": "w11", "label": 0.5}], [], "words or whole numbers"),
        ([{"text": " ", "label": "a"}], [], "empty text"),
        ([{"text": f"w{n}", "label": "a"} for n in range(11, 31)], [{"text": "w41", "label": "a"}], "one class alone"),
        (None, [{"text": "w41", "label": "b"}], "test label 'b'"),
        ([], [], "no records"),
    ],
)
def test_records_that_do_not_fit_are_one_line(tmp_path, training, test, message):
    data = written(tmp_path, marked(31, 1) if training is None else training, test or marked(11, 2))
    with pytest.raises(InputError, match=message) as error:
        task(data).check(subject(view()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": ()}, "at least one of each"),
        ({"seeds": 0}, "at least one of each"),
        ({"held_out": 1.0}, "above 0 and below 1"),
        ({"test": "train"}, "different splits"),
        ({"limit_training": 0}, "limit_training is 0"),
        ({"test": "nowhere"}, "no split 'nowhere'"),
        ({"length": 65}, "takes 8 to 64"),
        ({"length": 3}, "takes 8 to 64"),
        ({"freeze": ("ffn:7",)}, "cannot be frozen"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, options, message):
    data = written(tmp_path, marked(31, 1), marked(11, 2))
    with pytest.raises(InputError, match=message) as error:
        task(data, **({"length": 31} | options)).check(subject(view()))
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_trained_are_refused():
    v = view("gpt2")
    assert task("era").refusal(v) is None
    v.model.to(torch.float16)
    assert "float16 weights" in task("era").refusal(v)
    v.tokenizer = None
    assert "no tokenizer" in task("era").refusal(v)
    assert LinearProbe(data="era").refusal(view("gpt2")) is None


def test_pairs_are_encoded_as_the_tokenizer_does_where_both_sides_are_seen():
    pair = Example((("w11 w12", "w13"),), "0", None)
    (tokens,) = coded(view("bert"), [pair], ["0"], 31).sequences[0]
    assert tokens.ids.tolist() == [1, 11, 12, 2, 13, 2]
    assert tokens.types.tolist() == [0, 0, 0, 0, 1, 1]
    assert tokens.special.tolist() == [True, False, False, True, False, True]


def test_pairs_are_joined_by_the_end_token_where_only_one_side_is_seen():
    pair = Example((("w11 w12", "w13"),), "0", None)
    (tokens,) = coded(view("gpt2"), [pair], ["0"], 31).sequences[0]
    assert tokens.ids.tolist() == [11, 12, 2, 13]
    assert tokens.special.tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_longer_text_is_cut(name):
    long, short = " ".join(map(word, range(11, 41))), "w41 w42"
    examples = [Example(((long, short),), "0", None), Example(((long, ""),), "0", None)]
    both, alone = coded(view(name), examples, ["0"], 13).sequences
    assert len(both[0].ids) == len(alone[0].ids) == 13
    assert {41, 42, 11} <= set(both[0].ids.tolist())
    whole = tokenizer(name == "bert")(long)["input_ids"]
    assert alone[0].ids.tolist()[:12] == whole[:12]


def test_a_text_without_tokens_is_refused():
    v = view("gpt2")
    with pytest.raises(InputError, match="no token"):
        coded(v, [Example((("\u00a0\u2003", ""),), "0", None)], ["0"], 13)


def test_items_are_the_texts(generator):
    v = view("bert")
    made = items(v, 5, 1)
    assert len(made) == 5 and made.classes == 2 and len(set(made.keys.tolist())) == 5
