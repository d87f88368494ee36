"""Saved models: whole or not at all, in parts, with their tokenizer, and readable by another process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import transect as tx
from families import VOCAB, enliven, random_ids
from shell import command, saved_tokens
from transect.errors import InputError
from transect.models import (
    ModelConfig,
    TransectForCausalLM,
    TransectForMaskedLM,
    TransectForMultipleChoice,
    TransectForSequenceClassification,
    TransectModel,
    hf,
)
from transect.models.transformer import TransectPreTrainedModel

OWN = {
    "vocab_size": VOCAB,
    "width": 24,
    "layers": 3,
    "attention": {"heads": 4, "bias": False},
    "ffn": {"kind": "sparse", "blocks": 13, "block_size": 7, "active_blocks": 3, "selector": "bias_balanced"},
    "block": {"kind": "caa", "outer_ratio": 0.0},
}
NATIVE = {
    "vocab_size": VOCAB,
    "width": 24,
    "layers": 3,
    "attention": {"heads": 4, "bias": False},
    "norm": {"type": "rms"},
    "ffn": {"width": 37, "gated": True, "bias": False, "activation": "silu"},
}
KINDS = {
    TransectModel: {},
    TransectForCausalLM: {},
    TransectForSequenceClassification: {},
    TransectForMaskedLM: {"objective": "masked"},
    TransectForMultipleChoice: {"objective": "masked"},
}


def own(kind: type[TransectPreTrainedModel] = TransectForCausalLM, **changes) -> TransectPreTrainedModel:
    model = kind.make(ModelConfig.parse(OWN | changes)).eval()
    enliven(model, 1)
    for layer in model.trunk.layers:
        layer.attn.inner.selector.bias.copy_(torch.arange(13) / 17)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", pad_token="w1")


@pytest.fixture
def ids(generator: torch.Generator) -> torch.Tensor:
    return random_ids((2, 11), generator)


# what is in the folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_comes_back(kind: type[TransectPreTrainedModel], tmp_path: Path, ids: torch.Tensor) -> None:
    model = own(kind, **KINDS[kind])
    assert hf.save(model, tmp_path / "m") == (tmp_path / "m").resolve()
    again = kind.from_pretrained(tmp_path / "m", dtype=torch.float32)
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert again.settings == model.settings
    assert type(tx.View.load(tmp_path / "m").model) is kind or kind is TransectForMultipleChoice


@pytest.mark.parametrize("changes", [OWN, NATIVE], ids=["own", "native"])
def test_parts(changes: dict, tmp_path: Path, ids: torch.Tensor) -> None:
    model = TransectForCausalLM.make(ModelConfig.parse(changes)).eval()
    native = changes is NATIVE
    hf.save(model, tmp_path / "m", tokenizer(), native=native, max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    parts = [name for name in names if name.endswith(".safetensors")]
    assert len(parts) > 2 and "model.safetensors.index.json" in names
    assert all((tmp_path / "m" / part).stat().st_size < 25_000 for part in parts)
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)
    assert ("modeling_transect.py" in names) == (not native)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("w5 w7") == [5, 7]


def test_the_module_beside_holds_no_code(tmp_path: Path) -> None:
    hf.save(own(), tmp_path / "m")
    lines = (tmp_path / "m" / "modeling_transect.py").read_text().splitlines()
    assert len(lines) == 3 and [line for line in lines if line and '"""' not in line] == [
        "from transect.models import TransectConfig as TransectConfig, TransectForCausalLM as TransectForCausalLM"
    ]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_transect.TransectConfig",
        "AutoModelForCausalLM": "modeling_transect.TransectForCausalLM",
    }


# other processes


def run(program: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "c")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoConfig
model = AutoModelForCausalLM.from_pretrained("m", dtype=torch.float32{options})
ids, logits = torch.load("expected.pt")
with torch.no_grad():
    assert (model(ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
assert model.generate(ids, max_new_tokens=3, pad_token_id=0).shape[1] > ids.shape[1]
model.save_pretrained("again")
print(type(model).__module__)
"""


@pytest.mark.parametrize(
    ("first", "options"),
    [("import transect.models\n", ""), ("", ", trust_remote_code=True")],
    ids=["package imported", "remote code trusted"],
)
def test_reload_in_a_fresh_process(first: str, options: str, tmp_path: Path, ids: torch.Tensor) -> None:
    model = own()
    hf.save(model, tmp_path / "m")
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    done = run(first + LOAD.format(options=options), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "transect.models.heads"
    saved_again = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert saved_again == sorted(path.name for path in (tmp_path / "m").iterdir())


def test_without_either_the_reason_is_given(tmp_path: Path) -> None:
    hf.save(own(), tmp_path / "m")
    done = run("from transformers import AutoConfig; AutoConfig.from_pretrained('m')", tmp_path)
    assert done.returncode and "trust_remote_code" in done.stderr


def test_a_native_folder_needs_nothing_of_ours(tmp_path: Path, ids: torch.Tensor) -> None:
    model = TransectForCausalLM.make(ModelConfig.parse(NATIVE)).eval()
    hf.save(model, tmp_path / "m", native=True)
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    done = run("import sys; sys.modules['transect'] = None\n" + LOAD.format(options=""), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "transformers.models.llama.modeling_llama"


# measuring


def test_a_saved_model_is_measured(tmp_path: Path) -> None:
    hf.save(own(), tmp_path / "m", tokenizer())
    tokens, out = saved_tokens(tmp_path / "tokens.npy", documents=31), tmp_path / "out"
    done = command("measure", tmp_path / "m", "--tokens", tokens, "--probe", "jump", "--seq-len", 23, "--output", out)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["layer"] for row in rows if row["metric"] == "displacement"} >= {0, 1, 2}


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _missing_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.attn.q.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _unknown_setting(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["widht"] = 3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("harm", [_empty_weights, _cut_weights, _no_weights, _missing_weight, _unknown_setting])
def test_a_damaged_folder_is_named_in_one_line(harm, tmp_path: Path) -> None:
    hf.save(own(), tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(InputError) as refused:
        tx.View.load(tmp_path / "m")
    text = str(refused.value)
    assert "\n" not in text
    words = {_missing_weight: "model.layers.1.attn.q.weight", _unknown_setting: "did you mean 'width'"}
    assert words.get(harm, str(tmp_path / "m")) in text


# whole or not at all


def test_nothing_is_written_over(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    hf.save(own(), target)
    before = sorted(target.iterdir())
    with pytest.raises(InputError, match="not an empty folder"):
        hf.save(own(), target)
    assert sorted(target.iterdir()) == before


def test_a_stop_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            assert (Path(folder) / "model.safetensors").exists()
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        hf.save(own(), tmp_path / "deep" / "m", Broken())
    assert list(tmp_path.iterdir()) == []

    class Stopped:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save(own(), tmp_path / "m", Stopped())
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_native_class_is_refused_before_writing(tmp_path: Path) -> None:
    masked = own(TransectForMaskedLM, objective="masked")
    with pytest.raises(InputError, match="positions is 'rotary'"):
        hf.save(masked, tmp_path / "m", native=True)
    assert list(tmp_path.iterdir()) == []
