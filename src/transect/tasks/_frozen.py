"""Which weights of a view's model move in fine-tuning."""

from collections.abc import Iterator, Sequence

from torch import nn

from transect.errors import InputError
from transect.view.kinds import below, is_norm
from transect.view.layout import LayerMap
from transect.view.view import View

PARTS = ("attn", "ffn", "ffn2", "layer")


def chosen(view: View, frozen: Sequence[str], norms_only: bool) -> list[nn.Parameter]:
    """The parameters of the model without its head that move: all, or those of norms, less those of frozen parts.

    frozen: `layer:3`; `attn:3`, `ffn:3`, `ffn2:3`, without the norms around them; `embeddings`. Raises InputError for
    what is no part of the model.
    """
    held = {id(parameter) for part in frozen for parameter in _of(view, part)}
    modules = filter(is_norm, view.base.modules()) if norms_only else (view.base,)
    found = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return [parameter for key, parameter in found.items() if key not in held]


def _of(view: View, part: str) -> list[nn.Parameter]:
    if part == "embeddings":
        inside = {id(module) for layer in view.layers for module in layer.modules()}
        tables = [m for m in view.base.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
        return [parameter for table in tables for parameter in table.parameters()]
    name, _, number = part.partition(":")
    if name not in PARTS or not number.isdecimal():
        raise InputError(f"{part!r} cannot be frozen; give embeddings, or {', '.join(f'{one}:3' for one in PARTS)}")
    if int(number) not in view.executed:
        ran = " ".join(map(str, sorted(set(view.executed))))
        raise InputError(f"{part} cannot be frozen: the layers of {view.name} that run are {ran}")
    place = view.executed.index(int(number))
    layer, known = view.layers[place], view.maps[place]
    if name == "layer":
        return list(layer.parameters())
    if name not in known.sublayers:
        raise InputError(f"{part} cannot be frozen: {known.missing.get(f'{name}_out', 'the layer has none')}")
    return list(_sublayer(layer, known, name))


def _sublayer(layer: nn.Module, known: LayerMap, name: str) -> Iterator[nn.Parameter]:
    """The maps of a sub-layer; an FFN inside attention is one of attention."""
    for path, module in layer.named_modules():
        attention = below(path, known.attn_root or None)
        second = below(path, known.roots.get("ffn2"))
        owner = "attn" if attention else "ffn2" if second else "ffn"
        if owner == name and not is_norm(module):
            yield from (parameter for parameter in module.parameters(recurse=False) if parameter.ndim)
