"""Llama: gated FFN, biases everywhere or nowhere."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    read.ignore("pretraining_tp")  # how a product was computed once
    made = _decoder.settings(read, bias=read("attention_bias"))
    return made | {"ffn": _decoder.dense(read, bias=read("mlp_bias"))}


def _native(settings: ModelConfig) -> dict[str, Any]:
    first = settings.layer_configs[0]
    return _decoder.native(settings) | {
        "head_dim": _decoder.head_width(settings),
        "attention_bias": first.attention.bias,
        "intermediate_size": _decoder.dense_width(settings),
        "mlp_bias": getattr(first.ffn, "bias", False),
    }


FAMILY = Family(
    name="llama",
    classes=_decoder.classes("Llama"),
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _decoder.DENSE,
    heads=_decoder.HEADS,
)
