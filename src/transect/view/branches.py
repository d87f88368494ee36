"""Read one layer's residual algebra and sites off its recorded calls, by value and never by name."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transect.errors import InputError
from transect.view.kinds import below, holds, is_elementwise, is_experts, is_linear, is_norm, routes
from transect.view.layout import LayerMap, Tap
from transect.view.sites import NEXT
from transect.view.tensors import Key, by_position, eps
from transect.view.trace import Call

_ROUTING = ("router_logits", "selected", "selected_weights")


@dataclass(slots=True, eq=False)
class Spot:
    """A tensor seen at one place: the call, the side and the key, with its value in float64."""

    call: Call
    side: str
    key: Key
    value: Tensor
    mixed: bool

    def tap(self, scale: float = 1.0) -> Tap:
        return Tap(
            self.call.path, self.side, self.key, self.call.nth, scale, self.call.overwritten(self.side, self.key)
        )


@dataclass(slots=True, eq=False)
class Algebra:
    """One way to read the layer as two additions to the stream."""

    attn: tuple[Spot, float] | None
    ffn: tuple[Spot, float] | None
    mid: Spot | None = None
    mid_norm: str | None = None
    next_norm: str | None = None
    parallel: bool = False


@dataclass(slots=True, eq=False)
class Finder:
    """Finds where a layer's sites pass, from its calls and the same calls with one earlier position changed."""

    layer: Call
    path: str
    calls: list[Call]
    moved: list[Call]
    resid: Tensor
    resid_next: Tensor
    stream_key: Key
    inputs: list[Spot] = field(default_factory=list)
    outputs: list[Spot] = field(default_factory=list)

    def __post_init__(self) -> None:
        others = {(call.path, call.nth): call for call in self.moved}
        for call in self.calls:
            other = others.get((call.path, call.nth))
            if other is None:  # an expert that only one of the two passes chose
                continue
            self.inputs += self._spots(call, "in", call.inputs, other.inputs)
            self.outputs += self._spots(call, "out", call.outputs, other.outputs)
        self.outputs.sort(key=lambda spot: spot.call.end)

    def _spots(self, call: Call, side: str, here: dict[Key, Tensor], there: dict[Key, Tensor]) -> Iterator[Spot]:
        batch, positions = self.resid.shape[:2]
        for key, tensor in here.items():
            value = by_position(tensor, batch, positions)
            if value is None:
                continue
            changed = by_position(there[key], batch, positions)
            mixed = changed is None or not torch.equal(value[:, -1], changed[:, -1])
            yield Spot(call, side, key, value.double() if value.is_floating_point() else value, mixed)

    @property
    def tolerance(self) -> float:
        """How far two sides of an addition may be apart, relative to the stream; a wrong reading is off by about 1."""
        return min(0.05, 2000 * eps(self.resid.dtype))

    def layer_map(self) -> LayerMap:
        """The layer's map; raises InputError naming the module when the additions cannot be read."""
        algebra = next(self._algebras(), None)
        if algebra is None:
            raise InputError(
                f"layer at {self.path}: its output is not the stream plus attention plus FFN, with or without norms; "
                f"closest reading leaves a residual of {self._best_residual():.2g} of the stream"
            )
        taps = {"resid": Tap("", "in", self.stream_key), NEXT: Tap("", "out", next(iter(self.layer.outputs)))}
        missing: dict[str, str] = {}
        if algebra.mid is not None:
            taps["resid_mid"] = algebra.mid.tap()
        else:
            why = "a parallel layer has no stream between its sub-layers" if algebra.parallel else "one sub-layer only"
            missing["resid_mid"] = why
        resid = self.resid.double()
        attn = self._attention(algebra, taps, missing)
        root = self._attn_root(attn, algebra) if attn else None
        source = algebra.mid.value if algebra.mid is not None else resid
        down, sparse = self._ffn(algebra, taps, missing, root)
        return LayerMap(
            taps=taps,
            missing=missing,
            sublayers=tuple(name for name in ("attn", "ffn") if getattr(algebra, name) is not None),
            parallel=algebra.parallel,
            mid_norm=algebra.mid_norm,
            next_norm=algebra.next_norm,
            attn_norm=self._norm_between(resid, taps.get("attn_in")),
            ffn_norm=self._norm_between(source, taps.get("ffn_in")),
            output_norms=tuple(
                path
                for branch in (algebra.attn, algebra.ffn)
                if branch and (path := self._output_norm(branch[0])) is not None
            ),
            attn_projection=attn.call.path if attn else None,
            ffn_down=down,
            attn_root=root or "",
            sparse=sparse,
            readers={
                site: self._readers(taps[site], inside=root if site == "attn_in" else None, outside=root)
                for site in ("attn_in", "ffn_in")
                if site in taps
            },
        )

    def _readers(self, tap: Tap, inside: str | None, outside: str | None) -> tuple[Tap, ...]:
        """Every input of a module with parameters of its own that holds the tapped tensor, in the sub-layer."""
        value = next(spot.value for spot in self.inputs if spot.tap() == tap)
        return tuple(
            spot.tap()
            for spot in self.inputs
            if any(True for _ in spot.call.module.parameters(recurse=False))
            and not is_norm(spot.call.module)
            and (below(spot.call.path, inside) if inside else not below(spot.call.path, outside))
            and spot.value.shape == value.shape
            and torch.equal(spot.value, value)
        )

    def _algebras(self) -> Iterator[Algebra]:
        """Every reading that holds: two additions, then parallel, then a single one."""
        resid, after = self.resid.double(), self.resid_next.double()
        ends = [(after, None), *((spot.value, norm) for spot, norm in self._norms_before(after))]
        for first in self._unique(self.inputs):
            branch = None if self._same(first.value, resid) else self._added(first.value, resid, mixed=True)
            if branch is None:
                continue
            mids: list[tuple[Spot, str | None]] = [(first, None)]
            mids += [(spot, spot.call.path) for spot in self._norms_after(first.value)]
            for mid, mid_norm in mids:
                for end, next_norm in ends:
                    second = None if self._same(end, mid.value) else self._added(end, mid.value)
                    if second is not None:
                        yield Algebra(branch, second, mid, mid_norm, next_norm)
        for end, next_norm in ends:
            both = self._added_pair(end, resid)
            if both is not None:
                yield Algebra(both[0], both[1], next_norm=next_norm, parallel=True)
        for end, next_norm in ends:
            one = self._added(end, resid)
            if one is not None:
                yield (
                    Algebra(one, None, None, None, next_norm)
                    if one[0].mixed
                    else Algebra(None, one, None, None, next_norm)
                )

    def _candidates(self) -> list[Spot]:
        width = self.resid.shape[-1]
        return [spot for spot in self.outputs if spot.value.shape[-1] == width and spot.value.is_floating_point()]

    def _unique(self, spots: list[Spot]) -> list[Spot]:
        """Stream-wide spots, one for each distinct value."""
        kept: list[Spot] = []
        for spot in spots:
            if spot.value.shape == self.resid.shape and spot.value.is_floating_point():
                if not any(torch.equal(spot.value, other.value) for other in kept):
                    kept.append(spot)
        return kept

    def _same(self, left: Tensor, right: Tensor) -> bool:
        return bool((left - right).norm() <= self.tolerance * right.norm())

    def _added(self, total: Tensor, stream: Tensor, mixed: bool | None = None) -> tuple[Spot, float] | None:
        """The output b and number c with total = stream + c b; of equal outputs the one that completes last."""
        found = None
        for spot in self._candidates():
            if mixed is not None and spot.mixed != mixed:
                continue
            scale = self._scale(total - stream, spot.value)
            if scale is not None and (total - stream - scale * spot.value).norm() <= self.tolerance * total.norm():
                if found is None or torch.equal(found[0].value, spot.value):
                    found = (spot, self._snapped(scale))
        return found

    def _scale(self, difference: Tensor, branch: Tensor) -> float | None:
        size = branch.square().sum()
        if size == 0 or difference.norm() == 0:
            return None
        scale = float((difference * branch).sum() / size)
        return scale if (difference - scale * branch).norm() <= 0.05 * difference.norm() else None

    def _snapped(self, scale: float) -> float:
        """The number itself where the layer carries it (granite's residual multiplier); 1 when it is 1 to rounding."""
        known = [1.0, *(v for v in vars(self.layer.module).values() if isinstance(v, float) and v != 0.0)]
        nearest = min(known, key=lambda number: abs(number - scale))
        return nearest if abs(nearest - scale) <= self.tolerance * abs(scale) else scale

    def _added_pair(self, total: Tensor, stream: Tensor) -> tuple[tuple[Spot, float], tuple[Spot, float]] | None:
        """Attention's and the FFN's outputs with total = stream + c1 a + c2 f, where only attention mixes positions."""
        found = None
        difference = (total - stream).flatten()
        for attn in (spot for spot in self._candidates() if spot.mixed):
            for ffn in (spot for spot in self._candidates() if not spot.mixed):
                columns = torch.stack([attn.value.flatten(), ffn.value.flatten()], dim=1)
                scales = torch.linalg.lstsq(columns, difference[:, None]).solution[:, 0]
                left = (columns @ scales - difference).norm()
                if left <= self.tolerance * total.norm() and bool((scales.abs() > 1e-3).all()):
                    if found is None or torch.equal(found[0][0].value, attn.value):
                        first, second = (self._snapped(float(number)) for number in scales)
                        found = ((attn, first), (ffn, second))
        return found

    def _norms_after(self, value: Tensor) -> Iterator[Spot]:
        """Outputs of modules fed with the value that change it without mixing widths or positions of others."""
        for call in self.calls:
            if any(holds(item, value, self.resid) for item in call.inputs.values()) and is_norm(call.module):
                yield from (spot for spot in self.outputs if spot.call is call)

    def _norms_before(self, value: Tensor) -> Iterator[tuple[Spot, str]]:
        for call in self.calls:
            if is_norm(call.module) and any(holds(item, value, self.resid) for item in call.outputs.values()):
                yield from ((spot, call.path) for spot in self.inputs if spot.call is call)

    def _norm_between(self, source: Tensor, tap: Tap | None) -> str | None:
        if tap is None:
            return None
        target = next(s for s in self.inputs if s.tap() == tap)
        for call in self.calls:
            fed = any(holds(item, source, self.resid) for item in call.inputs.values())
            made = any(holds(item, target.value, self.resid) for item in call.outputs.values())
            if fed and made and is_norm(call.module):
                return call.path
        return None

    def _output_norm(self, branch: Spot) -> str | None:
        """The sub-layer's own output norm, when the branch is the output of one."""
        made = (spot for spot in self.outputs if torch.equal(spot.value, branch.value))
        first = next(made, None)
        return first.call.path if first is not None and is_norm(first.call.module) else None

    def _attention(self, algebra: Algebra, taps: dict[str, Tap], missing: dict[str, str]) -> Spot | None:
        """Tap attn_in, heads_out and attn_out; the output projection is the first linear map fed by other positions."""
        sites = ("attn_in", "heads_out", "attn_out")
        if algebra.attn is None:
            missing.update(dict.fromkeys(sites, "this layer has no attention sub-layer"))
            return None
        branch, scale = algebra.attn
        taps["attn_out"] = branch.tap(scale)
        linear = [spot for spot in self.inputs if is_linear(spot.call.module) and spot.call.end <= branch.call.end]
        projection = next((spot for spot in linear if spot.mixed), None)
        if projection is None:
            missing.update(dict.fromkeys(("attn_in", "heads_out"), "attention has no output projection of its own"))
            return branch
        taps["heads_out"] = projection.tap()
        root = self._attn_root(projection, algebra)
        first = next((s for s in linear if below(s.call.path, root) and s is not projection), None)
        if first is None:
            missing["attn_in"] = "no linear map reads the input of attention"
        else:
            taps["attn_in"] = first.tap()
        return projection

    def _attn_root(self, projection: Spot, algebra: Algebra) -> str:
        """The module that holds all of attention and nothing of the FFN."""
        steps = projection.call.path.split(".")
        if algebra.ffn is None:
            return ".".join(steps[:-1])
        others = [call.path.split(".") for call in self.calls if is_linear(call.module) or is_experts(call.module)]
        shared = 0
        while all(other[: shared + 1] == steps[: shared + 1] for other in others):
            shared += 1
        return ".".join(steps[: shared + 1])

    def _ffn(
        self, algebra: Algebra, taps: dict[str, Tap], missing: dict[str, str], attn_root: str | None
    ) -> tuple[str | None, bool]:
        """Tap the FFN's sites; returns its last linear map and whether it is sparse."""
        if algebra.ffn is None:
            sites = ("ffn_in", "ffn_pre", "ffn_act", "ffn_hidden", "ffn_out", *_ROUTING)
            missing.update(dict.fromkeys(sites, "this layer has no FFN sub-layer"))
            return None, False
        branch, scale = algebra.ffn
        taps["ffn_out"] = branch.tap(scale)
        region = [c for c in self.calls if not below(c.path, attn_root) and c.end <= branch.call.end]
        if not algebra.parallel and attn_root is not None:
            attn_end = max(call.end for call in self.calls if below(call.path, attn_root))
            region = [call for call in region if call.end > attn_end]
        sparse = any(is_experts(call.module) for call in region)
        readers = [s for s in self.inputs if s.call in region and (is_linear(s.call.module) or routes(s.call))]
        if not readers:
            raise InputError(f"layer at {self.path}: no linear map inside its FFN; ffn_in cannot be told")
        taps["ffn_in"] = readers[0].tap()
        if sparse:
            self._router(region, taps, missing)
            missing.update(dict.fromkeys(("ffn_pre", "ffn_act", "ffn_hidden"), "sparse FFN: one for each block"))
            return None, True
        missing.update(dict.fromkeys(_ROUTING, "dense FFN: nothing is routed"))
        down = readers[-1]
        taps["ffn_hidden"] = down.tap()
        self._activation([call for call in region if call.start > readers[0].call.start], taps, missing)
        return down.call.path, False

    def _activation(self, region: list[Call], taps: dict[str, Tap], missing: dict[str, str]) -> None:
        for call in region:
            if is_elementwise(call):
                taps["ffn_pre"] = Tap(call.path, "in", 0, call.nth, overwritten=call.overwritten("in", 0))
                taps["ffn_act"] = Tap(call.path, "out", None, call.nth, overwritten=call.overwritten("out", None))
                return
        missing.update(dict.fromkeys(("ffn_pre", "ffn_act"), "the activation is not a module of its own here"))

    def _router(self, region: list[Call], taps: dict[str, Tap], missing: dict[str, str]) -> None:
        for call in region:
            if routes(call):
                kinds = {key: item.is_floating_point() for key, item in call.outputs.items()}
                taps["selected"] = Tap(call.path, "out", next(k for k, floating in kinds.items() if not floating))
                taps["router_logits"] = Tap(call.path, "out", next(k for k, floating in kinds.items() if floating))
                self._weights(region, taps, missing)
                return
        missing.update(dict.fromkeys(_ROUTING, "the router is not a module of its own here"))

    def _weights(self, region: list[Call], taps: dict[str, Tap], missing: dict[str, str]) -> None:
        """Tap what the experts are given beside ffn_in and the chosen blocks."""
        read = next(spot.value for spot in self.inputs if spot.tap() == taps["ffn_in"])
        given = [
            spot
            for spot in self.inputs
            if spot.call in region and is_experts(spot.call.module) and spot.value.is_floating_point()
        ]
        weights = [spot for spot in given if spot.value.shape != read.shape or not torch.equal(spot.value, read)]
        if len(weights) == len(given):
            missing["selected_weights"] = "the chosen blocks do not read ffn_in"
        elif len(weights) != 1:
            missing["selected_weights"] = "the chosen blocks are not given one tensor of weights"
        else:
            taps["selected_weights"] = weights[0].tap()

    def _best_residual(self) -> float:
        resid, after = self.resid.double(), self.resid_next.double()
        left = [1.0]
        for spot in self._candidates():
            size = spot.value.square().sum()
            if size > 0:
                scale = ((after - resid) * spot.value).sum() / size
                left.append(float((after - resid - scale * spot.value).norm() / after.norm()))
        return min(left)
