"""Make a variant as big, or as costly, as a baseline, by one size of it."""

import json
from dataclasses import dataclass
from functools import cache
from math import lcm
from typing import Any, Literal, get_args

from transect.errors import InputError
from transect.models.budget import Budget, budget
from transect.models.config import ModelConfig
from transect.models.ffn.dense import Dense
from transect.models.ffn.sparse import Sparse

By = Literal["parameters", "active", "flops"]
Free = Literal["ffn", "width", "layers"]
LARGEST = 1 << 24
REACH = 1024
"""Sizes tried from the smallest until one can be built, such as one that blocks divide."""


@dataclass(frozen=True, slots=True)
class Match:
    """A variant made like a baseline.

    settings: the whole model; changes: what was set, path by path; value and target: the variant's and the baseline's
    number of `by`; difference = value / target - 1.
    """

    settings: ModelConfig
    changes: dict[str, Any]
    by: By
    value: float
    target: float

    @property
    def difference(self) -> float:
        """What is left, relative to the target."""
        return self.value / self.target - 1


def match(
    variant: ModelConfig,
    baseline: ModelConfig,
    by: By = "parameters",
    free: Free = "ffn",
    tolerance: float = 0.01,
    context: int | None = None,
) -> Match:
    """The variant with the one size changed that brings it nearest to the baseline.

    by: all parameters, those that one token uses, or forward FLOPs per token at `context` (the baseline's
    `max_positions` if not given). free: `ffn`, the units of a dense FFN and the blocks of a sparse one (by active
    parameters or FLOPs the active ones), in the overrides that have an FFN where there are any; `width` of the stream,
    the number of heads kept; or `layers`. Sizes that cannot be built, because heads or blocks do not divide them, are
    passed over. Of two equally near the smaller is taken.
    Raises InputError for another argument, where no size comes within `tolerance` (relative), or none can change.
    Cost: about twenty models on the meta device.
    """
    for name, given in (("variant", variant), ("baseline", baseline)):
        if not isinstance(given, ModelConfig):
            raise InputError(f"{name} is a {type(given).__name__}; give a ModelConfig (of a recipe: its model)")
    for name, given, allowed in (("by", by, get_args(By)), ("free", free, get_args(Free))):
        if given not in allowed:
            raise InputError(f"{name} is {given!r}; allowed are {', '.join(allowed)}")
    context = baseline.max_positions if context is None else context
    target = number_of(budget(baseline, context), by)
    search = _Search(variant, by, free, context)
    size = search.nearest(target)
    found = Match(search.settings(size), search.changes(size), by, search.value(size), target)
    if abs(found.difference) > tolerance:
        said = ", ".join(f"{path}={given}" for path, given in found.changes.items())
        raise InputError(
            f"no {free} brings {by} within {100 * tolerance:g} % of {target:,.0f}: {said} comes nearest with "
            f"{found.value:,.0f} ({found.difference:+.2%}); free another size or allow more"
        )
    return found


class _Search:
    """The sizes that can be built, and what each costs."""

    def __init__(self, variant: ModelConfig, by: By, free: Free, context: int) -> None:
        self.by: By = by
        self.free, self.context = free, context
        self._plain = variant.plain()
        self._changes = _changes(variant, by, free)
        heads = [layer.attention.heads for layer in variant.layer_configs if layer.attention.head_width is None]
        self._step = lcm(*heads) if free == "width" else 1
        self._reason: InputError | None = None

    def changes(self, size: int) -> dict[str, Any]:
        """What is set, path by path."""
        return {path: fixed if fixed is not SIZE else size for path, fixed in self._changes.items()}

    def settings(self, size: int) -> ModelConfig:
        """The variant of a size; raises InputError where it cannot be built."""
        changed = json.loads(json.dumps(self._plain))
        for path, value in self.changes(size).items():
            _put(changed, path.split("."), value)
        return ModelConfig.parse(changed)

    @cache  # noqa: B019 - lives as long as the search
    def value(self, size: int) -> float:
        """The number that is to be matched."""
        return number_of(budget(self.settings(size), self.context), self.by)

    def nearest(self, target: float) -> int:
        """The size whose number is nearest; the number grows with the size."""
        low = high = self._first(range(self._step, self._step * REACH, self._step))
        if low is None or high is None:
            raise InputError(f"no {self.free} can be built: {self._reason}")
        while self.value(high) < target:
            larger = self._larger(high)
            if larger is None or larger > LARGEST:
                break
            low, high = high, larger
        while (middle := self._between(low, high)) is not None:
            low, high = (middle, high) if self.value(middle) < target else (low, middle)
        return min((low, high), key=lambda size: (abs(self.value(size) - target), size))

    def _larger(self, size: int) -> int | None:
        """About twice the size, or the largest below that."""
        above = self._first(range(2 * size, 2 * size + 32 * self._step, self._step))
        return above or self._first(range(2 * size - self._step, size, -self._step))

    def _between(self, low: int, high: int) -> int | None:
        """A size that can be built, near the middle."""
        middle = low + (high - low) // (2 * self._step) * self._step
        if middle == low:
            return None
        above = self._first(range(middle, high, self._step))
        return above or self._first(range(middle - self._step, low, -self._step))

    def _first(self, sizes: range) -> int | None:
        """The first size that can be built."""
        for size in sizes:
            try:
                self.settings(size)
            except InputError as error:
                self._reason = error
            else:
                return size
        return None


def number_of(counted: Budget, by: By) -> float:
    """The number of a budget that is matched."""
    return {"parameters": counted.parameters, "active": counted.active_parameters, "flops": counted.flops}[by]


SIZE = object()
"""Stands for the size in a change."""


def _changes(variant: ModelConfig, by: By, free: Free) -> dict[str, Any]:
    """What a size is written into, path by path, and what else must be set for it to hold."""
    if free != "ffn":
        return {free: SIZE}
    changes: dict[str, Any] = {}
    for path, index in _ffns(variant).items():
        ffn = variant.layer_configs[index].ffn
        if isinstance(ffn, Dense.Config):
            changes[f"{path}.width"] = SIZE
        elif not isinstance(ffn, Sparse.Config):
            raise InputError(f"{path} is of kind {ffn.kind!r}, whose size is not known here; free width or layers")
        elif by == "parameters":
            given = ffn.cells_per_block(variant), ffn.active(variant)
            fixed = dict(zip(("block_size", "active_blocks"), given, strict=True))
            changes |= {f"{path}.{name}": value for name, value in fixed.items()}
            changes |= {f"{path}.expansion": None, f"{path}.width": None, f"{path}.blocks": SIZE}
        else:
            changes[f"{path}.active_blocks"] = SIZE
    return changes


def _ffns(variant: ModelConfig) -> dict[str, int]:
    """Paths of the FFNs to change, each with a layer that has it: those of overrides, or the one of all layers."""
    count = len(variant.layer_configs)
    own = {
        f"overrides.{place}.set.ffn": override.indices(count)[0]
        for place, override in enumerate(variant.overrides)
        if "ffn" in override.set and override.indices(count)
    }
    return own or {"ffn": 0}


def _put(tree: Any, path: list[str], value: Any) -> None:
    """Set what a path leads to, through lists and short forms of plug-ins."""
    step, *rest = path
    here: Any = int(step) if isinstance(tree, list) else step
    if not rest:
        tree[here] = value
        return
    if isinstance(tree[here], str):
        tree[here] = {"kind": tree[here]}
    _put(tree[here], rest, value)
