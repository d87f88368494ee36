"""Several checkpoints or models in one command: steps in the rows, one table, one report, going on after a stop."""

import gc
import json
import shutil
import signal
import string
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import transect as tx
from families import enliven, tiny_model
from shell import Outcome, command, contents, saved_model, saved_tokens
from transect import commands
from transect.progress import Bar

STEPS = (3, 20, 100)  # as text, 100 would come first
SMALL_VOCAB = 53


def _quiet_layer(folder: Path, layer: int) -> None:
    """A checkpoint whose one layer adds nothing to the stream, so that its displacement is 0."""
    model = tiny_model("gpt2")
    block = model.transformer.h[layer]
    with torch.no_grad():
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            linear.weight.zero_()
            linear.bias.zero_()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three checkpoints; another layer is quiet in each."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    for layer, step in enumerate(STEPS):
        _quiet_layer(folder / f"checkpoint-{step}", layer)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    tokens = saved_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy")
    return ["--tokens", tokens, "--seq-len", 23, "--probe", "jump"]


@pytest.fixture(scope="module")
def whole(trained: Path, options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the trajectory, measured without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    _said("measure", trained, *options, "--output", folder)
    return folder


def _said(*arguments: object) -> str:
    done = command(*arguments)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def _assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("transect: ") and outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err, outcome.err


def _bytes(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in contents(folder)}


def _assert_same_rows(one: Path, other: Path) -> None:
    assert contents(one) == contents(other)
    for name in contents(one):
        if Path(name).stem == "rows":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_rows_follow_the_training(whole: Path):
    table = tx.Table.read(whole)
    assert list(dict.fromkeys((row.model, row.revision, row.step) for row in table)) == [
        ("trained", f"checkpoint-{step}", step) for step in STEPS
    ]
    for quiet, step in enumerate(STEPS):
        found = table.where(step=step, metric="displacement", variant="pre_norm/all").rows
        assert [row.layer for row in found] == [0, 1, 2]
        for row in found:
            assert row.value == pytest.approx(0, abs=1e-6) if row.layer == quiet else row.value > 0.01
        assert tx.Table.read(whole / f"checkpoint-{step}").rows == table.where(step=step).rows


def test_each_checkpoint_is_measured_as_it_would_be_alone(
    whole: Path, trained: Path, options: list[object], tmp_path: Path
):
    expected = tx.Table.read(whole).where(step=20).rows
    for number, alone in enumerate(([trained, "--revision", "checkpoint-20"], [trained / "checkpoint-20"])):
        said = _said("measure", *alone, *options, "--output", tmp_path / str(number))
        assert tx.Table.read(tmp_path / str(number)).rows == expected
        assert "1 of 1" not in said


def test_the_python_way_gives_the_same_rows(whole: Path, trained: Path, options: list[object]):
    data = tx.data.from_tokens(np.load(options[1]), seq_len=23, name="tokens.npy")
    table = tx.Table()
    for step in STEPS:
        view = tx.View.load(trained, revision=f"checkpoint-{step}")
        table += tx.measure(view, ["jump"], data)
    assert table.rows == tx.Table.read(whole).rows
    named = tx.measure(tx.View.load(trained, "checkpoint-3"), ["jump"], data).stamped(step=7, revision="warm")
    assert {(row.step, row.revision) for row in named} == {(7, "warm")}


def test_it_says_where_it_is_and_ends_with_all_side_by_side(
    trained: Path, options: list[object], whole: Path, tmp_path: Path
):
    said = _said("measure", trained, *options, "--output", tmp_path / "run")
    lines = said.splitlines()
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    heads = [f"{number} of 3  trained, checkpoint-{step}" for number, step in enumerate(STEPS, 1)]
    assert [line for line in lines if " of 3 " in line] == heads
    assert sum(line.startswith("text ") for line in lines) == 1
    cells = [line.split() for line in lines]
    for step in STEPS:
        found = tx.Table.read(whole).where(step=step, metric="displacement", variant="pre_norm/all").rows
        mean = sum(row.value for row in found) / 3
        assert [str(step), f"{mean:.4g}"] in [line[:2] for line in cells], said


def test_the_joint_record_says_what_the_runs_share_and_where_they_differ(whole: Path):
    config = json.loads((whole / "config.json").read_text())
    assert (config["model"], config["tokens"], config["layers"]) == ("trained", 61 * 23, 3)
    assert config["runs"] == [{"folder": f"checkpoint-{step}", "revision": f"checkpoint-{step}"} for step in STEPS]
    own = [json.loads((whole / f"checkpoint-{step}" / "environment.json").read_text()) for step in STEPS]
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["packages"] == own[0]["packages"] and environment["date"] == own[2]["date"]
    assert environment["seconds"] == pytest.approx(sum(one["seconds"] for one in own), abs=0.11)


def test_one_report_shows_them_all(whole: Path, tmp_path: Path):
    _said("report", whole, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"checkpoint-{step}" in page for step in STEPS)


def _stop_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Press Ctrl-C in that call of the progress bar; gives the tokens of each call."""
    told: list[int] = []

    def advance(bar: Bar, tokens: int, phase: str) -> None:
        told.append(tokens)
        if len(told) == calls:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "advance", advance)
    return told


def test_a_stopped_trajectory_goes_on_with_the_first_unfinished_checkpoint(
    trained: Path, options: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["measure", trained, *options, "--output", tmp_path / "run"]
    batches = -(-61 // 8)
    _stop_after(batches + 3, monkeypatch)
    stopped = command(*arguments)
    assert stopped.code == 130 and "--resume" in stopped.err and stopped.err.count("\n") == 1
    done = {f"checkpoint-3/{name}" for name in contents(whole / "checkpoint-3")}
    assert contents(tmp_path / "run") == {*done, "checkpoint-20/config.json", "checkpoint-20/state.pt"}
    _assert_refused(command(*arguments), "already holds runs", "--resume")
    before = _bytes(tmp_path / "run" / "checkpoint-3")
    told = _stop_after(10**6, monkeypatch)
    said = _said(*arguments, "--resume")
    assert len(told) == (batches - 3) + batches
    assert "1 of 3  trained, checkpoint-3 (finished)" in said and said.count("(finished)") == 1
    assert _bytes(tmp_path / "run" / "checkpoint-3") == before
    _assert_same_rows(tmp_path / "run", whole)


def test_new_checkpoints_are_added_to_what_was_measured(
    trained: Path, options: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "trained"
    arguments = ["measure", run, *options, "--output", tmp_path / "run", "--resume"]
    shutil.copytree(trained / "checkpoint-3", run / "checkpoint-3")
    _said(*arguments)
    for step in STEPS[1:]:
        shutil.copytree(trained / f"checkpoint-{step}", run / f"checkpoint-{step}")
    told = _stop_after(10**6, monkeypatch)
    _said(*arguments)
    assert sum(told) == 2 * 61 * 23
    _assert_same_rows(tmp_path / "run", whole)


def test_all_checkpoints_of_a_run_folder(trained: Path, options: list[object], whole: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "trained" / "checkpoints")
    _said("measure", tmp_path / "trained", *options, "--revision", "all", "--output", tmp_path / "run")
    _assert_same_rows(tmp_path / "run", whole)
    _said("measure", tmp_path / "trained", *options, "--output", tmp_path / "last")
    assert tx.Table.read(tmp_path / "last").rows == tx.Table.read(whole).where(step=100).rows


def test_no_model_is_kept_when_the_next_is_loaded(
    trained: Path, options: list[object], monkeypatch: pytest.MonkeyPatch
):
    load, alive, views = commands.quiet_load, [], []

    def watched(*arguments: Any) -> tx.View:
        gc.disable()  # nothing but references may keep a model
        alive.append(sum(view() is not None for view in views))
        view = load(*arguments)
        views.append(weakref.ref(view.model))
        return view

    monkeypatch.setattr(commands, "quiet_load", watched)
    try:
        _said("measure", trained, *options)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_every_plan_is_shown_and_nothing_run(trained: Path, options: list[object], tmp_path: Path):
    said = _said("measure", trained, *options, "--dry-run", "--output", tmp_path / "run")
    assert said.count("\npass 1  jump: layers 0-2") == said.count("\nmemory ") == said.count(" of 3  trained") == 3
    assert contents(tmp_path) == set()


# several models


def _tokenizer(folder: Path, split: bool) -> None:
    """Words of the letter a: as one token up to five letters, or each letter a token of its own."""
    words = [letter * count for letter in string.ascii_lowercase[:7] for count in range(1, 6)]
    known = {word: at for at, word in enumerate(["[PAD]", "[UNK]", *words])}
    assert len(known) <= SMALL_VOCAB
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    spaces = pre_tokenizers.Whitespace()
    letters = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split("", "isolated")])
    tokenizer.pre_tokenizer = letters if split else spaces
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of other vocabularies and depths whose folders have the same name."""
    root = tmp_path_factory.mktemp("models")
    large, small = saved_model(root / "large" / "net", "llama"), root / "small" / "net"
    config = GPT2Config(vocab_size=SMALL_VOCAB, n_embd=20, n_head=2, n_layer=2, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    enliven(model, 0)
    model.save_pretrained(small)
    _tokenizer(large, split=True)
    _tokenizer(small, split=False)
    return large, small


def test_each_model_reads_the_text_with_its_own_tokenizer(pair: tuple[Path, Path], tmp_path: Path):
    lines = (" ".join("abcdefg"[(n + k) % 7] * (1 + (n * k) % 5) for k in range(29)) for n in range(40))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = ["--text", tmp_path / "own.jsonl", "--seq-len", 13]
    said = _said("measure", *pair, *options, "--probe", "jump", "--output", tmp_path / "run")
    table = tx.Table.read(tmp_path / "run")
    assert list(dict.fromkeys(row.model for row in table)) == ["large/net", "small/net"]
    (letters,), (words,) = ({row.tokens for row in table.where(model=name)} for name in ("large/net", "small/net"))
    assert words == 40 * 29 and letters is not None and letters > 2 * words
    assert {row.step for row in table} == {None}
    assert len(table.where(model="small/net", metric="displacement", variant="pre_norm/all")) == 2
    folders = {name.split("/")[0] for name in contents(tmp_path / "run") if "/" in name}
    assert folders == {"large_net", "small_net"}
    assert "1 of 2  large/net" in said and "2 of 2  small/net" in said
    _said("report", tmp_path / "run", "-o", tmp_path / "report.html")


def test_token_ids_are_checked_for_each_model(pair: tuple[Path, Path], options: list[object], tmp_path: Path):
    output = tmp_path / "run"
    refused = command("measure", *pair, *options, "--output", output)
    _assert_refused(refused, "2 of 2, small/net: ", f"0 to {SMALL_VOCAB - 1}", "finished is kept")
    assert {name.split("/")[0] for name in contents(output)} == {"large_net"}
    _assert_refused(command("measure", *reversed(pair), *options, "--output", tmp_path / "none"), "1 of 2, small/net")
    assert not (tmp_path / "none").exists()


def test_models_with_their_checkpoints_side_by_side(trained: Path, options: list[object], whole: Path, tmp_path: Path):
    single = saved_model(tmp_path / "single", "bert")
    said = _said("measure", single, trained, *options, "--output", tmp_path / "run")
    table = tx.Table.read(tmp_path / "run")
    assert table.where(model="trained").rows == tx.Table.read(whole).rows
    assert {(row.revision, row.step) for row in table.where(model="single")} == {(None, None)}
    assert (tmp_path / "run" / "single" / "rows.parquet").is_file()
    assert (tmp_path / "run" / "trained" / "checkpoint-20" / "rows.parquet").is_file()
    assert ["trained", "20"] in [line.split()[:2] for line in said.splitlines()]


def _without_config(folder: Path) -> None:
    shutil.rmtree(folder)


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_without_config, "no model folder"), (_not_json, "cannot load"), (_without_weights, "has no weights")],
)
def test_a_model_that_is_not_there_is_known_before_anything_is_measured(
    damage, words: str, trained: Path, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(commands, "quiet_load", lambda *_: pytest.fail("a model was loaded"))
    broken = tmp_path / "broken"
    shutil.copytree(trained / "checkpoint-3", broken)
    damage(broken)
    _assert_refused(command("measure", trained, broken, *options, "--output", tmp_path / "run"), "broken", words)
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_on_the_way_can_be_mended(
    trained: Path, options: list[object], whole: Path, tmp_path: Path
):
    run = tmp_path / "trained"
    shutil.copytree(trained, run)
    file = run / "checkpoint-20" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    arguments = ["measure", run, *options, "--output", tmp_path / "run"]
    _assert_refused(command(*arguments), "2 of 3, trained, checkpoint-20: cannot load", "--resume")
    assert not (tmp_path / "run" / "rows.jsonl").exists()
    shutil.copy(trained / "checkpoint-20" / "model.safetensors", file)
    _said(*arguments, "--resume")
    _assert_same_rows(tmp_path / "run", whole)


def test_a_folder_that_holds_something_else_is_left_alone(
    trained: Path, options: list[object], whole: Path, tmp_path: Path
):
    single = tmp_path / "single"
    _said("measure", trained / "checkpoint-3", *options, "--output", single)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    copied = tmp_path / "copied"
    shutil.copytree(whole, copied)
    for folder, words in ((single, "single run"), (notes, "mine.txt"), (copied, "already holds runs")):
        before = _bytes(folder)
        _assert_refused(command("measure", trained, *options, "--output", folder), words)
        assert _bytes(folder) == before
    for folder, words in ((single, "single run"), (notes, "mine.txt")):
        _assert_refused(command("measure", trained, *options, "--output", folder, "--resume"), words)
    less = ["--revision", "checkpoint-3", "--revision", "checkpoint-100"]
    _assert_refused(command("measure", trained, *options, *less, "--output", copied, "--resume"), "checkpoint-20")
    other = command("measure", trained, *options, "--seed", 1, "--output", copied, "--resume")
    _assert_refused(other, "another seed", "same settings")
    _assert_refused(command("measure", trained / "checkpoint-3", *options, "--output", copied), "already holds a run")


def test_the_default_probes_leave_out_for_each_model_what_does_not_suit_it(
    trained: Path, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transect.probes.similarity import Similarity

    monkeypatch.setattr(commands.registry, "available", lambda _: ["jump", "similarity"])
    monkeypatch.setattr(Similarity, "refusal", lambda _, view: "too old" if view.name == "single" else None)
    single = saved_model(tmp_path / "single")
    said = _said("measure", trained, single, *options[:-2], "--output", tmp_path / "run")
    table = tx.Table.read(tmp_path / "run")
    assert {row.probe for row in table.where(model="trained")} == {"jump", "similarity"}
    assert {row.probe for row in table.where(model="single")} == {"jump"}
    assert said.count("similarity is left out: too old") == 1
    assert [line.split()[:2] for line in said.splitlines() if line.split()[:1] == ["single"]][-1][1] == "-"
