"""Mixtral: k experts for a token, weighted by the softmax over the chosen ones; one sliding window or none."""

from typing import Any

from transect.models.config import ModelConfig
from transect.models.convert import _decoder, _experts
from transect.models.convert._attributes import Attributes
from transect.models.convert.base import Family


def _settings(read: Attributes) -> dict[str, Any]:
    read.only("router_jitter_noise", 0.0, why="the noise would also reach the experts; set it to 0")
    made = _decoder.settings(read, window=read("sliding_window"))
    return made | {"ffn": _experts.settings(read, "num_local_experts", normalised=True)}


def _native(settings: ModelConfig) -> dict[str, Any]:
    return _decoder.native(settings) | {
        "head_dim": _decoder.head_width(settings),
        "sliding_window": settings.layer_configs[0].attention.window,
        **_experts.native(settings, "num_local_experts"),
    }


FAMILY = Family(
    name="mixtral",
    classes=_decoder.classes("Mixtral"),
    settings=_settings,
    native=_native,
    trunk=_decoder.TRUNK + _experts.TRUNK,
    heads=_decoder.HEADS,
)
