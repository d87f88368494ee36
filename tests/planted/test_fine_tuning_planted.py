"""Fine-tuning on data whose answer is known: marks are learned, noise is not, and the test chooses nothing."""

import numpy as np
import pytest
import torch

from families import VOCAB
from labelled_texts import FIRST_FILLER, items, marked, subject, texts, view, word, written
from plants import only
from transect.results import Table
from transect.tasks._fine_tune import Settings, fine_tune, restored
from transect.tasks.fine_tuning import FineTuning
from transect.view import edits
from transect.view.view import View

QUICK = {"lr": 3e-3, "epochs": 6, "batch_size": 16, "seeds": 2}


def rows(data: str, v: View, **options) -> Table:
    task = FineTuning(data=data, **QUICK | options)
    one = subject(v)
    task.check(one)
    return Table(task.rows(one))


def test_a_mark_is_learned_and_the_model_is_as_before(tmp_path):
    v = view("bert")
    before = [tensor.clone() for tensor in v.model.state_dict().values()]
    test = marked(61, 2)
    with edits.remove(v, "ffn", 1):
        table = rows(written(tmp_path, [*marked(149, 1), test[0]], test), v)
    assert all(map(torch.equal, before, v.model.state_dict().values()))
    for seed in (0, 1):
        row = only(table, variant=f"seed {seed}", metric="accuracy")
        assert row.value > 0.9 and row.part.startswith("lr 0.003, epoch ")
        assert (row.n, row.split, row.domain, row.unit) == (61, "test", "made", "1")
        assert row.low <= row.value <= row.high
        assert only(table, variant=f"seed {seed}", metric="macro_f1").value > 0.9
    mean = only(table, variant="mean", metric="accuracy")
    singles = [only(table, variant=f"seed {seed}", metric="accuracy").value for seed in (0, 1)]
    assert mean.value == pytest.approx(np.mean(singles)) and mean.part == "lr 0.003"
    labels = [record["label"] for record in test]
    majority = only(table, variant="majority", metric="accuracy")
    assert majority.value in {labels.count("class 0") / 61, labels.count("class 1") / 61}
    left = only(table, metric="left_out")
    assert (left.value, left.part, left.split) == (1.0, "training text equal to a test text", "train")
    assert len(table) == 2 * 2 + 2 + 2 + 1


def test_noise_is_not_learned(tmp_path):
    generator = np.random.default_rng(0)
    training, test = (
        [record | {"label": f"class {generator.integers(2)}"} for record in marked(count, seed)]
        for count, seed in ((101, 1), (211, 2))
    )
    table = rows(written(tmp_path, training, test), view("gpt2"), epochs=3, seeds=1)
    assert 0.38 < only(table, variant="mean", metric="accuracy").value < 0.62


def test_the_rate_is_chosen_on_the_held_out_part(tmp_path):
    """The test's labels are turned round: a rate chosen there would be the useless one."""
    turned = [record | {"label": f"class {1 - int(record['label'][-1])}"} for record in marked(61, 2)]
    table = rows(written(tmp_path, marked(149, 1), turned), view("bert"), lr=(1e-9, 3e-3), seeds=1)
    row = only(table, variant="mean", metric="accuracy")
    assert row.part == "lr 0.003" and row.value < 0.2


def test_progress_counts_steps_to_the_end(tmp_path):
    v, ticks = view("gpt2"), []
    task = FineTuning(data=written(tmp_path, marked(41, 1), marked(11, 2)), **QUICK | {"epochs": 1, "lr": (1e-3, 1e-4)})
    list(task.rows(subject(v, tick=lambda *given: ticks.append(given))))
    assert ticks == [(number, 12) for number in range(1, 13)]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_right_option_is_learned(tmp_path, name):
    def questions(count: int, seed: int) -> list[dict]:
        generator = np.random.default_rng(seed)
        made = []
        for text, _ in texts(count, seed, marks=(FIRST_FILLER,)):
            gold, choices = int(generator.integers(3)), 3 if generator.integers(2) else 4
            fillers = generator.integers(FIRST_FILLER, VOCAB, choices).tolist()
            options = [f"{word(5 if n == gold else 6)} {word(filler)}" for n, filler in enumerate(fillers)]
            made.append({"question": text, "choices": options, "gold": gold})
        return made

    layout = {"context": "{{ question }}", "options": "choices", "gold": "gold"}
    data = written(tmp_path, questions(97, 1), questions(41, 2), **layout)
    table = rows(data, view(name), seeds=1, epochs=5)
    assert only(table, variant="mean", metric="accuracy").value > 0.9
    assert only(table, variant="majority", metric="accuracy").value < 0.6
    assert not table.where(metric="macro_f1").rows


@pytest.mark.parametrize(("name", "told"), [("bert", "a"), ("bert", "b"), ("gpt2", "a")])
def test_both_texts_of_a_pair_are_read(tmp_path, name, told):
    """The mark that tells the label is in one of them."""

    def pairs(count: int, seed: int) -> list[dict]:
        other = texts(count, seed + 100, marks=(7,), low=2, high=4)
        made = zip(texts(count, seed, low=2, high=4), other, strict=True)
        both = [(first, second, label) for (first, label), (second, _) in made]
        return [{told: first, "ab".strip(told): second, "label": label} for first, second, label in both]

    layout = {"text": "{{ a }}", "second": "{{ b }}", "label": "label"}
    data = written(tmp_path, pairs(149, 1), pairs(61, 3), **layout)
    assert only(rows(data, view(name), seeds=1), variant="mean", metric="accuracy").value > 0.9


def test_more_training_on_an_edited_model_helps_it():
    """What probes do after an edit: the same core under an edit that is open, weights given back at the end."""
    v = view("gpt2")
    training, test = items(v, 97, 1), items(v, 61, 2)
    with edits.swap(v, 0, 1), restored(v):
        tuned = fine_tune(v, training, None, Settings(lr=3e-3, epochs=6, batch_size=16), 0, frozen=("embeddings",))
        assert (tuned.predict(v, test) == test.labels).mean() > 0.8
