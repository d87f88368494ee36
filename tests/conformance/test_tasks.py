"""Every task, on whatever data it reads: rows that say what they are, repeat, and leave the model as it was."""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch

import transect as tx
from corpora import documents, write_texts
from judged import view
from report_rows import assert_valid
from transect import registry, suites
from transect.errors import InputError, NotAtHand
from transect.evaluate import evaluate
from transect.report.page import sections_of
from transect.report.records import to_records
from transect.tasks.base import Subject, Task

NAMES = registry.available("transect.tasks")
TEXTS = ("words.jsonl", "questions", "pairs", "passages", "labels")
SETS = {
    "questions": ("options", "{context: '{{ text }}', options: '[word, other]', gold: '0'}"),
    "pairs": ("minimal_pairs", "{good: '{{ text }} {{ word }}', bad: '{{ word }} {{ text }}'}"),
    "passages": ("cloze", "{text: '{{ text }} {{ word }}'}"),
    "labels": ("labelled", "{text: '{{ text }}', label: word}"),
}
SMALL = {  # options that make a task quick; a task without any is run as it is
    "fine_tuning": {"epochs": 1, "seeds": 2, "lr": 1e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a data set of each kind made of them."""
    path = tmp_path_factory.mktemp("data")
    texts = [" ".join(text.split()[:5]) for text in documents(83, 7, length=9)]
    write_texts(path / "words.jsonl", texts[:7])
    words = ("tree", "river")
    rows = [{"text": f"{text} {('red', 'old')[n % 2]}", "word": words[n % 2], "other": words[1 - n % 2]}
            for n, text in enumerate(texts)]  # fmt: skip
    for split, some in {"train": rows[:60], "test": rows[60:]}.items():
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for name, (kind, layout) in SETS.items():
        (path / f"{name}.yaml").write_text(
            f"description: d\nsource: s\nkind: {kind}\nfiles: {{train: [train.jsonl], test: [test.jsonl]}}\n"
            f"layouts: [{layout}]\n"
        )
    return path


def _task(name: str, folder: Path) -> Task:
    """The task on the first of the data that it takes."""
    reasons = []
    for data in TEXTS:
        given = data if data.endswith(".jsonl") else str(folder / f"{data}.yaml")
        try:
            task = suites.make(name, {"data": given, **SMALL.get(name, {})})
            task.check(Subject(view=view(), folders=(folder,)))
            return task
        except InputError as error:
            reasons.append(str(error))
    raise AssertionError(f"{name} takes none of the test data: {reasons}")


@pytest.mark.parametrize("name", NAMES)
def test_a_task_says_what_it_is(name: str):
    kind = registry.load("transect.tasks", name, Task)
    text = inspect.getdoc(kind) or ""
    # a docstring may go on in that of an abstract task it derives from
    whole = text + "".join(inspect.getdoc(base) or "" for base in kind.__mro__ if base is not object)
    assert kind.title and kind.source and kind.headline[0] and kind.headline[1]
    for part in ("Source:", "Cost:", "Raises:", "Range and unit:"):
        assert part in whole, part
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # pyright: ignore


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_whole_repeat_and_leave_the_model_alone(name: str, folder: Path):
    one = view()
    task = _task(name, folder)
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in one.model.parameters()]
    table = evaluate(one, [task], folders=[folder])
    assert len(table)
    for row in table:
        assert row.task == name and row.model == "gpt2" and row.unit and row.domain and row.config and row.data
        assert row.reason or (row.n and math.isfinite(row.value))
        assert row.metric == "left_out" or re.fullmatch(r".+ \[[0-9a-f]{16}\]", row.data), row.data
        if row.low is not None and row.value is not None:
            assert row.low <= row.value + 1e-12 and row.value <= row.high + 1e-12, row
    assert any(row.value is not None for row in table)
    for section in sections_of(to_records(table)):
        assert section.figures or section.key_rows
        for figure in section.figures:
            assert_valid(figure)
    assert all(torch.equal(value, before[key]) for key, value in one.model.state_dict().items())
    assert [parameter.requires_grad for parameter in one.model.parameters()] == flags
    assert not one.model.training and all(parameter.grad is None for parameter in one.model.parameters())
    assert evaluate(one, [task], folders=[folder]).rows == table.rows


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_that_is_open_is_judged(name: str, folder: Path):
    one = view()
    task = _task(name, folder)
    plain = evaluate(one, [task], folders=[folder])
    with tx.edits.remove(one, "attn", 0), tx.edits.remove(one, "ffn", 0):
        edited = evaluate(one, [task], folders=[folder])
    assert [row.value for row in edited] != [row.value for row in plain]
    assert evaluate(one, [task], folders=[folder]).rows == plain.rows


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_padding_change_nothing(name: str, folder: Path):
    one = view()
    task = _task(name, folder)
    few, many = (evaluate(one, [task], folders=[folder], batch_size=size) for size in (1, 64))
    for left, right in zip(few, many, strict=True):
        assert left.value == pytest.approx(right.value, rel=1e-6, abs=1e-9), left


@pytest.mark.parametrize("name", NAMES)
def test_progress_is_told_and_a_stop_leaves_the_model_whole(name: str, folder: Path):
    one = view()
    task = _task(name, folder)
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    told: list[tuple[int, int]] = []

    def stop(number: int, what: Task, done: int, total: int) -> None:
        told.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(one, [task], folders=[folder], progress=stop)
    assert told and 0 <= told[0][0] <= told[0][1]
    assert all(torch.equal(value, before[key]) for key, value in one.model.state_dict().items())
    assert not one.model.training


@pytest.mark.parametrize("name", NAMES)
def test_data_that_are_missing_are_named(name: str, folder: Path, tmp_path: Path):
    task = _task(name, folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAtHand, match="not at hand"):
        task.check(Subject(view=view(), folders=(tmp_path / "empty",)))
