"""Run a model's layers in another order: the module list, the config and the cache indices move together."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from transect.errors import InputError
from transect.view.own import resettled, settings_of
from transect.view.walk import Walk

if TYPE_CHECKING:
    from transect.view.view import View

PER_LAYER = ("layer_types", "attention_layers", "no_rope_layers", "mlp_layer_types", "layers_block_type")
"""Config lists with one entry a layer; they move with the layers."""


@contextmanager
def reordered(view: "View", order: Sequence[int]) -> Iterator[None]:
    """Run `order` (indices into the current order) in place of the current layers, and restore everything after it.

    A layer that runs more than once gets copies that share its parameters, so that each has a cache index of its own.
    The executed order is followed in every pass; OrderError when it is not the one asked for.
    """
    count = view.num_layers
    wrong = [layer for layer in order if not 0 <= layer < count]
    if wrong or not order:
        given = f"layer {wrong[0]}" if wrong else "an empty order"
        raise InputError(f"{given} cannot be run; {view.name} has layers 0 to {count - 1}")
    container = view.base.get_submodule(view.container)
    members = len(list(container.children()))
    own = settings_of(view.model) is not None
    looped = len(view.modules) != members and not own
    if looped and getattr(view.model.config, "num_hidden_groups", None) != members:
        raise InputError(f"{view.name} runs {view.container} in a loop; the order of its layers cannot be changed")
    layers = _distinct([view.layers[index] for index in order])
    saved = (view.layers, view.maps, view.executed, view.modules)
    with ExitStack() as stack:
        stack.callback(_assign, view.base, view.container, container)
        stack.callback(_restore_view, view, saved)
        _assign(view.base, view.container, nn.ModuleList(layers))
        view.layers = layers
        view.maps = [saved[1][index] for index in order]
        view.executed = [saved[2][index] for index in order]
        view.modules = list(range(len(order)))
        if own:
            stack.enter_context(resettled(view.model, order))
        for config in () if own else _configs(view.model):
            _repair_config(stack, config, order, count)
        for place, layer in enumerate(layers):
            _repair_cache_index(stack, layer, place)
        stack.enter_context(Walk(view))
        yield


def _distinct(layers: list[nn.Module]) -> list[nn.Module]:
    """The same layers; one that comes again is a copy with the same parameters."""
    met: set[int] = set()
    result = []
    for layer in layers:
        result.append(_sharing_copy(layer) if id(layer) in met else layer)
        met.add(id(layer))
    return result


def _sharing_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(twin, name, OrderedDict(getattr(module, name)))
    twin._modules = {name: child and _sharing_copy(child) for name, child in module._modules.items()}
    return twin


def _assign(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def _restore_view(view: "View", saved: tuple) -> None:
    view.layers, view.maps, view.executed, view.modules = saved


def _configs(model: nn.Module) -> list[Any]:
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return list(found.values())


def _repair_config(stack: ExitStack, config: Any, order: Sequence[int], count: int) -> None:
    for name in ("num_hidden_layers", "num_hidden_groups"):
        if isinstance(getattr(config, name, None), int):
            _set(stack, config, name, len(order))
    for name in PER_LAYER:
        entries = getattr(config, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == count:
            _set(stack, config, name, type(entries)(entries[index] for index in order))


def _repair_cache_index(stack: ExitStack, layer: nn.Module, place: int) -> None:
    for module in layer.modules():
        for name in ("layer_idx", "layer_id"):  # the second is GPT-Neo's word
            if isinstance(getattr(module, name, None), int):
                _set(stack, module, name, place)


def _set(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
