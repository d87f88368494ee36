"""The experts of a sparse FFN, seen one at a time through the model's own fused module, found and proven by value."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transect.errors import InputError
from transect.view.kinds import below, is_experts
from transect.view.layout import Tap
from transect.view.prove import BOUNDS
from transect.view.tensors import Key, eps, parts
from transect.view.trace import Call, recorded
from transect.view.walk import OrderError, Use, Walk

if TYPE_CHECKING:
    from transect.view.view import View


@dataclass(frozen=True, slots=True)
class Experts:
    """The fused experts of one layer: where they are, how they are called and how well that was proven.

    `path` is relative to the layer. `count` experts, of which a token has `active`; `intermediate` is the width inside
    one expert, None where the shapes do not tell. `taps` has `input` [tokens, width], `index` [tokens, active] and
    `weight` [tokens, active], or [tokens, count] where `per_expert`. `shared` are the paths of the experts that every
    token has, with or without a gate; None where what the FFN adds beside the routed ones is no module's output.
    `residual` is that of: output = sum over the choices of weight * one expert.
    """

    path: str
    count: int
    active: int
    taps: dict[str, Tap]
    per_expert: bool
    intermediate: int | None = None
    shared: tuple[str, ...] | None = None
    residual: float = float("inf")


@dataclass(frozen=True, slots=True)
class Routed:
    """What the experts of one layer were given in one pass; rows are tokens, padding included, batch-major.

    hidden [tokens, width]; index [tokens, active], whole numbers, -1 = dropped; weight [tokens, active], 0 = dropped.
    """

    hidden: Tensor
    index: Tensor
    weight: Tensor


def experts_of(view: "View", layer: int) -> Experts:
    """The fused experts of a layer, proven on random tokens: output = sum over k choices of weight * one(expert).

    The module is the one outside attention with a stack of matrices that is given whole numbers; which argument is
    what is told by the shapes and, where they leave a choice, by the proof (1e-10 of the output in float64, 1e-5 in
    float32, else 8 rounding units). Edits in force do not count, except the order of layers. Raises InputError for a
    layer without a sparse FFN, and with module path and residual where the proof fails. Cost: a forward pass of 22
    tokens, and those tokens through the chosen experts again.
    """
    call, calls = _experts_call(view, layer)
    path = f"{view.layer_path(layer)}.{call.path}"
    bound = BOUNDS.get(view.dtype, 8 * eps(view.dtype))
    best = float("inf")
    for known in _readings(call, view.width, path):
        residual = _residual(view, call, known)
        if residual <= bound:
            return replace(known, residual=residual, shared=_shared(call, calls, bound))
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


@contextmanager
def routed(view: "View", experts: Mapping[int, Experts], consume: Callable[[int, Routed], None]) -> Iterator[None]:
    """Hand what the experts of each named layer receive to `consume(layer, routed)` as soon as the layer is done.

    `experts` maps layers, in the executed order, to what `experts_of` gave. Tensors are the model's own; an edit made
    before is seen, one made inside is not. Raises InputError for a layer that does not exist, and OrderError where the
    experts are not called exactly once in a pass. Cost: no extra computation.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, tap: Tap) -> Use:
        def use(place: int, tensor: Tensor) -> None:
            if name in seen:
                raise OrderError(f"layer {place}: its experts were called twice at {tap}")
            seen[name] = tensor.clone() if tap.overwritten else tensor

        return use

    def leave(place: int) -> None:
        if place in experts:
            if not seen:
                raise OrderError(f"layer {place}: its experts at {experts[place].path} were not called")
            index, weight = choices(experts[place], seen["index"], seen["weight"])
            consume(place, Routed(seen["input"], index, weight))
        seen.clear()

    for layer in experts:
        _check_layer(view, layer)
    with Walk(view, lambda _: seen.clear(), leave) as walk:
        for loaded, known in {view.executed[layer]: known for layer, known in experts.items()}.items():
            for name, tap in known.taps.items():
                walk.tap(loaded, tap, keep(name, tap))
        walk.leave_last()
        yield


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
def silent(view: "View", layer: int, expert: int, experts: Experts | None = None) -> Iterator[None]:
    """`edits.remove` of one expert, with nothing proven anew where `experts` is what `experts_of` gave.

    Raises InputError for a layer without a sparse FFN or an expert out of range. Cost: nothing of its own.
    """
    known = experts_of(view, layer) if experts is None else experts
    with Walk(view) as walk:
        for tap, use in without(known, layer, expert):
            walk.tap(view.executed[layer], tap, use)
        yield


@contextmanager
def unheard(view: "View") -> Iterator[None]:
    """Let a replacement call the model's own modules without its taps, and those of a capture, firing."""
    before, view.replacing = view.replacing, True
    try:
        yield
    finally:
        view.replacing = before


def _check_expert(experts: Experts, layer: int, expert: int | None) -> int:
    if expert is None or not 0 <= expert < experts.count:
        raise InputError(f"expert is {expert}; layer {layer} has experts 0 to {experts.count - 1}")
    return expert


def _check_layer(view: "View", layer: int) -> None:
    if not 0 <= layer < view.num_layers:
        raise InputError(f"layer {layer} does not exist; {view.name} has layers 0 to {view.num_layers - 1}")


def _experts_call(view: "View", layer: int) -> tuple[Call, list[Call]]:
    """The call of the layer's experts on random tokens, and all calls of the layer in that pass."""
    _check_layer(view, layer)
    known = view.maps[layer]
    if not known.sparse:
        sparse = ", ".join(str(index) for index, other in enumerate(view.maps) if other.sparse) or "none"
        why = known.missing.get("selected", "nothing is routed")
        raise InputError(f"layer {layer} of {view.name} has no experts: {why}; layers with experts: {sparse}")
    with torch.no_grad(), unheard(view), recorded(view.layers[layer], stirred=False) as calls:
        view.run(view._random_ids(2, 11))
    calls = [call for call in calls if call.start <= calls[0].end]  # a module shared by layers is called again
    found = [
        call
        for call in calls
        if is_experts(call.module)
        and not below(call.path, known.attn_root)
        and call.outputs
        and any(_whole(item) for item in call.inputs.values())
    ]
    if len(found) != 1:
        raise InputError(
            f"layer {layer} of {view.name}: {len(found)} calls of stacked matrices are given chosen experts at "
            f"{view.layer_path(layer)}; one call is needed to see its experts one at a time"
        )
    return found[0], calls


def _whole(item: Tensor) -> bool:
    return not item.is_floating_point() and item.dtype != torch.bool


def _readings(call: Call, width: int, path: str) -> Iterator[Experts]:
    """Every reading of the arguments that the shapes allow; one weight for each choice comes first."""
    stacks = [parameter for parameter in call.module.parameters(recurse=False) if parameter.ndim >= 3]
    given = dict(enumerate(call.args)) | call.kwargs
    if len(given) != 3 or len(call.inputs) != 3 or len({stack.shape[0] for stack in stacks}) != 1:
        names = ", ".join(str(key) for key in given)
        raise InputError(
            f"{path}: stacks of {', '.join(str(tuple(stack.shape)) for stack in stacks)} called with {names}; needed "
            "are stacks of one number of experts, called with hidden states, chosen experts and their weights"
        )
    count = stacks[0].shape[0]
    for hidden, index, weight in permutations(call.inputs):
        shapes = [tuple(call.inputs[key].shape) for key in (hidden, index, weight)]
        if not _whole(call.inputs[index]) or len(shapes[1]) != 2 or shapes[0] != (shapes[1][0], width):
            continue
        tokens, active = shapes[1]
        keys = {"input": hidden, "index": index, "weight": weight}
        taps = {name: Tap(call.path, "in", key, overwritten=call.overwritten("in", key)) for name, key in keys.items()}
        for per_expert, columns in ((False, active), (True, count)):
            if shapes[2] == (tokens, columns):
                yield Experts(call.path, count, active, taps, per_expert, _intermediate(stacks, width))


def _intermediate(stacks: list[nn.Parameter], width: int) -> int | None:
    """The width inside one expert: beside the stream's width, in one matrix or in two fused ones."""
    beside: set[int] = set()
    for stack in stacks:
        sizes = list(stack.shape[1:])
        if len(sizes) != 2 or width not in sizes:
            return None
        sizes.remove(width)
        beside.add(sizes[0])
    return min(beside) if beside <= {min(beside), 2 * min(beside)} else None


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
    except (RuntimeError, IndexError):  # arguments read the wrong way round
        return float("inf")
    return _apart(left.to(wide), right)


def _apart(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return float("inf")
    return float((left - right).abs().max() / left.abs().max().clamp_min(torch.finfo(left.dtype).tiny))


def _first(call: Call) -> Tensor:
    return next(iter(call.outputs.values()))


def _shared(call: Call, calls: list[Call], bound: float) -> tuple[str, ...] | None:
    """The modules beside the experts whose outputs, each times a number of the token, make up the rest of the FFN."""
    block = call.path.rpartition(".")[0]
    whole = next((other for other in calls if block and other.path == block), None)
    if whole is None or not whole.outputs or _first(whole).numel() != _first(call).numel():
        return None
    experts = _first(call).double().cpu()
    total = _first(whole).double().cpu().reshape(experts.shape)
    if torch.equal(total, experts):
        return ()
    beside: dict[str, Tensor] = {}
    for other in calls:
        inside = other.path != block and below(other.path, block) and not below(other.path, call.path)
        if not inside or any(below(other.path, path) for path in beside) or not other.outputs:
            continue
        if _first(other).numel() == experts.numel() and any(True for _ in other.module.parameters()):
            beside[other.path] = _first(other).double().cpu().reshape(experts.shape)
    if not beside:
        return None
    columns = torch.stack(list(beside.values()), dim=-1)
    numbers = torch.linalg.lstsq(columns, (total - experts)[..., None]).solution
    if _apart(total, experts + (columns @ numbers)[..., 0]) > bound:
        return None
    return tuple(path for path, size in zip(beside, numbers.abs().amax((0, 2)).tolist(), strict=True) if size > bound)
