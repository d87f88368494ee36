"""How many parameters each part of a model has."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from transect.view.kinds import is_norm

if TYPE_CHECKING:
    from transect.view.view import View

PARTS: tuple[str, ...] = ("embedding", "attention", "ffn", "norm", "head", "other")


def parameters(view: "View") -> dict[str, int]:
    """Parameters per part, each counted once: shared layers and tied tables belong to the first part that has them.

    An FFN inside attention counts with attention.
    """
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    met: set[int] = set()
    for part, parameter in _owned(view):
        if id(parameter) not in met:
            met.add(id(parameter))
            counts[part] += parameter.numel()
    return counts


def _owned(view: "View") -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its part; of several the first one counts."""

    def of(part: str, *modules: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((part, parameter) for module in modules for parameter in module.parameters())

    yield from of("embedding", view.model.get_input_embeddings())
    for layer, known in zip(view.layers, view.maps, strict=True):
        yield from of("norm", *filter(is_norm, layer.modules()))
        if "attn" in known.last_maps:
            yield from of("attention", layer.get_submodule(known.attn_root))
        yield from (("other", parameter) for parameter in layer.parameters() if not parameter.ndim)  # of a residual
        yield from of("ffn", layer)
    yield from of("norm", *filter(is_norm, view.base.modules()))
    head = view.model.get_output_embeddings()
    if head is not None:
        yield from of("head", head)
    yield from of("other", view.model)
