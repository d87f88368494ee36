"""What a model computes, setting by setting: defaults written out, what only training or drawing uses left out."""

from collections.abc import Iterator
from typing import Any, cast

from transect.models.blocks.caa import CAA
from transect.models.config import LayerConfig, ModelConfig
from transect.models.ffn.dense import Dense
from transect.models.ffn.sparse import Sparse

Resolved = dict[str, Any]

_TRAINING = {"init", "penalties", "dropout", "classifier_dropout", "pad_token_id"}
_OF_LAYERS = {*LayerConfig.model_fields, "overrides", "share"}


def resolved(settings: ModelConfig, head: bool) -> Resolved:
    """Paths such as `norm.layout (layer 2)` -> values; without `head`, nothing of the map to the vocabulary.

    Two models with equal weights compute the same exactly when these are equal.
    """
    plain = {name: value for name, value in settings.plain().items() if name not in _TRAINING | _OF_LAYERS}
    if not head:
        del plain["head"]
    plain["share"] = None if len(set(settings.modules)) == settings.layers else settings.share
    plain["norm"] = _norm(settings)  # that of the final norm
    found = dict(_flat(plain, ""))
    for place, index in enumerate(settings.modules):
        layer = _layer(settings.layer_configs[index], settings)
        found |= {f"{path} (layer {place})": value for path, value in _flat(layer, "")}
    return found


def differences(asked: Resolved, native: Resolved) -> list[tuple[str, Any, Any]]:
    """Paths with both values, in the order of `asked`, where they differ."""
    paths = [*asked, *(path for path in native if path not in asked)]
    return [(path, asked.get(path), native.get(path)) for path in paths if asked.get(path) != native.get(path)]


def _layer(layer: LayerConfig, model: ModelConfig) -> dict[str, Any]:
    attention = layer.attention
    head_width = attention.head_width or model.width // attention.heads
    plain = {name: value for name, value in layer.plain().items() if name not in _TRAINING}
    plain["attention"] |= {
        "kv_heads": attention.groups,
        "head_width": head_width,
        "out_bias": attention.bias if attention.out_bias is None else attention.out_bias,
        "scale": attention.scale or head_width**-0.5,
    }
    del plain["attention"]["dropout"]
    plain["norm"] = _norm(layer)
    plain["rotary"] = layer.rotary.plain() if model.positions == "rotary" else None
    plain["ffn"] = _ffn(layer, model)
    if isinstance(layer.block, CAA.Config) and layer.block.parts(layer, model)[1] is None:
        plain["block"] = {"kind": "standard"}  # nothing inside attention: the same to the last bit
    return plain


def _norm(layer: LayerConfig) -> dict[str, Any]:
    """RMSNorm has no bias, whatever the setting says."""
    return layer.norm.plain() | ({"bias": False} if layer.norm.type == "rms" else {})


def _ffn(layer: LayerConfig, model: ModelConfig) -> dict[str, Any]:
    plain = layer.ffn.plain()
    if isinstance(layer.ffn, Dense.Config):
        del plain["multiple"]
        return plain | {"width": layer.ffn.units(model)}
    if isinstance(layer.ffn, Sparse.Config):
        ffn = cast(Sparse.Config, layer.ffn)
        for name in ("expansion", "width", "backend"):
            del plain[name]
        sizes = {
            "blocks": ffn.count(model),
            "block_size": ffn.cells_per_block(model),
            "active_blocks": ffn.active(model),
        }
        return plain | sizes | {"selector": router(ffn.selector.plain())}
    return plain


def router(selector: dict[str, Any]) -> dict[str, Any]:
    """A selector as it works outside training; those that there are `top_k` by another name, as `top_k`."""
    kind = selector["kind"]
    if kind not in ("top_k", "switch", "gshard"):
        return selector
    same = selector["eval_capacity"] == "as_training"
    common = {"capacity": selector["capacity"] if same else selector["eval_capacity"]}
    plain = {"normalise": True, "scores": "softmax", "scale": 1.0, "active_groups": None, "kind": "top_k"}
    if kind == "gshard":
        return plain | common
    if kind == "top_k":
        groups = None if selector["active_groups"] in (None, selector["groups"]) else selector["active_groups"]
        return {name: selector[name] for name in plain} | {"active_groups": groups} | common
    if selector["gate"] not in ("softmax_kept", "softmax_all") or selector["gate_scale"] != "none":
        return {"gate": selector["gate"], "gate_scale": selector["gate_scale"], "kind": kind}
    return plain | {"normalise": selector["gate"] == "softmax_kept"} | common


def _flat(plain: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, dict) and name != "scaling":
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
