"""Loading models from every kind of source, and logits that do not depend on padding."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FEED_FORWARD, VOCAB, random_ids, tiny_model
from transect.errors import InputError
from transect.view.view import View


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# padding


@pytest.fixture(scope="module", params=["gpt2", "bert", "llama", "mistral/sliding", "modernbert"])
def padded_view(request) -> View:
    return View(tiny_model(request.param, torch.float64))


LENGTHS = (13, 5, 1)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_logits_do_not_depend_on_padding(padded_view, side, generator):
    ids, mask = random_ids((3, 17), generator), torch.zeros(3, 17, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        start = {"left": 17 - length, "right": 0, "both": 2}[side]
        mask[row, start : start + length] = 1
    logits = padded_view.logits(ids, mask)
    assert logits.shape == (3, 17, VOCAB)
    assert not logits[mask == 0].any()
    for row in range(3):
        kept = mask[row].bool()
        # rotations, Llama's norms and attention weights are float32 inside
        close(logits[row, kept], padded_view.logits(ids[row : row + 1, kept])[0], atol=padded_atol(padded_view))


def padded_atol(view: View) -> float:
    return 1e-5 if view.model.config.model_type in ("llama", "mistral", "modernbert") else 1e-10


def test_full_mask_is_no_mask(padded_view, generator):
    ids = random_ids((2, 7), generator)
    assert torch.equal(padded_view.logits(ids, torch.ones(2, 7)), padded_view.logits(ids))


def test_hidden_states_of_text_are_finite_in_a_padded_batch(padded_view, generator):
    ids, mask = random_ids((2, 19), generator), torch.ones(2, 19, dtype=torch.bool)
    mask[0, 3:] = False
    with torch.no_grad():
        hidden = padded_view.run(ids, mask)
        alone = padded_view.run(ids[:1, :3])
    close(hidden[:1, :3], alone, atol=padded_atol(padded_view))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in padded_view.model.modules())


# ids and heads


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_token_id_out_of_range(wrong):
    view = View(tiny_model("gpt2"))
    with pytest.raises(InputError, match=f"token id {wrong} is out of range for .*: allowed are 0 to {VOCAB - 1}"):
        view.logits(torch.tensor([[5, wrong, 6]]))


def test_model_without_a_head_has_no_logits(generator):
    whole = tiny_model("gpt2")
    view, ids = View(whole.transformer), random_ids((2, 7), generator)
    assert not view.has_head
    with pytest.raises(InputError, match="has no head"):
        view.logits(ids)
    with torch.no_grad():
        assert torch.equal(view.run(ids, head=True), View(whole).run(ids))


def test_properties():
    view = View(tiny_model("gpt2"))
    assert (view.num_layers, view.vocab_size, view.width, view.max_positions) == (3, VOCAB, 40, 64)
    assert view.layer_path(1) == "transformer.h.1"
    assert View(tiny_model("roberta")).max_positions == 64
    assert View(tiny_model("albert")).layer_path(2) == "albert.encoder.albert_layer_groups.0"


# live models


def test_live_model():
    model = tiny_model("gpt2", torch.float64).train()
    view = View.load(model)
    assert view.model is model
    assert view.dtype == torch.float64
    assert not model.training
    assert View.load(model, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("source", [3, None, torch.nn.Linear(2, 3)])
def test_source_of_a_wrong_kind(source):
    with pytest.raises(InputError, match=f"cannot load a {type(source).__name__}; give a folder"):
        View.load(source)


# folders


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == same and torch.equal(a.float(), b.float()) for (name, a), (same, b) in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models; copy one before changing it."""
    folders = {}
    for name in ("gpt2", "bert", "llama"):
        folders[name] = tmp_path_factory.mktemp("models") / f"tiny-{name}"
        tiny_model(name).save_pretrained(folders[name])
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["gpt2"], tmp_path / "gpt2-copy")


@pytest.mark.parametrize("dtype", ["float32", "float64", None, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_folder(saved, name, dtype, generator):
    view, ids = View.load(saved[name], dtype=dtype), random_ids((2, 7), generator)
    wide = dtype in ("float64", torch.float64)
    assert view.dtype == (torch.float64 if wide else torch.float32)
    assert view.name == f"tiny-{name}"
    assert view.revision is None
    assert view.tokenizer is None
    assert same_weights(view.model, tiny_model(name))
    # the file's model runs another implementation of attention
    close(view.logits(ids).float(), View(tiny_model(name)).logits(ids), atol=1e-5)


def test_folder_given_with_a_trailing_dot(saved, monkeypatch):
    monkeypatch.chdir(saved["gpt2"])
    assert View.load(".").name == "tiny-gpt2"


def test_folder_keeps_its_head(saved):
    assert View.load(saved["gpt2"]).has_head
    assert View.load(saved["bert"]).has_head


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"no model folder .*/nothing; give a folder with config.json"):
        View.load(tmp_path / "nothing")


def test_folder_without_config(tmp_path):
    with pytest.raises(InputError, match=r"is not a model folder: it has no config.json"):
        View.load(tmp_path)


def test_file_that_is_no_model(folder):
    with pytest.raises(InputError, match=r"no model folder .*model.safetensors"):
        View.load(folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_model_type(folder):
    edit_config(folder, model_type="gpt99")
    with pytest.raises(InputError, match=r"cannot load .*gpt-?2-copy: .*gpt99") as refusal:
        View.load(folder)
    assert "\n" not in str(refusal.value)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot load .*gpt2-copy"):
        View.load(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot load .*gpt2-copy"):
        View.load(folder)


def test_missing_weight(folder):
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("h.1.mlp.c_fc.weight")}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight is not in the checkpoint"):
        View.load(folder)


def test_weight_of_a_wrong_shape(folder):
    edit_config(folder, n_inner=FEED_FORWARD + 2)
    with pytest.raises(InputError, match=r"cannot load .*gpt2-copy"):
        View.load(folder)


@pytest.mark.parametrize("dtype", ["float31", "int8"])
def test_unknown_dtype(saved, dtype):
    with pytest.raises(InputError, match=f"unknown dtype '{dtype}'; allowed are float32, float64, bfloat16, float16"):
        View.load(saved["gpt2"], dtype=dtype)


def test_unknown_device(saved):
    with pytest.raises(InputError, match="cannot use device 'nowhere'"):
        View.load(saved["gpt2"], device="nowhere")


def test_sharded_weights(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert same_weights(View.load(tmp_path / "sharded").model, model)


def test_provenance_gives_the_revision_and_note(folder):
    record = {"package": "some-model", "version": "0.1.0", "sha256": "0123456789abcdef" * 4, "note": "made dense"}
    (folder / "provenance.json").write_text(json.dumps(record))
    view = View.load(folder)
    assert view.revision == "some-model==0.1.0 sha256:0123456789abcdef"
    assert view.notes == ("made dense",)
    assert View.load(folder, revision="mine").revision == "mine"


def test_damaged_provenance(folder):
    for text in ("{", '{"package": "some-model"}'):
        (folder / "provenance.json").write_text(text)
        with pytest.raises(InputError, match=r"provenance\.json"):
            View.load(folder)


# run folders


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "my-run"
    for step in (2, 10):
        tiny_model("gpt2", seed=step).save_pretrained(root / "checkpoints" / f"step-{step}")
    (root / "checkpoints" / "step-11").mkdir()  # not complete
    return root


@pytest.mark.parametrize(("revision", "step"), [(None, 10), ("step-2", 2), ("step-10", 10)])
def test_run_folder(run_folder, revision, step):
    view = View.load(run_folder, revision)
    assert (view.name, view.revision) == ("my-run", f"step-{step}")
    assert same_weights(view.model, tiny_model("gpt2", seed=step))


@pytest.mark.parametrize("revision", ["step-3", "step-11"])
def test_unknown_revision_of_a_run_folder(run_folder, revision):
    with pytest.raises(InputError, match=f"has no checkpoint '{revision}'; it has step-10, step-2"):
        View.load(run_folder, revision)


def test_run_folder_without_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        View.load(tmp_path)


# GGUF

GGUF_LAYERS, GGUF_WIDTH, GGUF_HEADS, GGUF_VOCAB = 2, 32, 2, 37
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(GGUF_LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(GGUF_WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(GGUF_HEADS)
    writer.add_head_count_kv(GGUF_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(GGUF_VOCAB)
    tokens = ["<unk>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(GGUF_VOCAB - 3))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * GGUF_VOCAB)
    writer.add_token_types([2, 3, 3, *[1] * (GGUF_VOCAB - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, weight in gguf_weights().items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = {"ffn_down": FEED_FORWARD}
    outputs = {"ffn_gate": FEED_FORWARD, "ffn_up": FEED_FORWARD}
    shapes = {"token_embd": (GGUF_VOCAB, GGUF_WIDTH), "output": (GGUF_VOCAB, GGUF_WIDTH), "output_norm": (GGUF_WIDTH,)}
    for layer in range(GGUF_LAYERS):
        for name in NAMES.values():
            shape = (outputs.get(name, GGUF_WIDTH), inputs.get(name, GGUF_WIDTH))
            shapes[f"blk.{layer}.{name}"] = (GGUF_WIDTH,) if name.endswith("norm") else shape
    return {
        f"{name}.weight": (rng.normal(size=shape) * 0.2 + (1.0 if name.endswith("norm") else 0.0)).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("by_folder", [False, True])
def test_gguf(tmp_path, by_folder):
    write_gguf(tmp_path / "tiny.F32.gguf")
    view = View.load(tmp_path if by_folder else tmp_path / "tiny.F32.gguf")
    assert view.name == "tiny.F32"
    assert view.notes == ("weights of tiny.F32.gguf are quantised values made dense",)
    assert (view.num_layers, view.vocab_size, view.width) == (GGUF_LAYERS, GGUF_VOCAB, GGUF_WIDTH)
    weights = gguf_weights()
    for layer in range(GGUF_LAYERS):
        for ours, theirs in NAMES.items():
            if theirs in ("attn_q", "attn_k"):  # their rows are in another order in the file
                continue
            actual = view.layers[layer].get_submodule(ours).weight.detach()
            assert np.array_equal(actual.numpy(), weights[f"blk.{layer}.{theirs}.weight"])
    assert np.array_equal(view.model.lm_head.weight.detach().numpy(), weights["output.weight"])
    assert bool(view.logits(torch.arange(5, 16)[None]).isfinite().all())


def test_missing_gguf(tmp_path):
    with pytest.raises(InputError, match=r"no file .*nothing.gguf; give a GGUF file"):
        View.load(tmp_path / "nothing.gguf")


def test_damaged_gguf(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"cannot load .*tiny\.gguf"):
        View.load(tmp_path / "tiny.gguf")
