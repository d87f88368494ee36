"""Whatever a user gets wrong: exit code 2, one line that names it, no traceback, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from families import HIDDEN, POSITIONS, VOCAB, tiny_model
from shell import Outcome, command, contents, process, saved_model, saved_tokens
from transect import memory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy")


def _assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("transect: ") and outcome.err.endswith("\n") and outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.out + outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


WRONG_OPTIONS: dict[str, tuple[list[object], tuple[str, ...]]] = {
    "unknown probe": (["--probe", "jmp"], ("'jmp'", "did you mean 'jump'", "similarity")),
    "unknown option of a probe": (["--set", "nonlinearity.rigde=0"], ("'rigde'", "did you mean 'ridge'")),
    "wrong value of an option": (["--set", "nonlinearity.ridge=much"], ("nonlinearity.ridge", "'much'")),
    "value that is not allowed": (["--set", "nonlinearity.split=random"], ("split", "'random'", "ordered")),
    "value out of range": (["--set", "similarity.sample=1"], ("sample is 1", "two")),
    "layer that zeta cannot start from": (["--set", "jump.zeta_from=[1]"], ("zeta_from 1", "2 to 3")),
    "unknown kind of order": (["--probe", "commutativity", "--set", "commutativity.kinds=[turn]"], ("'turn'", "pairs")),
    "more layers fixed than there are": (
        ["--probe", "commutativity", "--set", "commutativity.fixed=[4]"],
        ("4 layers cannot be fixed", "has 3"),
    ),
    "no sample of orders": (["--probe", "commutativity", "--set", "commutativity.sample=0"], ("sample is 0",)),
    "no shuffle": (["--probe", "commutativity", "--set", "commutativity.shuffles=0"], ("shuffles is 0",)),
    "unknown objective": (["--probe", "commutativity", "--set", "commutativity.objective=next"], ("'next'", "causal")),
    "unknown part": (["--probe", "ablation", "--set", "ablation.parts=[mlp]"], ("'mlp'", "ffn, ffn_up")),
    "unknown method": (["--probe", "ablation", "--set", "ablation.methods=[cut]"], ("'cut'", "zero, noise")),
    "unknown schedule": (["--probe", "ablation", "--set", "ablation.schedules=[up]"], ("'up'", "from_below")),
    "no sample of parts": (["--probe", "ablation", "--set", "ablation.sample=0"], ("sample",)),
    "rate of masks out of range": (["--probe", "ablation", "--set", "ablation.mask_rate=1"], ("mask_rate is 1",)),
    "masked without a mask token": (
        ["--probe", "ablation", "--set", "ablation.objective=masked"],
        ("no tokenizer names its mask token", "--set ablation.mask_id=ID"),
    ),
    "mask token out of range": (
        ["--probe", "ablation", "--set", "ablation.objective=masked", "--set", f"ablation.mask_id={VOCAB}"],
        (f"mask_id {VOCAB} is out of range", f"0 to {VOCAB - 1}"),
    ),
    "setting without a value": (["--set", "nonlinearity.ridge"], ("probe.option=value",)),
    "value that is not YAML": (["--set", "jump.positions=[all"], ("'[all'", "list")),
    "setting of a probe not measured": (["--probe", "jump", "--set", "similarity.sample=9"], ("'similarity'", "jump")),
    "unknown dtype": (["--dtype", "float31"], ("'float31'", "float32")),
    "unknown device": (["--device", "abacus"], ("'abacus'",)),
    "length over the model's": (["--seq-len", POSITIONS + 1], (str(POSITIONS + 1), f"at most {POSITIONS}")),
    "length of one token": (["--seq-len", 1], ("seq_len is 1",)),
    "no batch": (["--batch-size", 0], ("batch size is 0",)),
    "both texts": (["--text", "a.txt"], ("--text", "--tokens")),
    "limit of tokens that are given": (["--limit-tokens", 99], ("--limit-tokens", "--tokens")),
    "word for a number": (["--batch-size", "many"], ("--batch-size", "integer")),
    "unknown option of the command": (["--batchsize", 3], ("--batchsize", "--batch-size")),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_do_not_fit(case: str, model: Path, tokens: Path, tmp_path: Path):
    options, words = WRONG_OPTIONS[case]
    output = tmp_path / "run"
    arguments = ["--tokens", tokens, "--seq-len", 23, *options, "--output", output]
    _assert_refused(command("measure", model, *arguments), *words)
    assert contents(tmp_path) == set()


def test_models_that_cannot_be_edited_so(tokens: Path, tmp_path: Path):
    looped = saved_model(tmp_path / "looped", "albert/two_inner")
    shared = saved_model(tmp_path / "shared", "albert")
    arguments = ["--tokens", tokens, "--seq-len", 23, "--output", tmp_path / "run"]

    def refused(folder: Path, probe: str, *settings: str) -> Outcome:
        given = [word for setting in (*settings, "mask_id=3") for word in ("--set", f"{probe}.{setting}")]
        return command("measure", folder, *arguments, "--probe", probe, *given)

    _assert_refused(refused(looped, "commutativity"), "commutativity: looped", "in a loop")
    _assert_refused(refused(looped, "ablation"), "ablation: looped", "in a loop", "ablation.parts=[ffn, attn]")
    _assert_refused(refused(shared, "ablation", "methods=[noise]", "parts=[ffn]"), "of shared shares its weights")
    assert contents(tmp_path / "run") == set()


def test_the_same_command_without_the_mistake_is_carried_out(model: Path, tokens: Path, tmp_path: Path):
    done = command("measure", model, "--tokens", tokens, "--seq-len", 23, "--output", tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    assert "rows.parquet" in contents(tmp_path / "run")


def _nonsense_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "transmogrifier", "hidden_size": 8}))


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _nan_in_weights(folder: Path) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = float("nan")
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nonsense_type, ("transmogrifier",)),
        (_not_json, ("cannot load",)),
        (_without_weights, ("cannot load",)),
        (_cut_weights, ("cannot load",)),
        (_nan_in_weights, ("h.1.mlp.c_fc.weight", "NaN")),
        (shutil.rmtree, ("no model folder",)),
    ],
)
def test_models_that_cannot_be_loaded(
    damage: Callable[[Path], None], words: tuple[str, ...], model: Path, tokens: Path, tmp_path: Path
):
    shutil.copytree(model, tmp_path / "broken")
    damage(tmp_path / "broken")
    output = tmp_path / "run"
    arguments = ["--tokens", tokens, "--seq-len", 23, "--output", output]
    _assert_refused(command("measure", tmp_path / "broken", *arguments), "broken", *words)
    assert not output.exists()


def test_states_that_overflow_leave_no_folder_in_the_way(tokens: Path, tmp_path: Path):
    """Only a long text shows it, after the folder was made."""
    broken = tiny_model("gpt2")
    with torch.no_grad():
        broken.transformer.wpe.weight[22] = 3e38
    broken.save_pretrained(tmp_path / "broken")
    output = tmp_path / "run"
    arguments = ["--tokens", tokens, "--seq-len", 23, "--output", output, "--probe", "similarity"]
    _assert_refused(command("measure", tmp_path / "broken", *arguments), "NaN", "float32")
    assert not output.exists()


def test_texts_that_are_none(model: Path, tmp_path: Path):
    def measured(*arguments: object) -> Outcome:
        return command("measure", model, *arguments, "--seq-len", 23, "--output", tmp_path / "run")

    _assert_refused(measured("--text", tmp_path / "absent.txt"), "tokenizer", "--tokens")
    _assert_refused(measured(), "tokenizer", "--tokens")
    _assert_refused(measured("--tokens", tmp_path / "absent.npy"), "absent.npy")
    high = saved_tokens(tmp_path / "high.npy")
    ids = np.load(high)
    ids[3, 5] = VOCAB
    np.save(high, ids)
    _assert_refused(measured("--tokens", high), f"token id {VOCAB}", f"0 to {VOCAB - 1}")
    np.save(high, ids[:2] % VOCAB)
    _assert_refused(measured("--tokens", high), "too few", "more text")
    (tmp_path / "text.npy").write_text("no array")
    _assert_refused(measured("--tokens", tmp_path / "text.npy"), "text.npy", "numpy.save")
    assert not (tmp_path / "run").exists()


def test_too_little_memory(model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = [model, "--tokens", tokens, "--seq-len", 23, "--output", tmp_path / "run"]
    for free in (0, 1000, 8 * HIDDEN**2):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        for probe in ("nonlinearity", "jump", "similarity"):
            _assert_refused(command("measure", *arguments, "--probe", probe), "not enough memory")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")]
)
def test_memory_that_runs_out_on_the_way(error: Exception, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("transect.commands.run", fail)
    _assert_refused(command("measure", model, "--tokens", tokens, "--seq-len", 23), "not enough memory", "--batch-size")


def test_other_errors_are_not_hidden(model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("transect.commands.run", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        command("measure", model, "--tokens", tokens, "--seq-len", 23)


@pytest.mark.parametrize("where", ["file/run", "/proc/transect/run", "/dev/null"])
def test_output_that_cannot_be_written(where: str, model: Path, tokens: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    arguments = ["--tokens", tokens, "--seq-len", 23, "--probe", "jump"]
    _assert_refused(command("measure", model, *arguments, "--output", tmp_path / where), "cannot write")
    assert contents(tmp_path) == {"file"}


def test_output_that_holds_something(model: Path, tokens: Path, tmp_path: Path):
    output = tmp_path / "run"
    arguments = ["measure", model, "--tokens", tokens, "--seq-len", 23, "--probe", "jump", "--output", output]
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    _assert_refused(command(*arguments), "not empty")
    assert contents(output) == {"notes.txt"}
    (output / "notes.txt").unlink()
    assert command(*arguments).code == 0
    before = {name: (output / name).read_bytes() for name in contents(output)}
    _assert_refused(command(*arguments), "already holds a run", "--resume")
    assert {name: (output / name).read_bytes() for name in contents(output)} == before


def test_resume_without_output(model: Path, tokens: Path):
    _assert_refused(command("measure", model, "--tokens", tokens, "--resume"), "--output")


def test_names_that_do_not_exist(tmp_path: Path):
    _assert_refused(command("list", "colours"), "'colour", "probes, elements")
    _assert_refused(command("show", "nonlinearty"), "'nonlinearty'", "did you mean 'nonlinearity'")
    _assert_refused(command("sow"), "sow")
    _assert_refused(command("fetch", "minilmm", "-o", tmp_path), "minilm")
    assert contents(tmp_path) == set()


def test_reports_on_nothing(tmp_path: Path):
    _assert_refused(command("report", tmp_path, "-o", tmp_path / "report.html"), "rows.jsonl", str(tmp_path))
    _assert_refused(command("report", tmp_path / "absent", "-o", tmp_path / "report.html"), "absent")
    _assert_refused(command("report", "-o", tmp_path / "report.html"), "Missing argument")
    (tmp_path / "rows.jsonl").write_text('{"metric": "cka"}\n')
    _assert_refused(command("report", tmp_path, "-o", tmp_path / "report.html"), "rows.jsonl", "not a table")
    assert contents(tmp_path) == {"rows.jsonl"}


def test_processes_of_their_own_say_the_same(model: Path, tokens: Path, tmp_path: Path):
    """Nothing but the one line is on the error stream of a real process either."""
    _assert_refused(process("measure"), "Missing argument", "model")
    _assert_refused(process("measure", tmp_path / "absent", "--tokens", tokens), "no model folder")
    shutil.copytree(model, tmp_path / "broken")
    _nan_in_weights(tmp_path / "broken")
    _assert_refused(process("measure", tmp_path / "broken", "--tokens", tokens, "--output", tmp_path / "run"), "NaN")
    assert not (tmp_path / "run").exists()
