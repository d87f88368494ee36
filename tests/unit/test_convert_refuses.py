"""What cannot become one of our models, or a native one, is refused by name; what can computes the same."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, GPT2DoubleHeadsModel

from families import FAMILIES, HIDDEN, VOCAB, enliven, random_ids
from hf_layouts import LAYOUTS, apart, made
from transect.errors import InputError
from transect.models import TransectForCausalLM, TransectForMaskedLM, hf
from transect.models.config import ModelConfig

REFUSED: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "attribute that nobody knows": ("llama", {"clip_everything": 0.5}, ("llama", "clip_everything", "0.5")),
    "even if it is off": ("qwen3", {"use_new_thing": False}, ("use_new_thing", "False")),
    "clipped queries": ("olmoe", {"clip_qkv": 3.0}, ("clip_qkv", "3.0")),
    "noise of the router": ("mixtral", {"router_jitter_noise": 0.1}, ("router_jitter_noise", "0.1")),
    "activation": ("llama", {"hidden_act": "quick_gelu"}, ("hidden_act", "quick_gelu", "silu")),
    "activation of BERT's head": ("bert", {"hidden_act": "relu2"}, ("head.transform", "relu2")),
    "text-dependent rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 7.0, "factor": 2.0}},
        ("dynamic", "yarn"),
    ),
    "partial rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}},
        ("partial_rotary_factor", "0.5"),
    ),
    "kind of layer": ("qwen2", {"layer_types": ["chunked_attention"] * 3}, ("layer_types", "chunked_attention")),
    "family": ("gemma2", {}, ("gemma2", "llama, ")),
    "latent attention": ("deepseek_v3", {}, ("deepseek_v3", "latent", "bias_balanced")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses_by_name(case: str) -> None:
    name, settings, words = REFUSED[case]
    model = made(FAMILIES[name].but(**settings))
    with pytest.raises(InputError) as refused:
        hf.import_model(model)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("llama", {"pruned_heads": {1: [2]}}, "pruned_heads"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_import_refuses_attributes_of_a_configuration(name: str, change: dict, word: str) -> None:
    model = made(LAYOUTS[name])
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(InputError, match=word):
        hf.import_model(model)


def test_import_refuses_classes_and_weights() -> None:
    with pytest.raises(InputError, match=r"GPT2DoubleHeadsModel has no class of ours; of gpt2 .*GPT2LMHeadModel"):
        hf.import_model(GPT2DoubleHeadsModel(FAMILIES["gpt2"]()))
    switch = AutoConfig.for_model(
        "switch_transformers", vocab_size=VOCAB, d_model=HIDDEN, d_ff=11, num_layers=2, num_heads=2, d_kv=5
    )
    with pytest.raises(InputError, match="encoder and a decoder"):
        hf.import_model(AutoModel.from_config(switch))
    model = made(LAYOUTS["llama"])
    model.model.layers[1].mlp.extra = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.extra\.weight has no place"):
        hf.import_model(model)
    several = made(
        FAMILIES["bert"].but(problem_type="multi_label_classification"), auto=AutoModelForSequenceClassification
    )
    with pytest.raises(InputError, match="problem_type 'multi_label_classification'"):
        hf.import_model(several)
    with pytest.raises(InputError, match="no model folder"):
        hf.import_model("./nowhere")


BASE = {
    "vocab_size": VOCAB,
    "width": HIDDEN,
    "layers": 3,
    "positions": "rotary",
    "norm": {"type": "rms"},
    "attention": {"heads": 4, "bias": False},
    "ffn": {"kind": "dense", "gated": True, "activation": "silu", "width": 53, "bias": False},
    "head": {"tied": False},
}
MIXTURE = {"kind": "sparse", "blocks": 5, "block_size": 23, "active_blocks": 2, "gated": True, "activation": "silu"}
NO_CLASS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "norm": ({"norm": {"type": "rms", "layout": "branch"}}, ("norm.layout is 'branch'", "pre")),
    "kind of norm": ({"norm": {"type": "layer"}}, ("norm.type is 'layer'", "rms")),
    "no positions": ({"positions": "none"}, ("positions is 'none'",)),
    "some rotation": ({"rotary": {"fraction": 0.4}}, ("rotary.fraction (layer 0) is 0.4", "1.0")),
    "ungated": ({"ffn": {"kind": "dense", "width": 53, "bias": False}}, ("ffn.gated",)),
    "one layer wider": (
        {"overrides": [{"layers": [1], "set": {"ffn": {"width": 59}}}]},
        ("ffn.width (layer 1) is 59", "53"),
    ),
    "learned residual": ({"residual": {"attn": "learned"}}, ("residual.attn (layer 0) is 'learned'", "1.0")),
    "linear attention": ({"attention": {"heads": 4, "bias": False, "weights": "linear"}}, ("weights", "softmax")),
    "bias of the output alone": (
        {"attention": {"heads": 4, "bias": False, "out_bias": True}},
        ("attention.out_bias (layer 0) is True", "False"),
    ),
    "temperature": ({"attention": {"heads": 4, "bias": False, "scale": 0.7}}, ("attention.scale (layer 0) is 0.7",)),
    "shared layers": ({"share": [0]}, ("share is [0]", "None")),
    "scaled embedding": ({"embedding": {"scale": 2.0}}, ("embedding.scale is 2.0", "1.0")),
    "bias of the head": ({"head": {"tied": False, "bias": True}}, ("head.bias is True",)),
    "another block": ({"block": "parallel"}, ("block.kind (layer 0) is 'parallel'", "standard")),
    "two windows": (
        {"overrides": [{"layers": [i], "set": {"attention": {"window": 3 + i}}} for i in (0, 1)]},
        ("attention.window",),
    ),
    "binary gates": ({"ffn": MIXTURE | {"selector": {"kind": "switch", "gate": "binary"}}}, ("selector.gate",)),
    "sigmoid scores": ({"ffn": MIXTURE | {"selector": {"kind": "top_k", "scores": "sigmoid"}}}, ("selector.scores",)),
    "capacity": ({"ffn": MIXTURE | {"selector": {"kind": "top_k", "capacity": 2.0}}}, ("selector.capacity",)),
    "averaged keys": ({"ffn": MIXTURE | {"selector": "avg_k"}}, ("selector",)),
    "shared blocks": ({"ffn": MIXTURE | {"selector": "top_k", "shared_blocks": 1}}, ("shared_blocks (layer 0) is 1",)),
    "experts not gated": ({"ffn": MIXTURE | {"selector": "top_k", "gated": False}}, ("ffn.gated (layer 0) is False",)),
}


@pytest.mark.parametrize("case", NO_CLASS)
def test_export_refuses_what_no_class_computes(case: str) -> None:
    change, words = NO_CLASS[case]
    model = TransectForCausalLM.make(ModelConfig.parse(BASE | change))
    with pytest.raises(InputError) as refused:
        hf.export_model(model)
    text = str(refused.value)
    assert all(word in text for word in words), text
    assert "\n" not in text and "native=False" in text


def test_export_refuses_by_family_and_class() -> None:
    model = TransectForCausalLM.make(ModelConfig.parse(BASE))
    assert type(hf.export_model(model)).__name__ == "LlamaForCausalLM"
    with pytest.raises(InputError, match=r"qk_norm \(layer 0\) is 'none'.*qwen3, has 'head'"):
        hf.export_model(model, family="qwen3")
    with pytest.raises(InputError, match=r"'lama' has no class of ours.*did you mean 'llama'"):
        hf.export_model(model, family="lama")
    with pytest.raises(InputError, match="LlamaForCausalLM"):
        hf.export_model(hf.export_model(model))  # pyright: ignore[reportArgumentType]
    wide = ModelConfig.parse(BASE | {"attention": {"heads": 3, "head_width": 14, "bias": False}})
    with pytest.raises(InputError, match=r"the nearest, llama, has .*hidden size \(40\) is not a multiple"):
        hf.export_model(TransectForCausalLM.make(wide), family="llama")
    masked = TransectForMaskedLM.make(ModelConfig.parse(BASE | {"objective": "masked"}))
    with pytest.raises(InputError, match="positions is 'rotary'"):
        hf.export_model(masked)


CHANGES: dict[str, list] = {
    "positions": ["rotary", "learned"],
    "norm.type": ["rms", "layer"],
    "norm.layout": ["pre", "sandwich"],
    "norm.eps": [1e-5, 1e-3],
    "attention.bias": [False, True],
    "attention.out_bias": [None, False, True],
    "attention.kv_heads": [None, 2],
    "attention.head_width": [None, 14],
    "attention.qk_norm": ["none", "head", "full"],
    "attention.window": [None, 3],
    "attention.scale": [None, 1.0],
    "ffn.gated": [False, True],
    "ffn.bias": [False, True],
    "ffn.activation": ["silu", "gelu", "gelu_tanh", "relu2", "identity"],
    "head.tied": [True, False],
    "head.bias": [False, True],
}
_PLAIN = {"norm": {"type": "layer"}, "positions": "learned", "ffn": {"kind": "dense", "width": 53}}
STARTS = (
    BASE,
    BASE | {"attention": {"heads": 4, "out_bias": False}},
    BASE | {"attention": {"heads": 4, "qk_norm": "head"}},
    BASE | _PLAIN | {"attention": {"heads": 4}},
)


def varied(generator: torch.Generator) -> ModelConfig:
    """One of the starts with one to three settings drawn anew."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    start = STARTS[draw(len(STARTS))]
    settings = {name: dict(value) if isinstance(value, dict) else value for name, value in start.items()}
    for _ in range(1 + draw(3)):
        path = list(CHANGES)[draw(len(CHANGES))]
        owner, _, key = path.rpartition(".")
        (settings[owner] if owner else settings)[key] = CHANGES[path][draw(len(CHANGES[path]))]
    return ModelConfig.parse(settings)


def test_export_computes_the_same_or_refuses(generator: torch.Generator) -> None:
    """Random architectures: whatever is exported has equal logits, so no setting is lost on the way."""
    exported: set[str] = set()
    refused = 0
    for _ in range(80):
        settings = varied(generator)
        model = TransectForCausalLM.make(settings).eval()
        enliven(model, 1)
        ids = random_ids((2, 11), generator)
        try:
            export = hf.export_model(model)
        except InputError:
            refused += 1
            continue
        exported.add(export.config.model_type)
        with torch.no_grad():
            assert apart(export(ids).logits, model(ids).logits) <= 1e-5, settings
    assert refused > 10 and {"llama", "qwen2", "qwen3", "gpt2"} <= exported
