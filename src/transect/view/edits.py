"""Temporary changes of a model: context managers that restore everything, also after an exception."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transect.errors import InputError
from transect.view.capture import site_value
from transect.view.experts import silent
from transect.view.layout import Tap
from transect.view.order import reordered
from transect.view.randomise import randomise as randomise
from transect.view.sites import ELEMENTS, HALVES, NEXT, placed
from transect.view.walk import Use, Walk, unheard

if TYPE_CHECKING:
    from transect.view.view import View

Function = Callable[[Tensor], Tensor]
"""From [batch, positions, width of the source site] to [batch, positions, width of the target site]."""

PARTS = ("attn", "ffn", "head", "layer", "expert", "ffn2", "inner_ffn")
RESIDUALS = ("attn", "ffn", "both", "ffn2")


def order(view: "View", layers: Sequence[int]) -> AbstractContextManager[None]:
    """Run the named layers in the given order, with repeats and omissions; whole layers move with their norms.

    h = embed(tokens); for l in layers: h = layer[l](h); logits = head(h). The config's layer count, per-layer lists and
    cache indices follow; `view.executed` says what runs, and a pass that runs anything else raises OrderError.
    Raises InputError for a layer that does not exist or an empty order. Source: arXiv 2101.04547, layer orders.
    """
    return reordered(view, tuple(layers))


def swap(view: "View", first: int, second: int) -> AbstractContextManager[None]:
    """Exchange two layers; swapping twice restores. Raises InputError for a layer that does not exist."""
    view.check_layer(first)
    view.check_layer(second)
    layers = list(range(view.num_layers))
    layers[first], layers[second] = second, first
    return reordered(view, tuple(layers))


def repeat(view: "View", layer: int, times: int) -> AbstractContextManager[None]:
    """Run one layer `times` times in a row where it stands; 1 changes nothing, 0 leaves it out."""
    view.check_layer(layer)
    if times < 0:
        raise InputError(f"times is {times}; a layer can be run 0 or more times")
    layers = range(view.num_layers)
    return reordered(view, tuple(other for index in layers for other in [index] * (times if index == layer else 1)))


@contextmanager
def remove(
    view: "View",
    part: str,
    layer: int,
    head: int | None = None,
    expert: int | None = None,
    fill: Tensor | None = None,
) -> Iterator[None]:
    """Make one part of a layer add exactly zero to the stream, or leave the whole layer out.

    `attn`, `ffn`, `ffn2`: the branch is 0, the residual and the norms stay (post-norm: x' = LN(u); pre-norm: x' = u).
    `inner_ffn`: what the FFN inside attention makes is 0; a residual around it stays.
    `head`: its slice of `heads_out` is 0, or `fill` [head width] such as its mean. `layer`: the stream passes the layer
    unchanged, norms included.
    `expert`: its weight is 0 for the tokens that chose it; the others keep theirs and no token is routed anew.
    Raises InputError for an unknown part, a layer without it, or a head or expert out of range.
    Source: arXiv 2101.04547, removal; difference: exact zero, where the paper's code leaves frozen noise.
    """
    if part not in PARTS:
        raise InputError(f"unknown part {part!r}; parts are {', '.join(PARTS)}")
    view.check_layer(layer)
    if part == "layer":
        with reordered(view, tuple(other for other in range(view.num_layers) if other != layer)):
            yield
        return
    if part == "expert":
        with silent(view, layer, expert):
            yield
        return
    site = "heads_out" if part == "head" else f"{HALVES[part]}_out"
    tap = _tap(view, layer, site)
    if part == "head":
        heads = view.heads(layer)
        if head is None or not 0 <= head < heads:
            raise InputError(f"head is {head}; layer {layer} has heads 0 to {heads - 1}")
        use = _without_head(head, heads, fill)
    else:
        use = _zero
    with _tapped(view, layer, [(tap, use)]):
        yield


@contextmanager
def replace(view: "View", element: str, layer: int, function: Function) -> Iterator[None]:
    """Compute one element of a layer by another module or function.

    The element's source site goes into `function` and its target site becomes the result; residuals and norms around
    it stay. Raises InputError for an unknown element, a layer without its sites, and, during the pass, for a result of
    another shape. `function` may call the layer's own modules. Cost: the original element still runs.
    """
    if element not in ELEMENTS:
        raise InputError(f"unknown element {element!r}; elements are {', '.join(ELEMENTS)}")
    view.check_layer(layer)
    known = view.maps[layer]
    chosen = placed(ELEMENTS[element], known)
    for site in (ELEMENTS[element] if isinstance(chosen, str) else chosen).sites:
        _tap(view, layer, site)
    if isinstance(chosen, str):
        raise InputError(f"layer {layer} of {view.name} has no {element}: {chosen}")
    addition = known.addition(chosen.half) if chosen.half else None
    inside = element.endswith("_sublayer") and chosen.target != NEXT and addition and addition.norm is None
    target = f"{chosen.half}_out" if inside else chosen.target
    number = addition.number if addition and (chosen.add is not None or inside) else 0.0
    source: list[Tensor] = []
    shape: list[tuple[int, int]] = []

    def begin(_: int, tensor: Tensor) -> None:
        shape[:] = [(tensor.shape[0], tensor.shape[1])]

    def remember(place: int, tensor: Tensor) -> None:
        source[:] = [site_value(chosen.source, place, known.taps[chosen.source], tensor, shape[0])]

    def write(scale: float) -> Use:
        def use(_: int, tensor: Tensor) -> Tensor:
            with unheard(view):
                new = function(source[0])
            if new.shape[:2] != shape[0] or new.numel() != tensor.numel():
                raise InputError(
                    f"replacement of {element} in layer {layer} gives {tuple(new.shape)}, the model expects "
                    f"{(*shape[0], tensor.shape[-1])}"
                )
            if number:
                new = new - (source[0] if number == 1 else number * source[0])
            return (new / scale).reshape(tensor.shape).to(tensor.dtype)

        return use

    uses: list[tuple[Tap, Use]] = [(known.taps["resid"], begin), (known.taps[chosen.source], remember)]
    uses += [(tap, write(tap.scale)) for tap in known.readers.get(target) or (known.taps[target],)]
    with _tapped(view, layer, uses):
        yield


@contextmanager
def scale_residual(view: "View", layer: int, weight: float, residual: str = "both") -> Iterator[None]:
    """Weight the residual of a layer's sub-layers: stream = weight * x + branch; 0 cancels it.

    `residual` is `attn`, `ffn`, `ffn2` or `both`, which is all of them; sub-layers that are added at once have one,
    changed by any of them. The weight takes the place of a number that the model has there. A cancelled residual
    belongs to the layer and moves with it. Raises InputError for an unknown residual or a layer without the sub-layer.
    Source: arXiv 2101.04547, cancelled skips (g_att, g_ffn). Rounding: the branch becomes branch + (weight - 1) x.
    """
    if residual not in RESIDUALS:
        raise InputError(f"unknown residual {residual!r}; allowed are {', '.join(RESIDUALS)}")
    view.check_layer(layer)
    known = view.maps[layer]
    uses: list[tuple[Tap, Use]] = []
    if residual != "both":
        _tap(view, layer, f"{residual}_out")
    for addition in known.additions:
        names = addition.adds if residual == "both" else [name for name in addition.adds if name == residual]
        if not names:
            continue
        kept: list[Tensor] = []
        normed = addition.sum_norm  # what is added is the norm of a sum
        branch_tap = known.taps[f"{names[0]}_out"] if normed is None else Tap(normed, "out")
        uses.append((known.taps[addition.source], _remember(kept)))
        uses.append((branch_tap, _weighted(kept, weight - addition.number, branch_tap.scale)))
    with _tapped(view, layer, uses):
        yield


def _remember(kept: list[Tensor]) -> Callable[[int, Tensor], None]:
    def use(_: int, tensor: Tensor) -> None:
        kept[:] = [tensor.clone()]

    return use


def _weighted(kept: list[Tensor], extra: float, scale: float) -> Callable[[int, Tensor], Tensor]:
    return lambda _, tensor: tensor + (extra / scale) * kept[0].reshape(tensor.shape)


def _zero(_: int, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor)


def _without_head(head: int, heads: int, fill: Tensor | None) -> Callable[[int, Tensor], Tensor]:
    def use(_: int, tensor: Tensor) -> Tensor:
        width = tensor.shape[-1] // heads
        kept = tensor.clone()
        kept[..., head * width : (head + 1) * width] = 0 if fill is None else fill.to(kept)
        return kept

    return use


@contextmanager
def _tapped(view: "View", layer: int, uses: list[tuple[Tap, Use]]) -> Iterator[None]:
    """Use or replace tensors at taps of one layer; the change moves with the layer."""
    loaded = view.executed[layer]
    with Walk(view) as walk:
        for tap, use in uses:
            walk.tap(loaded, tap, use)
        yield


def _tap(view: "View", layer: int, site: str) -> Tap:
    known = view.maps[layer]
    if site not in known.taps:
        raise InputError(f"layer {layer} of {view.name} has no {site}: {known.missing.get(site, 'no such site')}")
    return known.taps[site]
