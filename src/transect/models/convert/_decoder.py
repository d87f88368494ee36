"""What Llama and the decoders after it have in common: RMSNorm before, rotary positions, gated FFN, no biases."""

from typing import Any

from transect.models.config import LayerConfig, ModelConfig
from transect.models.convert._activations import ours, theirs
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import module
from transect.models.ffn.dense import Dense
from transect.models.plug import Unfit

TRUNK = (
    *module("embeddings.tokens", "embed_tokens"),
    *module("layers.{}.attn_residual.norm", "layers.{}.input_layernorm"),
    *module("layers.{}.attn.q", "layers.{}.self_attn.q_proj"),
    *module("layers.{}.attn.k", "layers.{}.self_attn.k_proj"),
    *module("layers.{}.attn.v", "layers.{}.self_attn.v_proj"),
    *module("layers.{}.attn.out", "layers.{}.self_attn.o_proj"),
    *module("layers.{}.attn.q_norm", "layers.{}.self_attn.q_norm"),
    *module("layers.{}.attn.k_norm", "layers.{}.self_attn.k_norm"),
    *module("layers.{}.ffn_residual.norm", "layers.{}.post_attention_layernorm"),
    *module("final_norm", "norm"),
)
DENSE = (
    *module("layers.{}.ffn.gate", "layers.{}.mlp.gate_proj"),
    *module("layers.{}.ffn.up", "layers.{}.mlp.up_proj"),
    *module("layers.{}.ffn.down", "layers.{}.mlp.down_proj"),
)
HEADS = (*module("head.decoder", "lm_head"), *module("classifier", "score"))


def classes(name: str) -> dict[str, str]:
    """Our classes and those of a family called `name`."""
    return {
        "TransectModel": f"{name}Model",
        "TransectForCausalLM": f"{name}ForCausalLM",
        "TransectForSequenceClassification": f"{name}ForSequenceClassification",
    }


def settings(read: Attributes, **attention: Any) -> dict[str, Any]:
    """Settings that all of them have; `attention` is what a family adds to its part of them."""
    return {
        "objective": "causal",
        "vocab_size": read("vocab_size"),
        "width": read("hidden_size"),
        "layers": read("num_hidden_layers"),
        "max_positions": read("max_position_embeddings"),
        "positions": "rotary",
        "rotary": _rotary(read),
        "norm": {"layout": "pre", "type": "rms", "eps": read("rms_norm_eps")},
        "attention": {
            "heads": read("num_attention_heads"),
            "kv_heads": read("num_key_value_heads"),
            "head_width": read("head_dim"),
            "bias": False,
            "dropout": read("attention_dropout"),
        }
        | attention,
        "head": {"tied": read("tie_word_embeddings")},
        "init": {"std": read("initializer_range"), "depth_scaled": False},
        "classifier_dropout": 0.0,
        "pad_token_id": read("pad_token_id"),
    }


def dense(read: Attributes, bias: bool = False) -> dict[str, Any]:
    """A gated dense FFN."""
    return {
        "kind": "dense",
        "width": read("intermediate_size"),
        "activation": ours(read, "hidden_act"),
        "gated": True,
        "bias": bias,
    }


def dense_width(settings: ModelConfig) -> int:
    """The width of the first dense FFN; raises Unfit where there is none."""
    found = [layer.ffn for layer in settings.layer_configs if isinstance(layer.ffn, Dense.Config)]
    if not found:
        raise Unfit("ffn.kind", settings.layer_configs[0].ffn.kind, "dense")
    return found[0].units(settings)


def native(settings: ModelConfig) -> dict[str, Any]:
    """Their attributes that all of them have, from the first layer where a layer has them."""
    first = settings.layer_configs[0]
    attention, rotary = first.attention, first.rotary
    return {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.width,
        "num_hidden_layers": settings.layers,
        "max_position_embeddings": settings.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": rotary.theta} | (rotary.scaling or {}),
        "rms_norm_eps": first.norm.eps,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": settings.head.tied,
        "initializer_range": settings.init.std,
        "hidden_act": theirs(getattr(first.ffn, "activation", "silu")),
    }


def head_width(settings: ModelConfig) -> int:
    """The width of a head of the first layer."""
    attention = settings.layer_configs[0].attention
    return attention.head_width or settings.width // attention.heads


def windowed(read: Attributes) -> dict[str, Any]:
    """Windows of Qwen, layer by layer, as settings that replace `attention`'s own in some layers."""
    read.ignore("use_sliding_window", "max_window_layers")  # layer_types says it all
    kinds, window = read("layer_types"), read("sliding_window")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise read.misfit("layer_types", unknown.pop(), "full_attention and sliding_attention are allowed")
    sliding = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
    if not sliding or window is None:
        return {}
    return {"overrides": [{"layers": sliding, "set": {"attention": {"window": window}}}]}


def windows(settings: ModelConfig) -> dict[str, Any]:
    """The other way."""
    found = [layer.attention.window for layer in _executed(settings)]
    given = [window for window in found if window is not None]
    if not given:
        return {"use_sliding_window": False, "layer_types": ["full_attention"] * len(found)}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in found]
    return {"use_sliding_window": True, "sliding_window": given[0], "layer_types": kinds}


def _executed(settings: ModelConfig) -> list[LayerConfig]:
    return [settings.layer_configs[index] for index in settings.modules]


def _rotary(read: Attributes) -> dict[str, Any]:
    given = {name: value for name, value in read("rope_parameters").items() if value is not None and name != "type"}
    kind, theta = given.get("rope_type", "default"), given.pop("rope_theta")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        value = read("rope_parameters")["partial_rotary_factor"]
        raise read.misfit("partial_rotary_factor", value, "this family turns whole heads, in transformers too")
    if kind == "default":
        return {"theta": theta}
    if kind == "yarn" and "factor" not in given:
        given["factor"] = read("max_position_embeddings") / given["original_max_position_embeddings"]
    return {"theta": theta, "scaling": given}
