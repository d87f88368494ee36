"""Mistral: one sliding window for all layers, or none; no biases."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    made = _decoder.settings(read, window=read("sliding_window"))
    return made | {"ffn": _decoder.dense(read)}


def _native(settings: ModelConfig) -> dict[str, Any]:
    return _decoder.native(settings) | {
        "head_dim": _decoder.head_width(settings),
        "sliding_window": settings.layer_configs[0].attention.window,
        "intermediate_size": _decoder.dense_width(settings),
    }


FAMILY = Family(
    name="mistral",
    classes=_decoder.classes("Mistral"),
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _decoder.DENSE,
    heads=_decoder.HEADS,
)
