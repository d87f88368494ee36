"""Edited models that share as much of a forward pass as they can: what a variant is, and how many are run at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transect.view import edits
from transect.view.resume import resumed
from transect.view.sites import NEXT
from transect.view.tensors import parts

if TYPE_CHECKING:
    from transect.view.view import View

Step = tuple[int, tuple[str, ...]]
"""One executed layer and the names of the changes it carries."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change inside one layer: its name, which tells it from any other change, and the edit that makes it.

    `make(view, place)` opens the edit on the layer that stands at `place` of the order being run.
    """

    name: str
    make: Callable[["View", int], AbstractContextManager[None]] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Variant:
    """An edited model: the order in which layers run, and changes inside some of them; changes move with the layer.

    A change in a layer that the order leaves out changes nothing.
    """

    order: tuple[int, ...]
    changes: tuple[tuple[int, Change], ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """What runs, layer by layer; variants with a common beginning share its computation."""
        return tuple((layer, tuple(change.name for at, change in self.changes if at == layer)) for layer in self.order)


@dataclass(frozen=True, slots=True, eq=False)
class Ran:
    """One variant's pass: its number in the list given (None: the unedited model), what came out, and its cost."""

    number: int | None
    hidden: Tensor  # [batch, positions, width] resid[L], after the final norm where there is one
    logits: Tensor | None  # [batch, positions, vocabulary]
    layers_run: int


def planned_evaluations(variants: Iterable[Variant], layers: int) -> tuple[int, int]:
    """How many layers one pass over all variants and the unedited model runs, and how many without sharing.

    All swaps of L layers: (L-1) L (L+1) / 3 + L; adjacent ones: (L-1) (L+2) / 2 + L.
    """
    intact = tuple((layer, ()) for layer in range(layers))
    paths = sorted([intact, *(variant.steps for variant in variants)])
    total = sum(len(path) for path in paths)
    return total - sum(_common(left, right) for left, right in pairwise(paths)), total


def run_all(view: "View", ids: Tensor, mask: Tensor, variants: Sequence[Variant]) -> Iterator[Ran]:
    """Run the unedited model and then every variant on one batch, each layer of a common beginning once.

    Variants come in the order in which they share most, not in the order given; equal ones are run once and given
    for each. No gradients. Memory: the layers' outputs of two passes, the unedited one's and the last one's.
    """
    intact = Variant(tuple(range(view.num_layers)))
    base, hidden, logits = _run(view, ids, mask, intact, [])
    yield Ran(None, hidden, logits, len(base))
    path, outputs = intact.steps, base
    for number in sorted(range(len(variants)), key=lambda index: variants[index].steps):
        variant = variants[number]
        if variant.steps == path and variant.steps != intact.steps:
            yield Ran(number, hidden, logits, 0)
            continue
        shared, shared_base = _common(variant.steps, path), _common(variant.steps, intact.steps)
        known = outputs[:shared] if shared >= shared_base else base[:shared_base]
        path = variant.steps
        outputs, hidden, logits = _run(view, ids, mask, variant, known)
        yield Ran(number, hidden, logits, len(outputs) - len(known))


def _run(
    view: "View", ids: Tensor, mask: Tensor, variant: Variant, known: list[object]
) -> tuple[list[object], Tensor, Tensor | None]:
    with torch.no_grad(), ExitStack() as stack:
        if variant.order != tuple(range(view.num_layers)):
            stack.enter_context(edits.order(view, variant.order))
        for layer, change in variant.changes:
            if layer not in variant.order:
                continue
            stack.enter_context(change.make(view, variant.order.index(layer)))
        made = stack.enter_context(resumed(view, known))
        result = view.run(ids, mask, head=view.has_head)
        outputs = known + made
        last = parts(outputs[-1])[view.maps[-1].taps[NEXT].key]
        norm = view.final_norm
        return outputs, last if norm is None else norm(last), result if view.has_head else None


def _common(left: Sequence[Step], right: Sequence[Step]) -> int:
    """The length of the common beginning."""
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
