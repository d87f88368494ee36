"""Read one layer's sites off its recorded calls, by value and never by name."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transect.errors import InputError
from transect.view.algebra import Algebra
from transect.view.halves import Half, read_half, sites_of
from transect.view.joins import Join, Spot
from transect.view.kinds import below, is_elementwise, is_experts, is_linear, is_norm, routes
from transect.view.layout import Addition, LayerMap, Tap
from transect.view.sites import NEXT
from transect.view.tensors import Key, by_position
from transect.view.trace import Call

_FFNS = ("ffn", "ffn2")
_ABSENT = {
    "attn": "this layer has no attention sub-layer",
    "ffn": "this layer has no FFN sub-layer",
    "ffn2": "this layer has no second FFN",
    "inner": "attention holds no FFN",
}


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
    taps: dict[str, Tap] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

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

    def layer_map(self) -> LayerMap:
        """The layer's map; raises InputError naming the module when the additions cannot be read."""
        algebra = Algebra(self.layer, self.calls, self.inputs, self.outputs, (self.resid, self.resid_next))
        joins = algebra.read()
        if joins is None:
            raise InputError(
                f"layer at {self.path}: its output is not the stream plus attention plus FFN, with or without norms; "
                f"closest reading leaves a residual of {algebra.best_residual():.2g} of the stream"
            )
        self.taps |= {"resid": Tap("", "in", self.stream_key), NEXT: Tap("", "out", next(iter(self.layer.outputs)))}
        branches, additions, sources = self._named(algebra, joins)
        self._streams(joins, additions)
        attn = self._attention(branches, algebra)
        root = self._attn_root(attn, "ffn" in branches) if attn else None
        halves = self._ffns(branches, additions, root, algebra)
        inner = self._inner(root, attn) if root and attn else None
        if inner is not None:
            halves["inner"] = read_half("inner", self._within(inner), self.inputs, self.path)
            self.taps["inner_out"] = next(spot for spot in self.outputs if spot.call is inner).tap()
        for half in halves.values():
            self.taps |= half.taps
            self.missing |= half.missing
        for name, why in _ABSENT.items():
            if name not in branches and name not in halves:
                self.missing |= dict.fromkeys(sites_of(name), why)
        entries = {name: (self._value(f"{name}_in"), sources[name]) for name in branches if f"{name}_in" in self.taps}
        norms = {name: algebra.norm_between(source, value) for name, (value, source) in entries.items()}
        output_norms = (algebra.output_norm(spot) for spot, _ in branches.values())
        last_maps = {name: half.last_map for name, half in halves.items() if half.last_map}
        return LayerMap(
            taps=self.taps,
            missing=self.missing,
            additions=additions,
            entry_norms={name: path for name, path in norms.items() if path is not None},
            output_norms=tuple(path for path in output_norms if path is not None),
            last_maps=({"attn": attn.call.path} if attn else {}) | last_maps,
            bent=tuple(name for name, (spot, _) in branches.items() if is_elementwise(algebra.made(spot).call)),
            roots={name: half.root for name, half in halves.items() if half.root},
            blocks={name: half.blocks for name, half in halves.items() if half.blocks},
            attn_root=root or "",
            readers=self._all_readers(root, halves),
        )

    def _named(
        self, algebra: Algebra, joins: list[Join]
    ) -> tuple[dict[str, tuple[Spot, float]], tuple[Addition, ...], dict[str, Tensor]]:
        """The branches by their sub-layers' names, the additions, and the stream that each sub-layer is added to."""
        branches: dict[str, tuple[Spot, float]] = {}
        additions: list[Addition] = []
        sources: dict[str, Tensor] = {}
        stream, source = self.resid.double(), "resid"
        targets = [*("resid_mid", "resid_mid2")[: len(joins) - 1], NEXT]
        for join, target in zip(joins, targets, strict=True):
            found = sorted(join.branches, key=lambda branch: algebra.made(branch[0]).call.end)
            if not branches and len(joins) > 1 and len(found) == 1:
                names = ["attn"]
            elif not branches:  # all at once: what mixes positions is attention
                found = sorted(join.branches, key=lambda branch: not branch[0].mixed)
                names = ["attn", "ffn"] if len(found) > 1 else ["attn" if found[0][0].mixed else "ffn"]
            else:
                names = [name for name in _FFNS if name not in branches][: len(found)]
            branches |= dict(zip(names, found, strict=True))
            sources |= dict.fromkeys(names, stream)
            additions.append(Addition(tuple(names), source, target, join.number, join.norm, join.sum_norm))
            self.taps |= {f"{name}_out": spot.tap(scale) for name, (spot, scale) in zip(names, found, strict=True)}
            if join.end is not None:
                stream, source = join.end.value, target
        return branches, tuple(additions), sources

    def _streams(self, joins: list[Join], additions: tuple[Addition, ...]) -> None:
        for site, join in zip(("resid_mid", "resid_mid2"), joins[:-1], strict=False):
            assert join.end is not None
            self.taps[site] = join.end.tap()
        if len(joins) == 1:
            several = len(additions[0].adds) > 1
            why = "a parallel layer has no stream between its sub-layers" if several else "one sub-layer only"
            self.missing["resid_mid"] = why
        if len(joins) < 3:
            several = len(joins) == 2 and len(additions[1].adds) > 1
            self.missing["resid_mid2"] = "both FFNs are added at once" if several else _ABSENT["ffn2"]

    def _attention(self, branches: dict[str, tuple[Spot, float]], algebra: Algebra) -> Spot | None:
        """Tap attn_in and heads_out; the output projection is the first linear map fed by other positions."""
        if "attn" not in branches:
            return None
        branch, _ = branches["attn"]
        linear = [spot for spot in self.inputs if is_linear(spot.call.module) and spot.call.end <= branch.call.end]
        mixing = [spot for spot in linear if spot.mixed]
        if not mixing:
            self.missing |= dict.fromkeys(("attn_in", "heads_out"), "attention has no output projection of its own")
            return branch
        last = algebra.map_of(branch.value)
        projection = next((spot for spot in mixing if spot.call is last), mixing[0])
        self.taps["heads_out"] = projection.tap()
        root = self._attn_root(projection, "ffn" in branches)
        inner = self._inner(root, projection)
        readers = [
            spot
            for spot in linear
            if below(spot.call.path, root)
            and spot is not projection
            and not (inner and below(spot.call.path, inner.path))
        ]
        if inner is not None:  # keys and values may read what it makes
            given = [spot.value for spot in self.inputs if spot.call.path == root]
            readers = [s for s in readers if any(torch.equal(s.value, value) for value in given)] or readers
        if not readers:
            self.missing["attn_in"] = "no linear map reads the input of attention"
        else:
            self.taps["attn_in"] = readers[0].tap()
        return projection

    def _attn_root(self, projection: Spot, has_ffn: bool) -> str:
        """The module that holds all of attention and nothing of the FFN."""
        steps = projection.call.path.split(".")
        if not has_ffn:
            return ".".join(steps[:-1])
        others = [call.path.split(".") for call in self.calls if is_linear(call.module) or is_experts(call.module)]
        shared = 0
        while all(other[: shared + 1] == steps[: shared + 1] for other in others):
            shared += 1
        return ".".join(steps[: shared + 1])

    def _inner(self, root: str, projection: Spot) -> Call | None:
        """The FFN inside attention: a module of several linear maps or of experts that makes states, not heads."""
        for call in self.calls:
            if call.path == root or not below(call.path, root) or below(projection.call.path, call.path):
                continue
            maps = [part for part in self._within(call) if is_linear(part.module) or is_experts(part.module)]
            if len(maps) < 2 and not any(is_experts(part.module) for part in maps):
                continue
            made = [spot.value for spot in self.outputs if spot.call is call]
            wide = [value for value in made if value.shape == self.resid.shape]
            if wide and not any(torch.equal(value, projection.value) for value in made):
                return call
        return None

    def _within(self, call: Call) -> list[Call]:
        return [part for part in self.calls if call.start <= part.start and part.end <= call.end]

    def _ffns(
        self,
        branches: dict[str, tuple[Spot, float]],
        additions: tuple[Addition, ...],
        attn_root: str | None,
        algebra: Algebra,
    ) -> dict[str, Half]:
        """The sites of the FFN sub-layers, each in the calls between the branch before it and its own."""
        begin = -1
        together = "attn" in branches and any({"attn", "ffn"} <= set(addition.adds) for addition in additions)
        if not together and attn_root is not None:
            begin = max(call.end for call in self.calls if below(call.path, attn_root))
        halves = {}
        for name in _FFNS:
            if name not in branches:
                continue
            branch, _ = branches[name]
            region = [c for c in self.calls if not below(c.path, attn_root) and begin < c.end <= branch.call.end]
            if halves:
                region = [call for call in region if call.start > begin]
            halves[name] = read_half(name, region, self.inputs, self.path)
            begin = algebra.made(branch).call.end
        return halves

    def _value(self, site: str) -> Tensor:
        return next(spot.value for spot in self.inputs if spot.tap() == self.taps[site])

    def _all_readers(self, root: str | None, halves: dict[str, Half]) -> dict[str, tuple[Tap, ...]]:
        readers = {}
        if "attn_in" in self.taps:
            readers["attn_in"] = self._readers("attn_in", lambda path: below(path, root))
        for name, half in halves.items():
            alone = half.root if len(halves) > 1 else None
            inside = (lambda path, own=alone: below(path, own)) if alone else (lambda path: not below(path, root))
            readers[f"{name}_in"] = self._readers(f"{name}_in", inside)
        return readers

    def _readers(self, site: str, inside) -> tuple[Tap, ...]:
        """Every input of a router, or of a module with parameters of its own, that holds the tapped tensor."""
        value = self._value(site)
        return tuple(
            spot.tap()
            for spot in self.inputs
            if (routes(spot.call) or any(True for _ in spot.call.module.parameters(recurse=False)))
            and not is_norm(spot.call.module)
            and inside(spot.call.path)
            and spot.value.shape == value.shape
            and torch.equal(spot.value, value)
        )
