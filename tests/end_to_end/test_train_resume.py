"""A run that is killed, stopped or out of disk goes on as if nothing had been: every later number is the same."""

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from corpora import small_corpus
from sittings import sitting
from transect.errors import InputError
from transect.recipes.recipe import Recipe, load
from transect.results import Row, Table
from transect.train.run import train

STEPS, EVERY = 23, 5
TIMES = ("tokens_per_second", "peak_memory", "mfu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Iterator[Path]:
    """A run with dropout, noise, balance by biases, masks of documents, evaluation and a probe."""
    folder = tmp_path_factory.mktemp("resumed")
    corpus = small_corpus(folder)
    changes = [
        f"data.path={corpus.path}",
        f"model.vocab_size={corpus.card.vocab_size}",
        "model.dropout=0.1",
        "data.seq_len=24",
        f"train.steps={STEPS}",
        "train.micro_batch=3",
        "train.optimizer=muon",
        "train.log_every=1",
        f"train.checkpoints={{every: {EVERY}, keep_last: 2, keep_at: [5]}}",
        f"train.evaluation={{every: {EVERY + 2}, tokens: 500}}",
        "train.probes=[{probe: jump, every: 10, tokens: 200}]",
    ]
    file = folder / "recipe.yaml"
    file.write_text(load("tiny-sparse-bias_balanced", changes).to_yaml())
    yield file
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert sitting(recipe, folder, None, 0, resume=False) == 0
    return numbers(folder)


def numbers(folder: Path) -> list[tuple]:
    """Every number of a run that time has no part in."""

    def of(row: Row) -> tuple:
        words = row.probe, row.metric, row.part, row.layer, row.split, row.domain, row.variant, row.element
        return row.step, row.tokens, *words, row.value, row.stderr, row.reason

    return [of(row) for row in Table.read(folder) if row.metric not in TIMES]


POINTS = sorted(random.Random(20261122).sample(range(1, STEPS), 5))


def test_killed_five_times_at_random_steps(recipe: Path, whole: list, tmp_path: Path):
    folder = tmp_path / "run"
    for place, point in enumerate(POINTS):
        assert sitting(recipe, folder, "kill", point, resume=place > 0) == -signal.SIGKILL
    assert sitting(recipe, folder, None, 0, resume=True) == 0
    assert numbers(folder) == whole and len(whole) > STEPS


@pytest.mark.parametrize("point", [EVERY, 2 * EVERY, STEPS])
def test_killed_while_a_checkpoint_is_written(point: int, recipe: Path, whole: list, tmp_path: Path):
    folder = tmp_path / "run"
    assert sitting(recipe, folder, "writing", point, resume=False) == -signal.SIGKILL
    assert not (folder / f"checkpoints/step-{point:08d}").exists()
    assert sitting(recipe, folder, None, 0, resume=True) == 0
    assert numbers(folder) == whole
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_full_disk_loses_nothing(recipe: Path, whole: list, tmp_path: Path):
    folder = tmp_path / "run"
    assert sitting(recipe, folder, "full", 7, resume=False) == 2
    said = (folder / "error.txt").read_text()
    assert "make room" in said and "--resume" in said and "\n" not in said
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000005"]
    (folder / "error.txt").unlink()
    assert sitting(recipe, folder, None, 0, resume=True) == 0
    assert numbers(folder) == whole


def test_stopped_by_the_machine(recipe: Path, whole: list, tmp_path: Path):
    folder = tmp_path / "run"
    assert sitting(recipe, folder, "stop", 8, resume=False) == 130
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000005", "step-00000008"]
    assert sitting(recipe, folder, None, 0, resume=True) == 0
    assert numbers(folder) == whole


def test_stopped_where_evaluation_and_a_probe_are_due(recipe: Path, whole: list, tmp_path: Path):
    """Step 7 is evaluated and step 10 is measured: what the sitting did not do any more, the next one does."""
    folder = tmp_path / "run"
    for point, resume in ((7, False), (10, True)):
        assert sitting(recipe, folder, "stop in", point, resume) == 130
        assert not [row for row in Table.read(folder) if row.step == point and row.probe != "train"]
    assert sitting(recipe, folder, None, 0, resume=True) == 0
    assert numbers(folder) == whole


def test_after_the_newest_checkpoint_was_deleted_or_damaged(recipe: Path, whole: list, tmp_path: Path):
    folder = tmp_path / "run"
    assert sitting(recipe, folder, "kill", 17, resume=False) == -signal.SIGKILL
    names = [f"step-{step:08d}" for step in (5, 10, 15)]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
    damaged = next((folder / "checkpoints/step-00000015/state").rglob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"step-00000015.*10"):
        train(load(recipe), folder, resume=True)
    shutil.copytree(folder, tmp_path / "other")
    outcome = train(load(recipe), tmp_path / "other", resume_from=10)
    assert outcome.reason == "steps" and numbers(tmp_path / "other") == whole
    shutil.rmtree(folder / "checkpoints/step-00000015")
    train(load(recipe), folder, resume=True)
    assert numbers(folder) == whole


def test_killed_before_the_first_checkpoint(recipe: Path, whole: list, tmp_path: Path):
    folder = tmp_path / "run"
    assert sitting(recipe, folder, "kill", 2, resume=False) == -signal.SIGKILL
    assert sitting(recipe, folder, None, 0, resume=True) == 0
    assert numbers(folder) == whole


def test_what_may_not_change(recipe: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert sitting(recipe, folder, "kill", 7, resume=False) == -signal.SIGKILL

    def refused(words: str, **changed: str) -> None:
        settings = [f"{name.replace('__', '.')}={value}" for name, value in changed.items()]
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=words):
            train(load(recipe, settings), folder, resume=True)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    refused("model.width 24, now 48", model__width="48")
    refused("train.steps 23, now 31", train__steps="31")
    refused("train.seed", train__seed="1")
    other = small_corpus(tmp_path / "other", seed=9)
    refused("other data", data__path=str(other.path))
    with pytest.raises(InputError, match=r"already holds a run.*--resume"):
        train(load(recipe), folder)

    def free(given: Recipe) -> int:
        return given.train.checkpoints.keep_last

    longer = load(recipe, ["train.checkpoints.keep_last=3", "train.max_minutes=90"])
    assert free(longer) == 3 and train(longer, folder, resume=True).reason == "steps"
