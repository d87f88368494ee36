"""Rows as TensorBoard reads them, and as Weights & Biases gets them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from report_rows import routing
from training_rows import evaluated, logged, stamp
from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.recipes.recipe import Recipe
from transect.results import Row
from transect.train.tracking import EVENTS, Tracker, check, tag

MODEL = ModelConfig(vocab_size=11, width=8, layers=3)
RECIPE = Recipe(name="small", description="One of a test.", source="none", model=MODEL)
STAND_IN = """
import json

calls = []

class Run:
    def log(self, numbers, step):
        calls.append(("log", step, numbers))
    def finish(self):
        calls.append(("finish",))

def init(**settings):
    if settings["name"] == "refused":
        raise RuntimeError("no key is known\\nlog in")
    calls.append(("init", settings))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The calls that a module in place of wandb was given."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    before = sys.modules.pop("wandb", None)
    import wandb as found

    yield found.calls
    del sys.modules["wandb"]
    if before is not None:
        sys.modules["wandb"] = before


def track(folder: Path, rows: list[Row], step: int = 0, *services: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder, RECIPE, step, services)
    tracker.add(rows)
    tracker.close()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / EVENTS), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_every_value(tmp_path: Path):
    rows = [*evaluated(0, 8.0), *logged(5, 4.0, layers=2), *logged(10, 2.0, layers=2), *evaluated(10, 3.0)]
    track(tmp_path, rows)
    found = curves(tmp_path)
    wanted: dict[str, list[tuple[int, Any]]] = {}
    for row in rows:
        if row.value is not None:
            wanted.setdefault(tag(row), []).append((row.step or 0, pytest.approx(row.value, rel=1e-6)))
    assert found == wanted
    assert found["train/loss/main"] == [(5, 4.0), (10, 2.0)]
    assert found["valid/language_modelling/books/nats_per_token"] == [(0, 8.25), (10, 3.25)]
    assert found["train/stream_norm/resid/layer_02"] == [(5, 12.0), (10, 6.0)]
    assert "train/mfu" not in found  # not known, so there is no point


def test_each_row_of_a_step_has_a_curve_of_its_own():
    rows = [
        *logged(5, 4.0, layers=3, sparse=True),
        *evaluated(5, 8.0),
        *routing(3, 5, split="valid", **stamp(5)),
        *(Row(probe="jump", metric="angular_distance", value=0.5, unit="1", layer=low, layer_to=high, **stamp(5))
          for low in range(3) for high in range(low + 1, 4)),
    ]  # fmt: skip
    tags = [tag(row) for row in rows]
    assert len(set(tags)) == len(tags) and not any(" " in name for name in tags)


def test_a_run_that_goes_on_replaces_what_came_after_its_checkpoint(tmp_path: Path):
    track(tmp_path, [row for step in (10, 20, 30) for row in logged(step, 1.0)])
    track(tmp_path, [row for step in (30, 40) for row in logged(step, 2.0)], 20)
    assert curves(tmp_path)["train/loss/main"] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_a_run_without_a_checkpoint_starts_its_curves_again(tmp_path: Path):
    first = [*evaluated(0, 9.0), *logged(10, 1.0)]
    track(tmp_path, first)
    track(tmp_path, [*evaluated(0, 8.0), *logged(10, 2.0)])
    found = curves(tmp_path)
    assert found["train/loss/main"] == [(10, 2.0)]
    assert found["valid/language_modelling/wiki/nats_per_token"] == [(0, 8.0)]


def test_wandb_gets_the_numbers_of_each_step(tmp_path: Path, wandb: list[Any]):
    rows = [*logged(5, 4.0), *logged(10, 2.0)]
    track(tmp_path / "mine", rows, 0, "wandb")
    (begin, settings), *logs, end = wandb
    assert (begin, settings["project"], settings["name"]) == ("init", "transect", "mine")
    assert settings["config"] == RECIPE.plain() and json.dumps(settings["config"])
    assert [(name, step) for name, step, _ in logs] == [("log", 5), ("log", 10)] and end == ("finish",)
    assert logs[1][2] == {tag(row): row.value for row in rows if row.step == 10 and row.value is not None}
    assert curves(tmp_path / "mine")["train/loss/main"] == [(5, 4.0), (10, 2.0)]


def test_wandb_goes_on_with_the_same_run_and_never_with_another(tmp_path: Path, wandb: list[Any]):
    for folder, step in (("a/run", 0), ("a/run", 10), ("b/run", 0), ("a/run", 0)):
        track(tmp_path / folder, [], step, "wandb")
    first, resumed, other, again = [call[1]["id"] for call in wandb if call[0] == "init"]
    assert first == resumed and len({first, other, again}) == 3
    assert all(call[1]["resume"] == "allow" for call in wandb if call[0] == "init")


def test_wandb_that_does_not_start_is_one_line(tmp_path: Path, wandb: list[Any]):
    with pytest.raises(InputError, match=r"^wandb does not start: no key is known; mend that, or leave it out"):
        track(tmp_path / "refused", [], 0, "wandb")


def test_wandb_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check([])
    for ask in (lambda: check(["wandb"]), lambda: track(tmp_path, [], 0, "wandb")):
        with pytest.raises(
            InputError, match=r"^train\.track asks for wandb, which is not installed; pip install"
        ) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / EVENTS).exists()
