"""Models of our own: their settings say what stands in which place, and follow the layers when these move."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from transect.errors import InputError

if TYPE_CHECKING:
    from transect.models.config import ModelConfig

_KIND = "transect"


def settings_of(model: PreTrainedModel) -> "ModelConfig | None":
    """The settings of one of our models; None for any other."""
    return model.config.settings if model.config.model_type == _KIND else None


def heads_of(model: PreTrainedModel, place: int) -> int:
    """Attention heads of the layer in a place of the executed order; layers of our models may differ in them."""
    settings = settings_of(model)
    if settings is None:
        return model.config.num_attention_heads
    return settings.layer_configs[settings.modules[place]].attention.heads


def moved(settings: "ModelConfig", order: Sequence[int]) -> "ModelConfig":
    """The settings of a model whose layer in place p is layer `order[p]` of this one, with weights of its own.

    They have no penalties: these belong to the training of the layers that were there, whose weights or number they may
    name. Raises InputError where overrides cannot say that.
    """
    layers = [settings.layer_configs[settings.modules[index]] for index in order]
    plain = [layer.plain() for layer in layers]
    base = {name: value for name, value in settings.plain().items() if name in plain[0]}
    places: dict[int, list[int]] = {}
    for place, layer in enumerate(plain):
        if layer != base:
            places.setdefault(plain.index(layer), []).append(place)
    overrides = [{"layers": alike, "set": plain[first]} for first, alike in places.items()]
    result = settings.but(layers=len(order), share=None, overrides=overrides, penalties=[])
    if list(result.layer_configs) != layers:
        raise InputError("the settings of its layers cannot be written in that order; leave the layers where they are")
    return result


def dropped_penalties(model: PreTrainedModel) -> list[str]:
    """The penalties that a model loses when its layers move, by name."""
    settings = settings_of(model)
    return [] if settings is None else [penalty.kind for penalty in settings.penalties]


@contextmanager
def resettled(model: PreTrainedModel, order: Sequence[int]) -> Iterator[None]:
    """Let one of our models have the settings of another order of layers; those it had come back after it.

    Its penalties rest, as an edited model is measured, not trained: see `moved`.
    """
    settings = settings_of(model)
    assert settings is not None
    new, base, config = moved(settings, order), model.base_model, model.config
    before, own = config.architecture, {name: base.__dict__[name] for name in ("_settings", "penalties")}
    base.__dict__.update(_settings=new, penalties=[])
    config.architecture = new.plain()
    try:
        yield
    finally:
        base.__dict__.update(own)
        config.architecture = before
