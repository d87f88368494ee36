"""`transect edit`: what it prints and writes, and every mistake in one line with nothing written."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from families import VOCAB, random_ids
from shell import ENVIRONMENT, Outcome, command, contents, saved_model, saved_tokens
from transect.view import edits
from transect.view.load import align
from transect.view.view import View


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer whose words are numbers."""
    folder = saved_model(tmp_path_factory.mktemp("models") / "tiny")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


def test_an_edit_is_written_reloaded_and_measured_under_its_name(model: Path, tmp_path: Path, generator):
    target = tmp_path / "deep" / "edited"
    done = command("edit", model, "--remove", "ffn:0", "--remove", "head:1.3", "--swap", "1,2", "-o", target)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines == [
        "removed ffn 0",
        "removed head 3 of 1",
        "swapped 1 and 2",
        "layers run 0 2 1",
        "silenced transformer.h.0.mlp.c_proj.weight",
        "silenced transformer.h.0.mlp.c_proj.bias",
        "silenced transformer.h.1.attn.c_proj.weight",
        "reloaded: logits are the temporary edit's to the last bit",
        f"the edited model is in {target}",
    ]
    assert all(len(line) <= 80 for line in lines[:-1])
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in target.parent.iterdir()] == ["edited"]
    source, again = View.load(model), View.load(target)
    for view in (source, again):
        align(view.model)
    ids = random_ids((3, 19), generator)
    with edits.remove(source, "ffn", 0), edits.remove(source, "head", 1, 3), edits.swap(source, 1, 2):
        assert torch.equal(again.logits(ids), source.logits(ids))
    assert again.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    tokens = saved_tokens(tmp_path / "tokens.npy")
    said = command("measure", target, "--tokens", tokens, "--seq-len", 23, "--probe", "similarity").out
    words = "edited from tiny: removed ffn 0; removed head 3 of 1; swapped 1 and 2; layers run 0 2 1"
    assert f"note    {words}\n" in said


def test_every_order_option_at_once(model: Path, tmp_path: Path):
    arguments = ["--order", "2,1,0", "--swap", "0,2", "--repeat", "0:3", "--remove", "layer:1"]
    done = command("edit", model, *arguments, "--dtype", "bfloat16", "-o", tmp_path / "edited")
    assert (done.code, done.err) == (0, "")
    assert "layers run 0 0 0 2\n" in done.out and "repeated 0 to run 3 times\n" in done.out
    again = View.load(tmp_path / "edited", dtype="bfloat16")
    source = View.load(model, dtype="bfloat16")
    assert again.num_layers == 4
    for place, layer in enumerate((0, 0, 0, 2)):
        pairs = zip(again.layers[place].parameters(), source.layers[layer].parameters(), strict=True)
        assert all(torch.equal(here, there) for here, there in pairs)


def _assert_refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("transect: ") and outcome.err.endswith("\n") and outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.out + outcome.err and outcome.out == ""
    for word in words:
        assert word in outcome.err, outcome.err


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "nothing": ([], ("nothing to change", "--remove")),
    "unknown part": (["--remove", "mlp:1"], ("'mlp:1'", "attn, ffn, head, expert, layer")),
    "part without a layer": (["--remove", "ffn"], ("'ffn'", "ffn:3")),
    "part with a head": (["--remove", "ffn:1.2"], ("'ffn:1.2'", "ffn:3")),
    "head without a number": (["--remove", "head:1"], ("'head:1'", "head:3.0")),
    "negative layer": (["--remove", "ffn:-1"], ("'ffn:-1'",)),
    "layer beyond": (["--remove", "ffn:3"], ("layer 3 does not exist", "0 to 2")),
    "head beyond": (["--remove", "head:1.4"], ("head is 4", "0 to 3")),
    "swap of one": (["--swap", "1"], ("'1'", "4,5")),
    "swap with itself": (["--swap", "1,1"], ("'1,1'", "twice")),
    "swap beyond": (["--swap", "1,7"], ("layer 7 does not exist",)),
    "order of words": (["--order", "0,one"], ("'0,one'", "0,2,1")),
    "order beyond": (["--order", "0,5"], ("layer 5 does not exist",)),
    "order as it is": (["--order", "0,1,2"], ("nothing to change",)),
    "repeat without times": (["--repeat", "1"], ("'1'", "3:2")),
    "repeat beyond": (["--repeat", "5:2"], ("layer 5 does not exist",)),
    "no layer left": (["--order", "1", "--remove", "layer:1"], ("no layer of 0 to 2 is left",)),
    "part of a layer left out": (["--order", "0,1", "--remove", "ffn:2"], ("layer 2 does not run",)),
    "unknown dtype": (["--remove", "ffn:1", "--dtype", "float31"], ("'float31'",)),
    "unknown option": (["--removed", "ffn:1"], ("--removed", "--remove")),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case: str, model: Path, tmp_path: Path):
    arguments, words = WRONG[case]
    _assert_refused(command("edit", model, *arguments, "-o", tmp_path / "deep" / "edited"), *words)
    assert not any(tmp_path.iterdir())


def test_what_the_architecture_cannot_express(tmp_path: Path):
    shared = saved_model(tmp_path / "shared", "albert")
    refused = command("edit", shared, "--remove", "ffn:1", "-o", tmp_path / "edited")
    _assert_refused(refused, "albert cannot express", "(removed ffn 1)", "share their weights", "nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_models_and_folders_that_cannot_be_used(model: Path, tmp_path: Path):
    def edited(source: Path, target: object) -> Outcome:
        return command("edit", source, "--remove", "ffn:1", "-o", target)

    _assert_refused(edited(tmp_path / "absent", tmp_path / "edited"), "no model folder", "absent")
    before = contents(model)
    _assert_refused(edited(model, model), "not an empty folder", str(model))
    assert contents(model) == before
    (tmp_path / "file").write_text("in the way")
    _assert_refused(edited(model, tmp_path / "file"), "not an empty folder")
    for target in (tmp_path / "file" / "edited", "/proc/transect/edited"):
        _assert_refused(edited(model, target), "cannot write")
    _assert_refused(command("edit", model, "--remove", "ffn:1"), "Missing option")
    assert contents(tmp_path) == {"file"}


def _process(model: Path, target: Path, **settings) -> subprocess.Popen:
    line = [sys.executable, "-m", "transect", "edit", str(model), "--remove", "ffn:1", "-o", str(target)]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **settings
    )


def test_a_disk_that_is_full(model: Path, tmp_path: Path):
    """No file may grow beyond 100 kB; the weights need more."""
    assert (model / "model.safetensors").stat().st_size > 150_000
    limit = (100_000, 100_000)
    with _process(model, tmp_path / "edited", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) as p:
        out, err = p.communicate(timeout=120)
    _assert_refused(Outcome(p.returncode, out, err), "cannot write", "edited", "make room")
    assert not any(tmp_path.iterdir())


def test_ctrl_c_while_it_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The signal comes when the weights are there and the folder has not got its name."""
    from transect.view import commit

    seen: list[set[str]] = []

    def interrupted(*_: object) -> None:
        seen.append(contents(tmp_path))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commit, "_compare", interrupted)
    stopped = command("edit", model, "--remove", "ffn:1", "-o", tmp_path / "edited")
    assert stopped.code == 130 and stopped.err.count("\n") == 1
    assert any(name.endswith("model.safetensors") for name in seen[0])
    assert not any(tmp_path.iterdir())
