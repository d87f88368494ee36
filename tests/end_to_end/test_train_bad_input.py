"""Whatever can be wrong with a training run: one line, exit code 2, nothing written and nothing lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corpora import documents, small_corpus, write_texts
from shell import Outcome, command, contents
from transect.data.corpus import Corpus
from transect.models.build import build
from transect.recipes.recipe import load
from transect.results import Table

VOCABULARY = ("--set", "model.vocab_size=300")
USUAL = ("data.seq_len=24", "train.steps=3", "model.vocab_size=300")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Corpus | Path, output: Path, *changes: object, recipe: object = "tiny-llama-10m") -> Outcome:
    path = corpus.path if isinstance(corpus, Corpus) else corpus
    sets = [word for change in (*USUAL, *changes) for word in ("--set", change)]
    return command("train", recipe, "-o", output, "--data", path, *sets)


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("transect: ") and outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.out + outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown setting": (["train.stpes=3"], ("train.stpes", "did you mean 'steps'")),
    "unknown optimizer": (["train.optimizer=adamm"], ("optimizer", "'adamm'", "adamw", "muon")),
    "wrong rate": (["train.optimizer.lr=0"], ("train.optimizer.lr", "greater than 0")),
    "steps and tokens": (["train.tokens=99"], ("train.tokens", "not both")),
    "no length": (["train.steps=null"], ("how long to train", "train.steps=N")),
    "unknown split": (["train.evaluation.splits=[test]"], ("'test'", "train, valid, ood")),
    "unknown probe": (["train.probes=[{probe: jmp, every: 2}]"], ("train.probes.0", "'jmp'", "jump")),
    "unknown option of a probe": (
        ["train.probes=[{probe: jump, every: 2, options: {windoes: 3}}]"],
        ("train.probes.0", "'windoes'", "did you mean"),
    ),
    "probe on a domain that is not there": (
        ["train.probes=[{probe: jump, every: 2, domain: news}]"],
        ("train.probes.0", "'news'", "words"),
    ),
    "probe that does not suit the model": (["train.probes=[{probe: routing, every: 2}]"], ("routing",)),
    "too long for the text": (["model.max_positions=9000000", "data.seq_len=8000000"], ("8000000", "tokens")),
    "a step larger than the text": (["train.batch_size=100000"], ("100000", "train.batch_size")),
    "vocabulary too small": (["model.vocab_size=7"], ("7", "vocab")),
    "more processes than there are": (["parallel.tensor=2"], ("parallel", "tensor 2", "1 process")),
    "wandb that is not there": (["train.track=[wandb]"], ("wandb", "pip install")),
    "unknown precision": (["train.precision=half"], ("train.precision", "'half'", "bfloat16")),
    "horizon inside the warm-up": (["train.schedule={warmup: 2, horizon: 1}"], ("horizon", "warm-up")),
    "pattern that fits nothing": (["train.optimizer.rates={nothing.*: 0.1}"], ("'nothing.*'",)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name: str, corpus: Corpus, tmp_path: Path):
    changes, words = WRONG[name]
    refused(train(corpus, tmp_path / "run", *changes), *words)
    assert contents(tmp_path) == set()


def test_folders_that_are_no_corpus(corpus: Corpus, tmp_path: Path):
    refused(train(tmp_path / "nowhere", tmp_path / "run"), "nowhere", "transect data prepare")
    (tmp_path / "empty").mkdir()
    refused(train(tmp_path / "empty", tmp_path / "run"), "empty", "transect data prepare")
    refused(command("train", "tiny-llama-10m", "-o", tmp_path / "run"), "no data", "--data")
    refused(command("train", "tiny-llama-10m", "--data", corpus.path), "-o FOLDER")
    refused(train(corpus, tmp_path / "run", recipe="tiny-lama-10m"), "tiny-lama-10m", "did you mean")
    assert contents(tmp_path) == set()


def _cut_shard(folder: Path) -> None:
    shard = next((folder / "train").rglob("00000.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])


def _edit_shard(folder: Path) -> None:
    shard = next((folder / "train").rglob("00000.bin"))
    shard.write_bytes(b"\0\0" + shard.read_bytes()[2:])


def _edit_card(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    card["end_id"] += 1
    (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize("edit", [_cut_shard, _edit_card], ids=["shorter", "card"])
def test_an_edited_data_folder(edit: Callable[[Path], None], corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.path, tmp_path / "data")
    edit(tmp_path / "data")
    refused(train(tmp_path / "data", tmp_path / "run"), "data", "prepare")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("edit", [_cut_shard, _edit_shard, _edit_card], ids=["shorter", "same size", "card"])
def test_a_data_folder_edited_before_going_on(edit: Callable[[Path], None], corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.path, tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "run", "train.max_minutes=0.0000001").code == 0
    edit(tmp_path / "data")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refused(command("train", tmp_path / "run", "--resume", "--max-minutes", "9"), "data")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_other_data_at_the_same_place(corpus: Corpus, tmp_path: Path):
    shutil.copytree(corpus.path, tmp_path / "data")
    assert train(tmp_path / "data", tmp_path / "run", "train.max_minutes=0.0000001").code == 0
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(small_corpus(tmp_path / "other", seed=8).path, tmp_path / "data")
    refused(command("train", tmp_path / "run", "--resume"), "other data", corpus.fingerprint)


def test_a_run_that_is_there(corpus: Corpus, tmp_path: Path):
    assert train(corpus, tmp_path / "run").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    refused(train(corpus, tmp_path / "run"), "already holds a run", "--resume")
    refused(command("train", tmp_path / "run"), "holds a run", "--resume")
    refused(command("train", tmp_path / "run", "--resume-from", 2), "step 2", "it has 3")
    refused(command("train", tmp_path / "run", "--resume", "--set", "model.width=48"), "model.width", "24", "48")
    refused(
        command("train", "tiny-llama-10m", "-o", tmp_path / "new", "--data", corpus.path, "--resume", *VOCABULARY),
        "no run",
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = command("train", tmp_path / "run", "--resume")  # finished: nothing is left to do, nothing is lost
    assert again.code == 0 and Table.read(tmp_path / "run").rows


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to(corpus: Corpus, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(train(corpus, tmp_path / "locked/run"), "cannot write to", "another folder")


def test_a_file_in_the_place_of_the_folder(corpus: Corpus, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    refused(train(corpus, tmp_path / "file/run"), "cannot write to", "another folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    refused(train(corpus, tmp_path / "full"), "not empty")
    assert (tmp_path / "file").read_text() == (tmp_path / "full/letter.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite(corpus: Corpus, tmp_path: Path):
    changes = ["train.optimizer.lr=1e30", "train.clip=null", "train.bad_steps=4", "train.steps=50", "train.log_every=1"]
    refused(train(corpus, tmp_path / "run", *changes), "not finite in 4 steps in a row", "lower the learning rate")
    rows = Table.read(tmp_path / "run")
    norms = rows.where(metric="gradient_norm", part=None)
    missing = [row for row in norms if row.value is None]
    assert missing == norms.rows[-4:] and all("not finite" in row.reason for row in missing)
    last = rows.where(metric="skipped_steps").rows[-1]
    assert last.value == 4
    kept = list((tmp_path / "run/checkpoints").iterdir())
    assert len(kept) == 1 and kept[0].name == f"step-{last.step:08d}"


def test_a_single_bad_step_is_skipped_and_counted(corpus: Corpus, tmp_path: Path, monkeypatch):
    from transect.train import step as steps

    class Broken(steps.Stepper):
        def take(self, step: int, *given: object) -> steps.Done:
            hook = None
            if step == 1:
                hook = self.model.trunk.layers[0].register_forward_hook(
                    lambda module, args, made: made._replace(hidden=made.hidden * float("inf"))
                )
            done = super().take(step, *given)
            if hook is not None:
                hook.remove()
            return done

    before = [parameter.clone() for parameter in build(load("tiny-llama-10m").model).parameters()]
    monkeypatch.setattr("transect.train.run.Stepper", Broken)
    assert train(corpus, tmp_path / "run", "train.log_every=1").code == 0
    rows = Table.read(tmp_path / "run")
    losses = {row.step: row.value for row in rows.where(metric="loss", part="total")}
    assert losses[1] is not None and losses[2] is None and losses[3] is not None
    assert [row.value for row in rows.where(metric="skipped_steps")] == [0, 1, 1]
    assert before and all(torch.isfinite(parameter).all() for parameter in before)


def test_masked_models_need_a_mask_token(corpus: Corpus, tmp_path: Path):
    folder = tmp_path / "texts"
    file = write_texts(folder / "train.jsonl", documents(31, 3))
    made = command(
        "data", "prepare", f"train/a={file}", "-o", tmp_path / "data", "--vocab-size", "300", "--valid-fraction", "0.1"
    )
    assert made.code == 0, made
    trained = train(tmp_path / "data", tmp_path / "run", "model.vocab_size=300", recipe="tiny-bert-small-vanilla")
    assert trained.code == 0, trained
