"""Qwen3: each head's queries and keys normed; sliding windows in some layers."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    made = _decoder.settings(read, bias=read("attention_bias"), qk_norm="head")
    return made | {"ffn": _decoder.dense(read)} | _decoder.windowed(read)


def _native(settings: ModelConfig) -> dict[str, Any]:
    return _decoder.native(settings) | {
        "head_dim": _decoder.head_width(settings),
        "attention_bias": settings.layer_configs[0].attention.bias,
        "intermediate_size": _decoder.dense_width(settings),
        **_decoder.windows(settings),
    }


FAMILY = Family(
    name="qwen3",
    classes=_decoder.classes("Qwen3"),
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _decoder.DENSE,
    heads=_decoder.HEADS,
)
