"""Take the tensors of the sites asked for while the model runs, layer by layer, and nothing else."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from transect.errors import InputError
from transect.view.layout import Tap
from transect.view.sites import MODEL_SITES, NEXT, SITES
from transect.view.tensors import by_position, logits_of, parts
from transect.view.walk import OrderError, Walk

if TYPE_CHECKING:
    from transect.view.view import View

Seen = dict[str, Tensor]
"""The sites of one layer: [batch, positions, width] each."""


@contextmanager
def stream(view: "View", sites: Mapping[int, Iterable[str]], consume: Callable[[int, Seen], None]) -> Iterator[None]:
    """Hand each layer's sites to `consume(layer, tensors)` as soon as the layer is done; keep nothing after it.

    `sites` names the sites wanted of each layer; layers it does not name are not touched. Tensors are the model's own
    (copied only where the model later writes into them) in its dtype, with autograd history if the caller runs with it.
    Raises InputError for a site that does not exist in that layer, and OrderError when a site does not fire exactly
    once per executed layer with the expected shape. Cost: no copy, no extra computation.
    """
    wanted = {place: _taps(view, place, names) for place, names in sites.items()}
    seen: Seen = {}
    shape: list[tuple[int, int]] = []

    def enter(place: int) -> None:
        seen.clear()
        shape.clear()

    def leave(place: int) -> None:
        if place not in wanted:
            return
        absent = [site for site in wanted[place] if site not in seen]
        if absent:
            raise OrderError(f"layer {place}: site {absent[0]!r} did not fire at {wanted[place][absent[0]]}")
        consume(place, {site: seen[site] for site in wanted[place]})
        seen.clear()

    taps = {(view.executed[place], site): tap for place, names in wanted.items() for site, tap in names.items()}
    with Walk(view, enter, leave) as walk:
        for loaded in {loaded for loaded, _ in taps}:
            resid = view.maps[view.executed.index(loaded)].taps["resid"]
            walk.tap(loaded, resid, lambda _, x: shape.append((x.shape[0], x.shape[1])))
        for (loaded, site), tap in taps.items():
            walk.tap(loaded, tap, _keeper(site, tap, seen, shape))
        walk.leave_last()
        yield


def _keeper(site: str, tap: Tap, seen: Seen, shape: list[tuple[int, int]]) -> Callable[[int, Tensor], None]:
    def keep(place: int, tensor: Tensor) -> None:
        if site in seen:
            raise OrderError(f"layer {place}: site {site!r} fired twice at {tap}")
        seen[site] = site_value(site, place, tap, tensor, shape[0])

    return keep


def site_value(site: str, layer: int, tap: Tap, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """The site's tensor [batch, positions, width] from what passes at its tap; raises OrderError for another shape."""
    value = by_position(tensor, *shape)
    if value is None:
        raise OrderError(f"layer {layer}: site {site!r} has shape {tuple(tensor.shape)}, the stream is {shape}")
    if tap.scale != 1.0:
        return value * tap.scale
    return value.clone() if tap.overwritten else value


def check_site(name: str) -> None:
    """Raise InputError for a name that is no site."""
    if name not in SITES:
        raise InputError(f"unknown site {name!r}; sites are {', '.join([*SITES, *MODEL_SITES])}")


def _taps(view: "View", layer: int, names: Iterable[str]) -> dict[str, Tap]:
    view.check_layer(layer)
    known = view.maps[layer]
    for name in names:
        check_site(name)
        if name not in known.taps:
            raise InputError(f"layer {layer} of {view.name} has no site {name!r}: {known.missing.get(name, 'absent')}")
    return {name: known.taps[name] for name in names}


class Capture:
    """The sites of one forward pass, looked up as `capture[site, layer]`, `capture["final_in"]`, `capture["logits"]`.

    Holds every tensor asked for until it is dropped; for a whole corpus use `stream`.
    """

    def __init__(self) -> None:
        self._tensors: dict[str | tuple[str, int], Tensor] = {}

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        """The tensor [batch, positions, width] of (site, layer) or of a model site; KeyError when not captured."""
        return self._tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def keys(self) -> list[str | tuple[str, int]]:
        """Everything captured."""
        return list(self._tensors)

    def add(self, layer: int, seen: Seen) -> None:
        """Keep one layer's tensors."""
        self._tensors |= {(site, layer): tensor for site, tensor in seen.items()}

    def add_model_site(self, site: str, tensor: Tensor) -> None:
        """Keep a tensor that belongs to no layer."""
        self._tensors[site] = tensor


@contextmanager
def capture(view: "View", sites: Iterable[str], layers: Iterable[int] | None = None) -> Iterator[Capture]:
    """Capture the named sites of the named layers (all by default) in the forward passes of the block.

    A later pass overwrites an earlier one. Raises as `stream` does.
    """
    names = tuple(sites)
    inner = tuple(name for name in names if name not in MODEL_SITES)
    chosen = range(len(view.layers)) if layers is None else layers
    taken = Capture()
    with stream(view, dict.fromkeys(chosen, inner), taken.add), ExitStack() as stack:
        for name in names:
            if name in MODEL_SITES:
                stack.callback(_hook_model_site(view, name, taken).remove)
        yield taken


def _hook_model_site(view: "View", site: str, taken: Capture) -> Any:
    """A hook that keeps `logits`, or `final_in`: what the final norm, or where there is none the head, receives."""
    if site == "logits":
        if not view.has_head:
            raise InputError(f"{view.name} has no head, so there are no logits; load a checkpoint with its head")
        return view.model.register_forward_hook(lambda _, __, out: taken.add_model_site(site, logits_of(out)))
    if view.final_norm is not None:
        return view.final_norm.register_forward_pre_hook(lambda _, args: taken.add_model_site(site, args[0]))
    key = view.maps[-1].taps[NEXT].key  # of a module that all layers share, the last call is kept
    return view.layers[-1].register_forward_hook(lambda _, __, out: taken.add_model_site(site, parts(out)[key]))
