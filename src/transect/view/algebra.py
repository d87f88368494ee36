"""How a layer's branches are added to the stream, read off tensors by value: total = g stream + c branch."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from transect.view.joins import Join, Spot, distinct
from transect.view.kinds import below, holds, is_elementwise, is_experts, is_linear, is_norm
from transect.view.tensors import eps
from transect.view.trace import Call


class Algebra:
    """Reads one layer's additions off the spots where its tensors pass.

    First every residual is taken to have the number 1, as in almost all models. Only where that fails other numbers
    are tried, and then a branch counts only if it comes out of maps of its own: with a number of 0 any output of the
    layer could else be called a branch.
    """

    def __init__(
        self, layer: Call, calls: list[Call], inputs: list[Spot], outputs: list[Spot], streams: tuple[Tensor, Tensor]
    ) -> None:
        self.layer, self.calls, self.inputs, self.outputs = layer, calls, inputs, outputs
        self.like = streams[0]
        self.resid, self.after = (stream.double() for stream in streams)
        # Of equal outputs the one that completes last is added, of equal inputs the first one is read.
        self.candidates = [group[-1] for group in distinct([spot for spot in outputs if self._wide(spot)])]
        self.passed = distinct([spot for spot in inputs if self._wide(spot)])
        self.maps = [call for call in calls if is_linear(call.module) or is_experts(call.module)]

    def _wide(self, spot: Spot) -> bool:
        return spot.value.shape == self.like.shape and spot.value.is_floating_point()

    @property
    def tolerance(self) -> float:
        """How far two sides of an addition may be apart, relative to the stream; a wrong reading is off by about 1."""
        return min(0.05, 2000 * eps(self.like.dtype))

    def read(self) -> list[Join] | None:
        """The additions in their order, or None where there is no such reading."""
        ends = [(self.after, None), *((spot.value, norm) for spot, norm in self._norms_before(self.after))]
        found = next(self._plain(ends), None)
        found = next(self._free(ends), None) if found is None else self._weighted(found)
        return found and [self._split(join, first=number == 0) for number, join in enumerate(found)]

    def _plain(self, ends: list) -> Iterator[list[Join]]:
        """Residuals with the number 1: two additions, both at once, one, three, and one before two at once."""
        firsts = list(self._firsts(free=False))
        for join, mid in firsts:
            yield from ([join, last] for last in self._lasts(mid, ends, free=False))
        for end, norm in ends:
            both = self._added_pair(end, self.resid, free=False)
            if both is not None:
                yield [replace(both, norm=norm)]
        yield from ([last] for last in self._lasts(self.resid, ends, free=False))
        yield from self._of_three(firsts, ends, free=False)
        yield from self._normed_again(firsts)

    def _free(self, ends: list) -> Iterator[list[Join]]:
        """Residuals with any number, most additions first: with 0 the last branch alone is the stream after it."""
        firsts = list(self._firsts(free=True))
        yield from sorted(self._of_three(firsts, ends, free=True), key=_unlike)
        pairs = [[join, last] for join, mid in firsts for last in self._lasts(mid, ends, free=True, after=join)]
        yield from sorted(pairs, key=_unlike)
        for end, norm in ends:
            both = self._added_pair(end, self.resid, free=True)
            if both is not None:
                yield [replace(both, norm=norm)]
        yield from self._normed_again(firsts)
        yield from ([last] for last in self._lasts(self.resid, ends, free=True))

    def _normed_again(self, firsts: list) -> Iterator[list[Join]]:
        """One addition whose stream passes another norm, that of an FFN which is not there."""
        for join, mid in firsts:
            path = self.norm_between(mid, self.after) if join.norm else None
            if path is not None:
                yield [join, Join((), norm=path)]

    def _of_three(self, firsts: list, ends: list, free: bool) -> Iterator[list[Join]]:
        for join, mid in firsts:
            for second, third in self._middles(mid, join, free):
                for last in self._lasts(third, ends, free, after=second):
                    yield [join, second, last]
            for end, norm in ends:
                both = self._added_pair(end, mid, free, after=join)
                if both is not None:
                    yield [join, replace(both, norm=norm)]

    def _firsts(self, free: bool) -> Iterator[tuple[Join, Tensor]]:
        """Additions of attention to the layer's input, each with the stream after it."""
        return self._middles(self.resid, None, free)

    def _middles(self, stream: Tensor, before: Join | None, free: bool) -> Iterator[tuple[Join, Tensor]]:
        for group in self.passed:
            spot = group[0]
            if self._same(spot.value, stream):
                continue
            join = self._added(spot.value, stream, mixed=True if before is None else None, free=free, after=before)
            if join is None:
                continue
            # Without a residual the stream is the branch itself: it is read where the branch is done.
            done = max(branch.call.end for branch, _ in join.branches)
            spot = next((other for other in group if other.call.start > done), spot)
            yield replace(join, end=spot), spot.value
            for normed in self._norms_after(spot.value):
                yield replace(join, end=normed, norm=normed.call.path), normed.value

    def _lasts(self, stream: Tensor, ends: list, free: bool, after: Join | None = None) -> Iterator[Join]:
        """One addition between a stream and the layer's end."""
        for end, norm in sorted(ends, key=lambda pair: pair[1] is None) if free else ends:
            join = None if self._same(end, stream) else self._added(end, stream, free=free, after=after)
            if join is not None:
                yield replace(join, norm=norm)

    def _same(self, left: Tensor, right: Tensor) -> bool:
        return bool((left - right).norm() <= self.tolerance * right.norm())

    def _added(
        self, total: Tensor, stream: Tensor, *, free: bool, mixed: bool | None = None, after: Join | None = None
    ) -> Join | None:
        """The output b and numbers g, c with total = g stream + c b; g is 1 unless it is free."""
        for spot in self.candidates:
            if mixed is not None and spot.mixed != mixed:
                continue
            if free:
                join = self._solved(total, stream, (spot,))
                if join is not None and self._own(spot, after, stream):
                    return join
            else:
                scale = self._scale(total - stream, spot.value)
                if scale is not None and (total - stream - scale * spot.value).norm() <= self.tolerance * total.norm():
                    return Join(((spot, self._snapped(scale)),))
        return None

    def _scale(self, difference: Tensor, branch: Tensor) -> float | None:
        size = branch.square().sum()
        if size == 0 or difference.norm() == 0:
            return None
        scale = float((difference * branch).sum() / size)
        return scale if (difference - scale * branch).norm() <= 0.05 * difference.norm() else None

    def _solved(
        self, total: Tensor, stream: Tensor, spots: tuple[Spot, ...], number: float | None = None
    ) -> Join | None:
        """The least-squares numbers of stream and branches (of branches alone, with a number), if they hold."""
        rest = total if number is None else total - number * stream
        columns = [spot.value.flatten() for spot in spots]
        columns = torch.stack(columns if number is not None else [stream.flatten(), *columns], dim=1)
        found = torch.linalg.lstsq(columns, rest.flatten()[:, None]).solution[:, 0]
        if (columns @ found - rest.flatten()).norm() > self.tolerance * total.norm():
            return None
        if number is None:
            return self._solved(total, stream, spots, self._number(float(found[0]), stream, total))
        if not bool((found.abs() > 1e-3).all()):
            return None
        scales = [self._snapped(float(scale)) for scale in found]
        return Join(tuple(zip(spots, scales, strict=True)), number)

    def _weighted(self, joins: list[Join]) -> list[Join]:
        """The joins with the numbers their residuals really have: a learned one may differ from 1 by little."""
        result, stream = [], self.resid
        for join in joins:
            end = self.after if join.end is None else join.end.value
            if not join.branches:
                result.append(join)
                continue
            total = end if join.norm is None else self._input_of(join.norm, end)
            solved = self._solved(total, stream, tuple(spot for spot, _ in join.branches))
            differs = solved is not None and solved.number != 1
            result.append(replace(solved, end=join.end, norm=join.norm) if solved and differs else join)
            stream = end
        return result

    def _input_of(self, norm: str, output: Tensor) -> Tensor:
        return next(spot.value for spot, path in self._norms_before(output) if path == norm)

    def _snapped(self, scale: float) -> float:
        """The number itself where the layer carries it (granite's residual multiplier); 1 when it is 1 to rounding."""
        known = [1.0, *(v for v in vars(self.layer.module).values() if isinstance(v, float) and v != 0.0)]
        return self._nearest(scale, known)

    def _nearest(self, number: float, known: list[float]) -> float:
        nearest = min(known, key=lambda other: abs(other - number))
        return nearest if abs(nearest - number) <= self.tolerance * abs(number) else number

    def _number(self, number: float, stream: Tensor, total: Tensor) -> float:
        """A residual's number as the model has it: 0, 1, or a number or scalar parameter of one of its modules."""
        if abs(number) * float(stream.norm()) <= self.tolerance * float(total.norm()):
            return 0.0
        known = [1.0]
        for module in self.layer.module.modules():
            known += [value for value in vars(module).values() if isinstance(value, float)]
            known += [float(p.detach()) for p in module.parameters(recurse=False) if p.ndim == 0]
        return self._nearest(number, known)

    def _added_pair(self, total: Tensor, stream: Tensor, free: bool, after: Join | None = None) -> Join | None:
        """Two outputs added at once: attention's, which alone mixes positions, and the FFN's; or after it two FFNs'."""
        firsts = [spot for spot in self.candidates if spot.mixed or after is not None]
        seconds = [spot for spot in self.candidates if not spot.mixed or after is not None]
        for number, first in enumerate(firsts):
            for second in seconds if after is None else seconds[number + 1 :]:
                join = self._solved(total, stream, (first, second), None if free else 1.0)
                if join is None or (after is None and join.number == 1):
                    if join is not None:
                        return join
                    continue
                if self._own(first, after, stream) and self._own(second, after, stream):
                    return join
        return None

    def _split(self, join: Join, first: bool) -> Join:
        """The join with its one branch taken apart where that is a sum which no module made: attention's and the FFN's
        outputs, or two FFNs', that pass a dropout or a norm together.
        """
        if len(join.branches) != 1:
            return join
        (branch, scale), norm = join.branches[0], None
        call, total = self.made(branch).call, branch.value
        given = [spot.value for spot in self.inputs if spot.call is call and self._wide(spot)]
        if not any(torch.equal(value, total) for value in given):
            norm = self.output_norm(branch)
            if norm is None or any(self._wide(s) and torch.equal(s.value, given[0]) for s in self.outputs):
                return join
            total = given[0]
        parts = [spot for spot in self.candidates if not torch.equal(spot.value, branch.value)]
        for number, one in enumerate(parts):
            for other in parts[number + 1 :]:
                sums = self._solved(total, torch.zeros_like(total), (one, other), 0.0)
                told = not first or one.mixed != other.mixed
                if sums and told and all(self._comes_of_map(spot.value) for spot in (one, other)):
                    pairs = tuple((spot, own if norm else own * scale) for spot, own in sums.branches)
                    return replace(join, branches=pairs, sum_norm=norm)
        return join

    def _own(self, spot: Spot, after: Join | None, stream: Tensor) -> bool:
        """Whether a branch comes out of maps of its own, attention's of one, an FFN's of two linear ones or of experts.

        An FFN's have run since the branches of `after`, and the first of them reads the stream or a norm of it.
        """
        begin = -1 if after is None else max(self.made(other).call.end for other, _ in after.branches)
        inside = [call for call in self.maps if call.start > begin and call.end <= spot.call.end]
        if not inside or not self._comes_of_map(spot.value):
            return False
        if after is None:
            return True
        read = [other.value for other in self.inputs if other.call is inside[0] and self._wide(other)]
        from_stream = any(self._same(value, stream) or self.norm_between(stream, value) for value in read)
        return from_stream and (len(inside) > 1 or any(is_experts(call.module) for call in inside))

    def _comes_of_map(self, value: Tensor) -> bool:
        """Whether a tensor is the output of a linear map or a sparse FFN, perhaps through norms and activations."""
        return self.map_of(value, sparse=True) is not None

    def map_of(self, value: Tensor, sparse: bool = False) -> Call | None:
        """The call of the linear map (or with `sparse` of a sparse FFN) that ends in a tensor, seen through norms and
        activations; None where something else made it.
        """
        for spot in self.outputs:
            if not self._wide(spot) or not torch.equal(spot.value, value):
                continue
            call = spot.call
            experts = any(below(inner.path, call.path) and is_experts(inner.module) for inner in self.maps)
            if is_linear(call.module) or (sparse and experts):
                return call
            if not is_norm(call.module):
                continue
            for given in self.inputs:
                if given.call is call and self._wide(given) and not torch.equal(given.value, value):
                    found = self.map_of(given.value, sparse)
                    if found is not None:
                        return found
        return None

    def made(self, spot: Spot) -> Spot:
        """The first output with the spot's value: that of the module that computed it."""
        return next(other for other in self.outputs if self._wide(other) and torch.equal(other.value, spot.value))

    def _norms_after(self, value: Tensor) -> Iterator[Spot]:
        """Outputs of norms fed with the value."""
        for call in self.calls:
            if any(holds(item, value, self.like) for item in call.inputs.values()) and self._norms(call):
                yield from (spot for spot in self.outputs if spot.call is call)

    def _norms_before(self, value: Tensor) -> Iterator[tuple[Spot, str]]:
        for call in self.calls:
            if any(holds(item, value, self.like) for item in call.outputs.values()) and self._norms(call):
                yield from ((spot, call.path) for spot in self.inputs if spot.call is call)

    def norm_between(self, source: Tensor, target: Tensor) -> str | None:
        """The norm that makes one tensor of another; None where there is none."""
        for call in self.calls:
            fed = any(holds(item, source, self.like) for item in call.inputs.values())
            made = any(holds(item, target, self.like) for item in call.outputs.values())
            if fed and made and self._norms(call):
                return call.path
        return None

    def _norms(self, call: Call) -> bool:
        return is_norm(call.module) and not is_elementwise(call)

    def output_norm(self, branch: Spot) -> str | None:
        """The sub-layer's own output norm, when the branch is the output of one."""
        call = self.made(branch).call
        return call.path if self._norms(call) else None

    def best_residual(self) -> float:
        """How far the closest single addition is from the layer's output, relative to it."""
        left = [1.0]
        for spot in self.candidates:
            size = spot.value.square().sum()
            if size > 0:
                scale = ((self.after - self.resid) * spot.value).sum() / size
                left.append(float((self.after - self.resid - scale * spot.value).norm() / self.after.norm()))
        return min(left)


def _unlike(joins: list[Join]) -> int:
    """Norms after both additions first, then after none: where a residual is 0, either reads the same tensors."""
    normed = [join.norm is not None for join in joins]
    return 0 if all(normed) else 1 if not any(normed) else 2
