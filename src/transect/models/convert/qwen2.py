"""Qwen2: biases of queries, keys and values only; sliding windows in some layers."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    made = _decoder.settings(read, bias=True, out_bias=False)
    return made | {"ffn": _decoder.dense(read)} | _decoder.windowed(read)


def _native(settings: ModelConfig) -> dict[str, Any]:
    return {
        **_decoder.native(settings),
        "intermediate_size": _decoder.dense_width(settings),
        **_decoder.windows(settings),
    }


FAMILY = Family(
    name="qwen2",
    classes=_decoder.classes("Qwen2"),
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _decoder.DENSE,
    heads=_decoder.HEADS,
)
