"""GPT-2: LayerNorm before, learned positions; queries, keys and values in one transposed map."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder
from transect.models.convert._activations import ours, theirs
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family, Part, module
from transect.models.plug import Unfit


def _settings(read: Attributes) -> dict[str, Any]:
    read.ignore("reorder_and_upcast_attn", "n_ctx")  # float32 products under half precision; a copy of n_positions
    read.ignore("summary_type", "summary_use_proj", "summary_activation")  # of a class with two heads
    read.ignore("summary_proj_to_labels", "summary_first_dropout")
    width, heads, layers = read("n_embd"), read("n_head"), read("n_layer")
    scale = (width // heads) ** -0.5 if read("scale_attn_weights") else 1.0
    each = []
    if read("scale_attn_by_inverse_layer_idx"):
        each = [{"layers": [i], "set": {"attention": {"scale": scale / (i + 1)}}} for i in range(layers)]
    if read("resid_pdrop") != read("embd_pdrop"):
        each.append({"layers": ":", "set": {"dropout": read("resid_pdrop")}})
    return {
        "objective": "causal",
        "vocab_size": read("vocab_size"),
        "width": width,
        "layers": layers,
        "max_positions": read("n_positions"),
        "positions": "learned",
        "norm": {"layout": "pre", "type": "layer", "eps": read("layer_norm_epsilon")},
        "attention": {"heads": heads, "scale": scale, "dropout": read("attn_pdrop")},
        "ffn": {
            "kind": "dense",
            "width": read("n_inner") or 4 * width,
            "activation": ours(read, "activation_function"),
        },
        "head": {"tied": read("tie_word_embeddings")},
        "init": {"std": read("initializer_range")},
        "dropout": read("embd_pdrop"),
        "classifier_dropout": 0.0,
        "pad_token_id": read("pad_token_id"),
        "overrides": each,
    }


def _native(settings: ModelConfig) -> dict[str, Any]:
    if settings.positions != "learned":
        raise Unfit("positions", settings.positions, "learned")
    first = settings.layer_configs[0]
    activation = getattr(first.ffn, "activation", "gelu")
    return {
        "vocab_size": settings.vocab_size,
        "n_embd": settings.width,
        "n_head": first.attention.heads,
        "n_layer": settings.layers,
        "n_positions": settings.max_positions,
        "n_inner": _decoder.dense_width(settings),
        "activation_function": _OWN.get(activation, theirs(activation)),
        "layer_norm_epsilon": first.norm.eps,
        "resid_pdrop": first.dropout,
        "embd_pdrop": settings.dropout,
        "attn_pdrop": first.attention.dropout,
        "initializer_range": settings.init.std,
        "tie_word_embeddings": settings.head.tied,
        **_scales(settings),
    }


def _scales(settings: ModelConfig) -> dict[str, bool]:
    """Whether products are divided by the root of the head's width, and by the layer's number from 1."""
    used = [settings.layer_configs[index].attention for index in settings.modules]
    root = _decoder.head_width(settings) ** -0.5
    scales = [attention.scale or root for attention in used]
    by_layer = len(scales) > 1 and scales[1] == scales[0] / 2
    return {"scale_attn_weights": scales[0] != 1.0, "scale_attn_by_inverse_layer_idx": by_layer}


_OWN = {"gelu_tanh": "gelu_new"}
"""The name that GPT-2 files have, of a formula that rounds otherwise."""

_QKV = tuple(f"layers.{{}}.attn.{name}" for name in "qkv")


def _turned(ours: str, theirs: str) -> tuple[Part, Part]:
    """A linear map whose weight they keep with inputs first."""
    return Part((f"{ours}.weight",), f"{theirs}.weight", transposed=True), Part((f"{ours}.bias",), f"{theirs}.bias")


FAMILY = Family(
    name="gpt2",
    classes={
        "TransectModel": "GPT2Model",
        "TransectForCausalLM": "GPT2LMHeadModel",
        "TransectForSequenceClassification": "GPT2ForSequenceClassification",
    },
    settings=_settings,
    native=_native,
    trunk=(
        *module("embeddings.tokens", "wte"),
        *module("embeddings.positions", "wpe"),
        *module("layers.{}.attn_residual.norm", "h.{}.ln_1"),
        Part(tuple(f"{name}.weight" for name in _QKV), "h.{}.attn.c_attn.weight", transposed=True),
        Part(tuple(f"{name}.bias" for name in _QKV), "h.{}.attn.c_attn.bias"),
        *_turned("layers.{}.attn.out", "h.{}.attn.c_proj"),
        *module("layers.{}.ffn_residual.norm", "h.{}.ln_2"),
        *_turned("layers.{}.ffn.up", "h.{}.mlp.c_fc"),
        *_turned("layers.{}.ffn.down", "h.{}.mlp.c_proj"),
        *module("final_norm", "ln_f"),
    ),
    heads=_decoder.HEADS,
)
