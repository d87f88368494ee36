"""Qwen3-MoE: Qwen3 with experts in all layers or some, weighted by the softmax over all or over the chosen ones."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder, _experts
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    made = _decoder.settings(read, bias=read("attention_bias"), qk_norm="head", window=read("sliding_window"))
    read.ignore("use_sliding_window", "max_window_layers")  # sliding_window is None where it is not used
    step, dense = read("decoder_sparse_step"), set(read("mlp_only_layers"))
    dense |= {layer for layer in range(made["layers"]) if (layer + 1) % step}
    made["ffn"] = _experts.settings(
        read, "num_experts", read("norm_topk_prob"), size="moe_intermediate_size", dense=len(dense)
    )
    ffn = _decoder.dense(read)
    return made | ({"overrides": [{"layers": sorted(dense), "set": {"ffn": ffn}}]} if dense else {})


def _native(settings: ModelConfig) -> dict[str, Any]:
    first = settings.layer_configs[0]
    used = [settings.layer_configs[index] for index in settings.modules]
    dense = [layer for layer, config in enumerate(used) if not _experts.is_sparse(config)]
    window = first.attention.window
    return {
        **_decoder.native(settings),
        **({"intermediate_size": _decoder.dense_width(settings)} if dense else {}),
        "head_dim": _decoder.head_width(settings),
        "attention_bias": first.attention.bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "norm_topk_prob": _experts.normalised(settings),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        **_experts.native(settings, "num_experts", size="moe_intermediate_size"),
    }


FAMILY = Family(
    name="qwen3_moe",
    classes=_decoder.classes("Qwen3Moe"),
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _decoder.DENSE + _experts.TRUNK,
    heads=_decoder.HEADS,
)
