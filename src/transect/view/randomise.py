"""Put fresh random weights into one element of a layer, for as long as an edit lasts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from transect.errors import InputError
from transect.view.kinds import below, is_norm
from transect.view.sites import HALVES

if TYPE_CHECKING:
    from transect.view.layout import LayerMap
    from transect.view.view import View

ELEMENTS = ("ffn", "ffn_up", "ffn2", "attn", "attn_heads", "inner_ffn", "layer")
STD = 0.02


@contextmanager
def randomise(view: "View", element: str, layer: int, seed: int = 0) -> Iterator[None]:
    """Give the linear maps of an element untrained weights: truncated normal with std 0.02, biases 0; norms stay.

    This is what the code of arXiv 2101.04547 did when it meant to remove a part: the assignment of the trained weights
    never ran. Raises InputError for an element without weights of its own, or weights that other layers share.
    """
    if element not in ELEMENTS:
        raise InputError(f"{element} cannot be given random weights; allowed are {', '.join(ELEMENTS)}")
    view.check_layer(layer)
    owner = view.layers[layer]
    others = {id(p) for module in view.layers if module is not owner for p in module.parameters()}
    if view.layers.count(owner) > 1 or any(id(p) in others for p in owner.parameters()):
        raise InputError(f"layer {layer} of {view.name} shares its weights with other layers; they cannot be exchanged")
    chosen = _parameters(owner, view.maps[layer], element)
    if not chosen:
        raise InputError(f"layer {layer} of {view.name} has no {element} with weights of its own")
    with ExitStack() as stack:
        for number, (name, parameter) in enumerate(chosen):
            stack.callback(setattr, parameter, "data", parameter.data)
            fresh = torch.zeros(parameter.shape, dtype=torch.float32)
            if parameter.ndim > 1 and not name.endswith("bias"):  # fused experts have a row of biases each
                generator = torch.Generator().manual_seed(1_000_003 * seed + number)
                nn.init.trunc_normal_(fresh, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
            parameter.data = fresh.to(parameter.data)
        yield


def _parameters(owner: nn.Module, known: "LayerMap", element: str) -> list[tuple[str, nn.Parameter]]:
    attention = known.attn_root or None
    left_out = {"ffn_up": known.last_maps.get("ffn"), "attn_heads": known.last_maps.get("attn")}.get(element)
    if attention is None and element != "layer":
        return []
    found = []
    for path, module in owner.named_modules():
        if is_norm(module) or not _belongs(path, known, element):
            continue
        if left_out is None or not below(path, left_out):
            own = module.named_parameters(recurse=False)
            found += [(name, parameter) for name, parameter in own if parameter.ndim]  # not a residual's number
    return found


def _belongs(path: str, known: "LayerMap", element: str) -> bool:
    """Whether a module is a part of the element; an FFN inside attention is one of attention."""
    if element == "layer":
        return True
    if element in ("ffn2", "inner_ffn"):
        return below(path, known.roots.get(HALVES[element]))
    inside = below(path, known.attn_root)
    return inside if element.startswith("attn") else not inside and not below(path, known.roots.get("ffn2"))
