"""Fine-tuning and linear probe on a real encoder: what films and newspapers say is told far better than by majority."""

from pathlib import Path

import pytest

from conftest import MATERIAL, require_material
from plants import only
from transect.results import Table
from transect.tasks.base import Subject, Task
from transect.tasks.fine_tuning import FineTuning
from transect.tasks.linear_probe import LinearProbe
from transect.view.view import View

pytestmark = pytest.mark.real


def subject() -> Subject:
    folder = require_material("minilm")
    if not (MATERIAL / "sentiment.jsonl.gz").is_file():
        pytest.skip("material/sentiment.jsonl.gz is not at hand")
    return Subject(view=View.load(folder), folders=(Path(MATERIAL),), batch_size=32)


def judged(task: Task, one: Subject) -> Table:
    task.check(one)
    return Table(task.rows(one))


def test_a_linear_probe_beats_the_majority():
    one = subject()
    options = {"limit_training": 307, "limit_test": 151, "length": 32, "layers": (6,), "ridges": (1.0, 0.1)}
    table = judged(LinearProbe(data="sentiment", **options), one)
    majority = only(table, metric="accuracy", variant="majority").value
    last = only(table, metric="accuracy", layer=6)
    assert last.value > majority + 0.08 and last.low > majority


def test_fine_tuning_beats_the_majority():
    one = subject()
    frozen = ("embeddings", *(f"layer:{layer}" for layer in range(4)))
    options = {"limit_training": 301, "limit_test": 199, "length": 32, "seeds": 1, "epochs": 2, "freeze": frozen}
    table = judged(FineTuning(data="sentiment", lr=3e-4, pool="mean", **options), one)
    majority = only(table, metric="accuracy", variant="majority").value
    row = only(table, metric="accuracy", variant="seed 0")
    assert row.value > majority + 0.08 and row.low > majority
