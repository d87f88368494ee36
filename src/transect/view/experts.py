"""The experts of a sparse FFN, seen one at a time through the model's own fused module, found and proven by value."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transect.errors import InputError
from transect.view.kinds import below, is_experts, routes
from transect.view.layout import Tap
from transect.view.prove import BOUNDS
from transect.view.tensors import Key, eps, parts
from transect.view.trace import Call, recorded
from transect.view.walk import Use, Walk, unheard

if TYPE_CHECKING:
    from transect.view.view import View


@dataclass(frozen=True, slots=True)
class Experts:
    """The fused experts of one layer: where they are, how they are called and how well that was proven.

    `path` is relative to the layer. `count` experts, of which a token has `active`. `taps` has `input` [tokens, width],
    `index` [tokens, active] and `weight` [tokens, active], or [tokens, count] where `per_expert`. `residual` is that
    of: output = sum over the choices of weight * one expert.
    """

    path: str
    count: int
    active: int
    taps: dict[str, Tap]
    per_expert: bool
    residual: float = float("inf")


def experts_of(view: "View", layer: int, half: str | None = None) -> Experts:
    """The fused experts of a layer, proven on random tokens: output = sum over k choices of weight * one(expert).

    `half` is `ffn`, `ffn2` or `inner`; by default the first sparse one. The module is the one of that FFN with a stack
    of matrices that is given whole numbers; which argument is what is told by the shapes and, where they leave a
    choice, by the proof (1e-10 of the output in float64, 1e-5 in float32, else 8 rounding units). An argument that the
    module does without, such as coefficients that the router has computed already, is left out. Edits in force do not
    count, except the order of layers. Raises InputError for a layer without a sparse FFN, and with module path and
    residual where the proof fails. Cost: a forward pass of 22 tokens, and those tokens through the chosen experts
    again.
    """
    call = _experts_call(view, layer, half)
    path = f"{view.layer_path(layer)}.{call.path}"
    bound = BOUNDS.get(view.dtype, 8 * eps(view.dtype))
    best = float("inf")
    for known in _readings(call, view.width, path):
        residual = _residual(view, call, known)
        if residual <= bound:
            return replace(known, residual=residual)
        best = min(best, residual)
    raise InputError(
        f"{view.name}: at {path} the identity output = sum of weight * expert does not hold; "
        f"residual {best:.3g}, allowed {bound:.3g}; its experts cannot be seen one at a time"
    )


def one(view: "View", layer: int, expert: int, x: Tensor, experts: Experts | None = None) -> Tensor:
    """The unweighted output [n, width] of one expert for every row of x [n, width], by the model's own module.

    `experts` is what `experts_of` gave; found anew where not given. No tap, edit or capture hears the call; gradients
    are the caller's choice. Raises InputError for an expert out of range or an x of another shape or dtype.
    Cost: one expert, not all of them.
    """
    known = experts_of(view, layer) if experts is None else experts
    _check_expert(known, layer, expert)
    if x.ndim != 2 or x.shape[1] != view.width or x.dtype != view.dtype:
        raise InputError(f"x is {tuple(x.shape)} of {x.dtype}; an expert takes [n, {view.width}] of {view.dtype}")
    with unheard(view):
        return _alone(view.layers[layer].get_submodule(known.path), known, expert, x)


def choices(experts: Experts, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts [tokens, active] and their weights [tokens, active] from what passes at the two taps.

    A choice that was dropped has an index outside 0 .. count - 1: its index becomes -1 and its weight 0. None of the
    models in transformers drops; a weight of 0 at an index in range is a choice that adds nothing. O(tokens active).
    """
    dropped = (index < 0) | (index >= experts.count)
    if experts.per_expert:
        weight = weight.gather(1, index.masked_fill(dropped, 0).long())
    return index.masked_fill(dropped, -1), weight.masked_fill(dropped, 0)


def without(experts: Experts, layer: int, expert: int | None) -> list[tuple[Tap, Use]]:
    """What to do at which taps so that one expert adds exactly zero: its weight becomes 0, the others keep theirs.

    Raises InputError for an expert out of range.
    """
    number = _check_expert(experts, layer, expert)
    chosen: list[Tensor] = []

    def remember(_: int, index: Tensor) -> None:
        chosen[:] = [index == number]

    def silence(_: int, weight: Tensor) -> Tensor:
        if experts.per_expert:
            return torch.where(torch.arange(experts.count, device=weight.device) == number, 0, weight)
        return weight.masked_fill(chosen[0], 0)

    return [(experts.taps["index"], remember), (experts.taps["weight"], silence)]


@contextmanager
def silent(view: "View", layer: int, expert: int | None, experts: Experts | None = None) -> Iterator[None]:
    """`edits.remove` of one expert, with nothing proven anew where `experts` is what `experts_of` gave.

    Raises InputError for a layer without a sparse FFN or an expert out of range. Cost: nothing of its own.
    """
    known = experts_of(view, layer) if experts is None else experts
    with Walk(view) as walk:
        for tap, use in without(known, layer, expert):
            walk.tap(view.executed[layer], tap, use)
        yield


def _check_expert(experts: Experts, layer: int, expert: int | None) -> int:
    if expert is None or not 0 <= expert < experts.count:
        raise InputError(f"expert is {expert}; layer {layer} has experts 0 to {experts.count - 1}")
    return expert


def _experts_call(view: "View", layer: int, half: str | None) -> Call:
    """The call of the layer's experts on random tokens."""
    view.check_layer(layer)
    known = view.maps[layer]
    if not known.sparse:
        sparse = ", ".join(str(index) for index, other in enumerate(view.maps) if other.sparse) or "none"
        why = known.missing.get("selected", "nothing is routed")
        raise InputError(f"layer {layer} of {view.name} has no experts: {why}; layers with experts: {sparse}")
    half = next(iter(known.blocks)) if half is None else half
    if half not in known.blocks:
        halves = ", ".join(known.blocks)
        raise InputError(f"layer {layer} of {view.name} has no experts in {half!r}; it has them in {halves}")
    root = known.roots.get(half) if half != "ffn" or len(known.roots) > 1 else None
    with torch.no_grad(), unheard(view), recorded(view.layers[layer], stirred=False) as calls:
        view.run(view._random_ids(2, 11))
    calls = [call for call in calls if call.start <= calls[0].end]  # a module shared by layers is called again
    found = [
        call
        for call in calls
        if is_experts(call.module)
        and not routes(call)
        and (below(call.path, root) if root else not below(call.path, known.attn_root))
        and call.outputs
        and any(_whole(item) for item in call.inputs.values())
    ]
    if len(found) != 1:
        raise InputError(
            f"layer {layer} of {view.name}: {len(found)} calls of stacked matrices are given chosen experts at "
            f"{view.layer_path(layer)}; one call is needed to see its experts one at a time"
        )
    return found[0]


def _whole(item: Tensor) -> bool:
    return not item.is_floating_point() and item.dtype != torch.bool


def _readings(call: Call, width: int, path: str) -> Iterator[Experts]:
    """Every reading of the arguments that the shapes allow; one weight for each choice comes first."""
    stacks = [parameter for parameter in call.module.parameters(recurse=False) if parameter.ndim >= 3]
    given = dict(enumerate(call.args)) | call.kwargs
    chosen = {tuple(item.shape) for item in call.inputs.values() if _whole(item)}
    weights = [item for item in call.inputs.values() if not _whole(item) and tuple(item.shape) in chosen]
    told = len(given) == len(call.inputs) and (len(given) == 3 or (len(given) == 4 and len(weights) > 1))
    if not told or len({stack.shape[0] for stack in stacks}) != 1:
        names = ", ".join(str(key) for key in given)
        raise InputError(
            f"{path}: stacks of {', '.join(str(tuple(stack.shape)) for stack in stacks)} called with {names}; needed "
            "are stacks of one number of experts, called with hidden states, chosen experts and their weights"
        )
    count = stacks[0].shape[0]
    for hidden, index, weight in permutations(call.inputs, 3):
        shapes = [tuple(call.inputs[key].shape) for key in (hidden, index, weight)]
        if not _whole(call.inputs[index]) or len(shapes[1]) != 2 or shapes[0] != (shapes[1][0], width):
            continue
        tokens, active = shapes[1]
        keys = {"input": hidden, "index": index, "weight": weight}
        taps = {name: Tap(call.path, "in", key, overwritten=call.overwritten("in", key)) for name, key in keys.items()}
        for per_expert, columns in ((False, active), (True, count)):
            if shapes[2] == (tokens, columns):
                yield Experts(call.path, count, active, taps, per_expert)


def _alone(module: nn.Module, known: Experts, expert: int, x: Tensor) -> Tensor:
    """Call the experts with one choice for each row: this expert, with weight one."""
    weight = x.new_ones(len(x), 1)
    if known.per_expert:
        weight = x.new_zeros(len(x), known.count)
        weight[:, expert] = 1
    index = torch.full((len(x), 1), expert, dtype=torch.long, device=x.device)
    given: dict[Key, Tensor] = {
        known.taps[name].key: item for name, item in (("input", x), ("index", index), ("weight", weight))
    }
    args = [given[place] for place in range(len(given)) if place in given]
    output = module(*args, **{key: item for key, item in given.items() if isinstance(key, str)})
    return next(iter(parts(output).values()))


def _residual(view: "View", call: Call, known: Experts) -> float:
    """How far the experts' output is from the weighted sum of single ones, relative to its size."""
    left = _first(call)
    hidden = call.inputs[known.taps["input"].key]
    index, weight = choices(known, *(call.inputs[known.taps[name].key] for name in ("index", "weight")))
    wide = torch.promote_types(left.dtype, torch.float32)
    right = torch.zeros_like(hidden, dtype=wide)
    try:
        with torch.no_grad(), unheard(view):
            for expert in index[index >= 0].unique().tolist():
                rows, slots = torch.where(index == expert)
                alone = _alone(call.module, known, expert, hidden[rows])
                right.index_add_(0, rows, weight[rows, slots, None].to(wide) * alone.to(wide))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError):  # arguments read the wrong way round, or one left out that is needed
        return float("inf")
    return _apart(left.to(wide), right)


def _apart(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return float("inf")
    return float((left - right).abs().max() / left.abs().max().clamp_min(torch.finfo(left.dtype).tiny))


def _first(call: Call) -> Tensor:
    return next(iter(call.outputs.values()))
