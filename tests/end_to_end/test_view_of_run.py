"""A checkpoint of a training run as a model: by `View.load` of the run, and by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import transect as tx
from families import VOCAB
from saving import TinyRun, kept, tokenizer
from shell import command
from transect.errors import InputError
from transect.view.load import located

IDS = torch.arange(7, 7 + 3 * 11).view(3, 11) % VOCAB


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, torch.Tensor]]:
    """A run with checkpoints of steps 2 and 10, and the live model's logits at each."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run, logits = TinyRun("sparse/bias_balanced", {"kind": "adamw", "lr": 0.01}), {}
    for steps in (2, 8):
        run.train(steps).save(kept(folder))
        logits[run.step] = _logits(run.model)
        run.model.train()
    assert not torch.equal(logits[2], logits[10])
    return folder, logits


@pytest.mark.parametrize(
    ("revision", "step"),
    [(None, 10), ("step-00000010", 10), ("step-00000002", 2), ("2", 2), ("10", 10), ("00000010", 10), (2, 2)],
)
def test_view_of_a_run_is_the_live_model_of_that_step(trained: Any, revision: Any, step: int) -> None:
    folder, logits = trained
    view = tx.View.load(str(folder), revision=revision)
    assert torch.equal(view.logits(IDS), logits[step])
    assert (view.name, view.revision) == ("tiny", f"step-{step:08d}")
    assert view.tokenizer.decode([5, 9]) == "w5 w9"


def test_rows_have_the_step(trained: Any) -> None:
    view = tx.View.load(str(trained[0] / "checkpoints" / "step-00000002"))
    rows = tx.measure(view, ["jump"], tx.data.from_tokens(IDS.numpy())).rows
    assert rows and {(row.model, row.revision, row.step) for row in rows} == {("tiny", "step-00000002", 2)}


@pytest.mark.parametrize("given", [{}, {"dtype": torch.float32}], ids=["plain", "dtype"])
def test_transformers_loads_it(trained: Any, given: dict[str, Any]) -> None:
    folder, logits = trained
    path = folder / "checkpoints" / "step-00000010"
    model = AutoModelForCausalLM.from_pretrained(path, **given)
    assert torch.equal(_logits(model), logits[10])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize("name", ["sparse/rand_hash", "standard/gated"])
def test_float64_and_tables_come_back(name: str, tmp_path: Path) -> None:
    run = TinyRun(name, dtype=torch.float64).train(1).save(kept(tmp_path))
    model, said = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoints" / "step-00000001", output_loading_info=True
    )
    assert model.dtype == torch.float64
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert torch.equal(_logits(model), _logits(run.model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-00000001", dtype="float32")
    assert half.dtype == torch.float32
    torch.testing.assert_close(_logits(half).double(), _logits(model), rtol=1e-4, atol=1e-4)


def test_masked_model(tmp_path: Path) -> None:
    run = TinyRun("standard/masked").train(1).save(kept(tmp_path))
    path = tmp_path / "checkpoints" / "step-00000001"
    assert torch.equal(_logits(AutoModelForMaskedLM.from_pretrained(path)), _logits(run.model))
    assert torch.equal(tx.View.load(str(tmp_path)).logits(IDS), _logits(run.model))


def test_saved_again_it_is_a_usual_folder(trained: Any, tmp_path: Path) -> None:
    folder, logits = trained
    AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step-00000010").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert torch.equal(tx.View.load(str(tmp_path / "model")).logits(IDS), logits[10])


def test_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    TinyRun().train(1).save(kept(tmp_path))
    whole = tmp_path / "checkpoints" / "step-00000001"
    (tmp_path / "checkpoints" / ".step-00000002.partial").mkdir()
    (tmp_path / "checkpoints" / ".step-00000002.partial" / "config.json").write_bytes(
        (whole / "config.json").read_bytes()
    )
    assert located(str(tmp_path), None).label == "step-00000001"
    whole.rename(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no checkpoint"):
        tx.View.load(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "state/model/00000-of-00001.safetensors"])
@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_damaged_newest_is_named_and_never_passed_over(file: str, harm: str, tmp_path: Path) -> None:
    run = TinyRun().train(1).save(kept(tmp_path)).train(1).save(kept(tmp_path))
    folder = tmp_path / "checkpoints" / "step-00000002"
    if harm == "removed":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-5])
    for source in (tmp_path, folder):
        with pytest.raises(InputError, match=rf"step-00000002/{file} is .*; ask for step-00000001 instead$") as refused:
            tx.View.load(str(source))
        assert "\n" not in str(refused.value)
    assert tx.View.load(str(tmp_path), revision="1").revision == "step-00000001"
    said = command("inspect", tmp_path)
    assert said.code != 0 and f"step-00000002/{file}" in said.err.replace("\n", "")
    assert run.step == 2


def test_damaged_optimizer_state_does_not_matter_to_a_view(tmp_path: Path) -> None:
    TinyRun().train(1).save(kept(tmp_path))
    (tmp_path / "checkpoints/step-00000001/state/optimizer/00000-of-00001.safetensors").write_bytes(b"")
    assert tx.View.load(str(tmp_path)).revision == "step-00000001"
