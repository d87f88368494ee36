"""How many parameters each part of a model has."""

from typing import TYPE_CHECKING

from transect.view.kinds import is_norm

if TYPE_CHECKING:
    from transect.view.view import View

PARTS: tuple[str, ...] = ("embedding", "attention", "ffn", "norm", "head", "other")


def parameters(view: "View") -> dict[str, int]:
    """Parameters per part, each counted once: shared layers and tied tables belong to the first part that has them."""
    counts: dict[str, int] = dict.fromkeys(PARTS, 0)
    met: set[int] = set()

    def count(part: str, module) -> None:
        for parameter in module.parameters():
            if id(parameter) not in met:
                met.add(id(parameter))
                counts[part] += parameter.numel()

    count("embedding", view.model.get_input_embeddings())
    for layer, known in zip(view.layers, view.maps, strict=True):
        for module in layer.modules():
            if is_norm(module):
                count("norm", module)
        if known.attn_projection is not None:
            count("attention", layer.get_submodule(known.attn_root))
        count("ffn", layer)
    for module in view.base.modules():
        if is_norm(module):
            count("norm", module)
    head = view.model.get_output_embeddings()
    if head is not None:
        count("head", head)
    count("other", view.model)
    return counts
