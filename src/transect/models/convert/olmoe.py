"""OLMoE: k experts for a token, weighted by the softmax over all of them or over the chosen ones; normed queries, keys.

With one expert a token and the softmax over all this is Switch's rule in a decoder: the nearest that transformers has.
"""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder, _experts
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    read.only("clip_qkv", why="queries, keys and values are not clipped here")
    made = _decoder.settings(read, bias=read("attention_bias"), qk_norm="full")
    return made | {"ffn": _experts.settings(read, "num_experts", normalised=read("norm_topk_prob"))}


def _native(settings: ModelConfig) -> dict[str, Any]:
    return _decoder.native(settings) | {
        "attention_bias": settings.layer_configs[0].attention.bias,
        "norm_topk_prob": _experts.normalised(settings),
        **_experts.native(settings, "num_experts"),
    }


FAMILY = Family(
    name="olmoe",
    classes={"TransectModel": "OlmoeModel", "TransectForCausalLM": "OlmoeForCausalLM"},
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _experts.TRUNK,
    heads=_decoder.HEADS,
)
