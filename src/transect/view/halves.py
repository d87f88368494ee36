"""The sites of one FFN: its input, its activation, its last linear map, and how a sparse one is routed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from transect.errors import InputError
from transect.view.joins import Spot
from transect.view.kinds import is_elementwise, is_experts, is_linear, routes
from transect.view.layout import Tap
from transect.view.trace import Call

ROUTING = ("router_logits", "selected", "selected_weights")
_ENDS = ("in", "pre", "act", "hidden", "out")


def sites_of(half: str) -> tuple[str, ...]:
    """The sites of `attn`, or of an FFN."""
    if half == "attn":
        return ("attn_in", "heads_out", "attn_out")
    return (*(f"{half}_{end}" for end in _ENDS), *(routing_site(half, site) for site in ROUTING))


def routing_site(half: str, site: str) -> str:
    """The name of a routing site of one half: `selected` of `ffn`, `inner_selected` of `inner`."""
    return site if half == "ffn" else f"{half}_{site}"


@dataclass(slots=True, eq=False)
class Half:
    """One FFN as it was read: taps and absent sites, its last linear map, the module that holds it, its blocks."""

    taps: dict[str, Tap] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    last_map: str | None = None
    root: str | None = None
    blocks: int = 0


def read_half(name: str, region: list[Call], inputs: list[Spot], layer: str) -> Half:
    """The FFN whose calls are `region`; raises InputError where no linear map reads its input."""
    own = {id(call) for call in region}
    inputs = [spot for spot in inputs if id(spot.call) in own]
    readers = [spot for spot in inputs if is_linear(spot.call.module) or routes(spot.call)]
    if not readers:
        raise InputError(f"layer at {layer}: no linear map inside its FFN; {name}_in cannot be told")
    half = Half(taps={f"{name}_in": readers[0].tap()})
    half.root = _root([call for call in region if is_linear(call.module) or is_experts(call.module) or routes(call)])
    experts = [call for call in region if is_experts(call.module)]
    if experts:
        half.blocks = next(len(p) for p in experts[0].module.parameters(recurse=False) if p.ndim >= 3)
        absent = dict.fromkeys((f"{name}_{end}" for end in ("pre", "act", "hidden")), "sparse FFN: one for each block")
        half.missing |= absent
        _routing(name, half, region, inputs)
        return half
    half.missing |= dict.fromkeys((routing_site(name, site) for site in ROUTING), "dense FFN: nothing is routed")
    half.taps[f"{name}_hidden"] = readers[-1].tap()
    half.last_map = readers[-1].call.path
    _activation(name, half, [call for call in region if call.start > readers[0].call.start])
    return half


def _root(calls: list[Call]) -> str | None:
    """The module that holds all of the calls' modules; None where that is the layer itself."""
    steps = [call.path.split(".")[:-1] for call in calls]
    shared = 0
    while all(len(path) > shared and path[shared] == steps[0][shared] for path in steps):
        shared += 1
    return ".".join(steps[0][:shared]) or None


def _activation(name: str, half: Half, region: list[Call]) -> None:
    sites = (f"{name}_pre", f"{name}_act")
    for call in region:
        if is_elementwise(call):
            half.taps[sites[0]] = Tap(call.path, "in", 0, call.nth, overwritten=call.overwritten("in", 0))
            half.taps[sites[1]] = Tap(call.path, "out", None, call.nth, overwritten=call.overwritten("out", None))
            return
    half.missing |= dict.fromkeys(sites, "the activation is not a module of its own here")


def _routing(name: str, half: Half, region: list[Call], inputs: list[Spot]) -> None:
    """Tap what the router returns: the chosen blocks, and the scores they were chosen by."""
    logits, selected, weights = (routing_site(name, site) for site in ROUTING)
    call = next((call for call in region if routes(call)), None)
    if call is None:
        half.missing |= dict.fromkeys((logits, selected, weights), "the router is not a module of its own here")
        return
    given = _given(half.taps[f"{name}_in"], inputs)
    chosen = next(key for key, item in call.outputs.items() if not item.is_floating_point())
    half.taps[selected] = Tap(call.path, "out", chosen)
    floats = {key: item for key, item in call.outputs.items() if item.is_floating_point()}
    scores = [key for key, item in floats.items() if item.shape[-1] == half.blocks]
    kept = [key for key in scores if not any(_is(spot, floats[key]) for spot in given or ())]
    if kept:
        half.taps[logits] = Tap(call.path, "out", kept[0])
    else:
        half.missing[logits] = "the router returns no scores of all blocks"
    if given is None:
        half.missing[weights] = f"the chosen blocks do not read {name}_in"
        return
    # A rule that computed the blocks' coefficients itself gives these too, after the weights.
    several = given if len(given) == 1 else [s for s in given if any(_is(s, item) for item in floats.values())]
    if several:
        half.taps[weights] = several[0].tap()
    else:
        half.missing[weights] = "the chosen blocks are not given one tensor of weights"


def _is(spot: Spot, item: Tensor) -> bool:
    return item.numel() == spot.value.numel() and torch.equal(item.reshape(spot.value.shape).double(), spot.value)


def _given(tap: Tap, inputs: list[Spot]) -> list[Spot] | None:
    """What the experts are given beside the FFN's input and the chosen blocks; None where they read another input."""
    read = next(spot.value for spot in inputs if spot.tap() == tap)
    given = [
        spot
        for spot in inputs
        if is_experts(spot.call.module) and not routes(spot.call) and spot.value.is_floating_point()
    ]
    beside = [spot for spot in given if spot.value.shape != read.shape or not torch.equal(spot.value, read)]
    return None if len(beside) == len(given) else beside
