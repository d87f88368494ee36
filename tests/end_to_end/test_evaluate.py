"""`transect evaluate`: suites, runs and their checkpoints, what is passed over, what a kill leaves, bad input."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import transect as tx
from corpora import documents, small_corpus, write_texts
from judged import tokenizer, view
from shell import ENVIRONMENT, command, contents
from transect.errors import InputError
from transect.evaluate import evaluate, origin_of
from transect.results import Table

SUITE = """description: A few of each.
tasks:
  - {task: language_modelling, data: corpus, split: valid}
  - {task: language_modelling, data: mine.jsonl, limit_bytes: 900}
  - {task: options, data: continuation, limit: 5}
  - {task: options, data: piqa}
  - {task: minimal_pairs, data: word_order, limit: 7}
  - {task: cloze, data: last_word, limit: 5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, a training run of three checkpoints, a suite and a text."""
    path = tmp_path_factory.mktemp("judged")
    one = long()
    one.model.save_pretrained(path / "model")
    tokenizer().save_pretrained(path / "model")
    view("llama", torch.float32, positions=13).model.save_pretrained(path / "short")
    tokenizer().save_pretrained(path / "short")
    write_texts(path / "texts" / "mine.jsonl", documents(5, 29, length=30))
    (path / "few.yaml").write_text(SUITE)
    small_corpus(path)
    done = command(
        "train", "tiny-demo-vanilla", "--data", path / "corpus", "-o", path / "run", "--set", "train.steps=6",
        "--set", "train.checkpoints={every: 2, keep_last: 9}", "--set", "train.probes=[]",
        "--set", "train.evaluation.every=2", "--set", "model.vocab_size=283",
    )  # fmt: skip
    assert done.code == 0, done
    return path


def long():
    """A model that takes the built-in sentences."""
    return view("llama", torch.float32, positions=512)


def _judge(folder: Path, *arguments: object):
    return command("evaluate", *arguments, "--data", folder / "texts")


def test_a_model_by_a_suite(folder: Path, tmp_path: Path):
    done = _judge(folder, folder / "model", "--suite", folder / "few.yaml", "-o", tmp_path / "out")
    assert done.code == 0 and done.err == "", done
    assert all(len(line) <= 80 for line in done.out.splitlines() if str(tmp_path) not in line and "note" not in line)
    table = Table.read(tmp_path / "out")
    found = {(row.task, row.domain, row.value is None) for row in table}
    assert ("language_modelling", "corpus", True) in found and ("options", "piqa", True) in found
    assert ("language_modelling", "mine", False) in found and ("cloze", "last_word", False) in found
    reasons = [row.reason for row in table if row.reason]
    assert any("not from a training run" in reason for reason in reasons)
    assert any("piqa is not at hand" in reason and "--data" in reason for reason in reasons)
    assert "passed over" in done.out and "piqa" in done.out
    for row in table:
        assert row.model == "model" and row.config and row.code and row.dtype == "float32" and row.data
        assert row.value is None or row.n
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kind"] == "evaluation" and config["tasks"][2]["limit"] == 5
    again = _judge(folder, folder / "model", "--suite", folder / "few.yaml", "-o", tmp_path / "out")
    assert again.code == 2 and "already holds a run" in again.err
    taken = _judge(folder, folder / "model", "--suite", folder / "few.yaml", "-o", tmp_path / "out", "--resume")
    assert taken.code == 0 and "finished" in taken.out


def test_every_checkpoint_of_a_run_is_judged_into_the_run(folder: Path):
    few = ("--task", "language_modelling:corpus")
    done = _judge(folder, folder / "run", "--revision", "all", *few, "--set", "language_modelling.split=valid")
    assert done.code == 0, done
    (made,) = (folder / "run" / "evaluations").iterdir()
    assert {one.name for one in made.iterdir()} == {f"step-0000000{step}" for step in (2, 4, 6)}
    trained = Table.read(folder / "run")
    for checkpoint in made.iterdir():
        rows = Table.read(checkpoint)
        (loss,) = rows.where(metric="nats_per_token").rows
        (known,) = trained.where(metric="nats_per_token", split="valid", step=loss.step).rows
        # the judge's loss on the run's own text is the one that the run wrote while it trained
        assert loss.value == pytest.approx(known.value, rel=1e-6) and loss.n == known.n
        assert (loss.run, loss.model, loss.domain) == ("run", "tiny-demo-vanilla", "words")
        assert loss.tokens == known.tokens and loss.flops == known.flops and loss.seed == known.seed
    again = _judge(folder, folder / "run", "--revision", "all", *few, "--set", "language_modelling.split=valid")
    assert again.code == 0 and again.out.count("is finished") == 3


def test_several_models_side_by_side(folder: Path, tmp_path: Path):
    few = ("--task", "cloze:last_word", "--set", "cloze.limit=5")
    done = _judge(folder, folder / "model", folder / "run", *few, "-o", tmp_path / "both")
    assert done.code == 0 and contents(tmp_path / "both") >= {"rows.parquet", "model/rows.parquet", "run/rows.parquet"}
    assert "model" in done.out and "run 6" in done.out
    assert {row.model for row in Table.read(tmp_path / "both")} == {"model", "tiny-demo-vanilla"}


def test_a_killed_evaluation_repeats_no_finished_task(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = [folder / "model", "--suite", folder / "few.yaml", "--data", folder / "texts", "-o", out]
    program = [sys.executable, "-c", _SLOW, *map(str, ["evaluate", *arguments])]
    running = subprocess.Popen(program, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 90
    while not (out / "rows.jsonl").is_file() or "options" not in (out / "rows.jsonl").read_text():
        assert running.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    running.kill()
    running.wait()
    (out / "rows.jsonl").write_text("cut short")  # the state counts, not what stood beside it
    saved = (out / "state.pt").read_bytes()
    judged: list[str] = []
    from transect.tasks.language_modelling import LanguageModelling

    whole = LanguageModelling.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModelling, "rows", lambda self, subject: judged.append("lm") or whole(self, subject))
        done = command("evaluate", *arguments, "--resume")
    assert done.code == 0 and judged == [] and saved, done
    other = command("evaluate", *arguments[:-1], tmp_path / "whole")
    assert other.code == 0
    assert Table.read(out).rows == Table.read(tmp_path / "whole").rows


_SLOW = """
import sys, time
from transect.cli import main
from transect.tasks.minimal_pairs import MinimalPairs
MinimalPairs.rows = lambda self, subject: time.sleep(600)
main()
"""


def test_python_judges_edited_views(folder: Path):
    one = long()
    plain = tx.evaluate(one, ["cloze:last_word"], batch_size=3)
    with tx.edits.remove(one, "attn", 0):
        edited = tx.evaluate(one, ["cloze:last_word"])
    assert plain.where(metric="nats_per_word").rows[0].value != edited.where(metric="nats_per_word").rows[0].value
    origin = origin_of(folder / "run" / "checkpoints" / "step-00000004")
    assert origin is not None and origin.come["step"] == 4 and origin.corpus is not None
    assert origin_of(folder / "model") is None


def test_rows_do_not_depend_on_batch_size(folder: Path):
    one = long()
    tasks = ["cloze:last_word", "minimal_pairs:word_order"]
    one_by_one, many = (tx.evaluate(one, [_limited(name) for name in tasks], batch_size=size) for size in (1, 64))
    for left, right in zip(one_by_one, many, strict=True):
        assert left.value == pytest.approx(right.value, rel=1e-6), left


def _limited(word: str):
    from transect import suites

    name, _, data = word.partition(":")
    return suites.make(name, {"data": data, "limit": 17})


WRONG = {
    "unknown suite": (["--suite", "bse"], ("'bse'", "did you mean 'base'")),
    "unknown task": (["--task", "option:continuation"], ("'option'", "did you mean 'options'")),
    "unknown data": (["--task", "options:hellswag"], ("'hellswag'", "did you mean 'hellaswag'")),
    "task without data": (["--task", "options"], ("options needs data",)),
    "data not at hand": (["--task", "options:piqa"], ("piqa is not at hand", "--data")),
    "unknown option": (["--task", "cloze:last_word", "--set", "cloze.limt=3"], ("'limt'", "did you mean 'limit'")),
    "wrong value": (["--task", "cloze:last_word", "--set", "cloze.limit=many"], ("cloze.limit", "many")),
    "limit of nothing": (["--task", "cloze:last_word", "--set", "cloze.limit=0"], ("cloze.limit is 0",)),
    "set of no task": (["--task", "cloze:last_word", "--set", "options.limit=3"], ("'options'", "cloze")),
    "suite and task": (["--suite", "base", "--task", "cloze:last_word"], ("both --suite and --task",)),
    "harness options": (["--suite", "base", "--limit", "5"], ("--limit", "--lm-eval")),
    "data folder": (["--task", "cloze:last_word", "--data", "/no/such"], ("no data folder /no/such",)),
    "corpus of no run": (["--task", "language_modelling"], ("not from a training run",)),
    "wrong text": (["--task", "language_modelling:builtin:poems"], ("builtin:poems", "builtin:speeches")),
    "longer than the context": (
        ["--task", "minimal_pairs:word_order", "--set", "minimal_pairs.limit=9"],
        ("more than",),
    ),
    "stride": (
        ["--task", "language_modelling:builtin:python_docs", "--set", "language_modelling.stride=513"],
        ("stride is 513", "1 to 512"),
    ),
    "length": (
        ["--task", "language_modelling:builtin:python_docs", "--set", "language_modelling.length=513"],
        ("length is 513", "2 to 512"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(folder: Path, tmp_path: Path, case: str):
    arguments, words = WRONG[case]
    model = folder / ("short" if case == "longer than the context" else "model")
    done = command("evaluate", model, *arguments, "-o", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("transect: "), done
    for word in words:
        assert word in done.err, done.err
    assert contents(tmp_path) == set()


def test_a_model_without_a_tokenizer_or_a_head(folder: Path, tmp_path: Path):
    one = view()
    one.model.float().save_pretrained(tmp_path / "bare")
    done = command("evaluate", tmp_path / "bare", "--task", "cloze:last_word")
    assert done.code == 2 and "has no tokenizer" in done.err and done.err.count("\n") == 1
    done = command("evaluate", tmp_path / "bare", "--suite", folder / "few.yaml", "-o", tmp_path / "out")
    assert done.code == 0
    assert all("no tokenizer" in str(row.reason) for row in Table.read(tmp_path / "out"))
    one.model.base_model.save_pretrained(tmp_path / "headless")
    tokenizer().save_pretrained(tmp_path / "headless")
    done = command("evaluate", tmp_path / "headless", "--task", "cloze:last_word")
    assert done.code == 2 and "has no head" in done.err


def test_a_suite_passes_over_what_does_not_fit(folder: Path, tmp_path: Path):
    done = _judge(folder, folder / "short", "--suite", folder / "few.yaml", "-o", tmp_path / "out")
    assert done.code == 0, done
    reasons = {row.task: row.reason for row in Table.read(tmp_path / "out")}
    assert "more than the 13" in str(reasons["minimal_pairs"]) and "not at hand" in str(reasons["options"])


def test_nothing_to_do_is_refused():
    with pytest.raises(InputError, match="no task is given"):
        evaluate(view(), [])
