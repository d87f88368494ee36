"""Which layers can change places: the cost of running whole layers in another order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from transect.effects import BLANK, Effects, Measured, evaluation_rows, fixed_order, measured
from transect.errors import InputError
from transect.metrics.errors import Error
from transect.probes.base import Outcome, Probe, Reading, Setting
from transect.results import Row
from transect.targets import Asked, check_objective, objective_for
from transect.view.variants import Variant
from transect.view.view import View

KINDS = ("pairs", "adjacent", "mirrored", "reversal", "shuffle", "repeat", "pattern")


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One order of layers: its kind, how it is called, and which layers it concerns."""

    kind: str
    edit: str
    layer: int
    layer_to: int | None
    order: tuple[int, ...]
    part: str | None = None

    def row(self) -> Row:
        """The columns that say which arrangement it is."""
        return replace(
            BLANK,
            variant=self.kind,
            edit=self.edit,
            layer=self.layer,
            layer_to=self.layer_to,
            part=self.part,
        )


@dataclass(frozen=True, kw_only=True)
class Commutativity(Probe):
    """What it costs to run layers in another order: swaps, reversals, shuffles, one layer or a short pattern repeated.

    h = embed(tokens); for p in order: h = layer[p](h); logits = head(h). loss_change = loss(order) - loss(intact) on
    the same tokens, kl = KL(intact || edited), agreement = how often the most probable token stays, state_change =
    (1 - cos)/2 of the last hidden state (after the final norm) from the intact model's. Kinds: `pairs` (i, j),
    `adjacent` (i, i+1), `mirrored` (i, L-1-i), `reversal` of three, `shuffle` with k layers fixed (a layer may land
    home), `repeat` one layer L times, `pattern` a run of layers tiled to L. Shuffles are means over orders, their
    errors are over orders; all others are over documents.

    Range and unit: loss, loss_change and kl in nats per target; agreement and state_change 0 to 1; layers in order.
    Reads: nothing inside the model; the losses are causal (next token) or masked (15 % of the tokens, 80/10/10).
    Source: arXiv 2101.04547, swaps, shuffles and repeats. Differences: loss and KL in place of task accuracy, direct
    (no training after the edit); pairs of any layers; 10 orders for each number of fixed layers in place of 100.
    Raises: InputError for an unknown kind, a model that runs its layers in a loop, or an unknown mask token.
    Cost: layers up to the first one moved are run once for all arrangements: (L-1) L (L+1) / 3 + L layers for all
    pairs; one head for each arrangement; `sample` tokens.
    """

    title: ClassVar[str] = "Which layers can change places"
    source: ClassVar[str] = "arXiv 2101.04547"
    costly: ClassVar[bool] = True

    kinds: tuple[str, ...] = ("pairs", "reversal", "shuffle", "repeat", "pattern")
    shuffles: int = 10
    fixed: tuple[int, ...] | None = None
    pattern_widths: tuple[int, ...] = (2, 4)
    sample: int = 2048
    objective: Asked = "auto"
    mask_id: int | None = None
    mask_rate: float = 0.15

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise InputError(f"commutativity: kind {kind!r} is unknown; allowed are {', '.join(KINDS)}")
        for name in ("shuffles", "sample"):
            if getattr(self, name) < 1:
                raise InputError(f"commutativity: {name} is {getattr(self, name)}; it is 1 or more")
        if any(width < 1 for width in self.pattern_widths):
            raise InputError(f"commutativity: pattern_widths {self.pattern_widths}; widths are 1 or more")
        check_objective("commutativity", self.objective, self.mask_rate)

    def reading(self, view: View) -> Reading:
        """Edits on a sample of the text; targets only where the model has a head to be asked with."""
        targets = None
        if view.has_head:
            targets = objective_for(view, "commutativity", self.objective, self.mask_id, self.mask_rate)
        return Reading(targets=targets, edit_tokens=self.sample, observes=False)

    def refusal(self, view: View) -> str | None:
        """A model that runs its layers in a loop has no order to change."""
        return fixed_order(view)

    def memory(self, setting: Setting) -> int:
        """The sums of every arrangement."""
        return Effects.nbytes(len(self.arrangements(setting.view.num_layers, setting.seed)), setting.units)

    def start(self, setting: Setting, packed: dict | None) -> Effects:
        """Zeros."""
        if packed is not None:
            return Effects(**packed)
        return Effects.empty(len(self.arrangements(setting.view.num_layers, setting.seed)), setting.units)

    def variants(self, state: Any, setting: Setting) -> tuple[Variant, ...]:
        """Every order as a variant without changes inside layers."""
        return tuple(Variant(one.order) for one in self.arrangements(setting.view.num_layers, setting.seed))

    def see_edit(self, state: Effects, setting: Setting, variant: int | None, outcome: Outcome) -> None:
        """Add an order's losses and distances."""
        state.add(variant, outcome)

    def rows(self, state: Effects, setting: Setting) -> Iterator[Row]:
        """The intact loss, every arrangement, and the layers run and saved."""
        arrangements = self.arrangements(setting.view.num_layers, setting.seed)
        found = measured(state, setting)
        last = setting.view.num_layers - 1
        yield from found.rows(None, Arrangement("intact", "intact", 0, last, ()).row())
        for number, one in enumerate(arrangements):
            if one.kind != "shuffle":
                yield from found.rows(number, one.row())
        yield from _shuffle_rows(arrangements, found)
        yield from evaluation_rows(state, setting, self.variants(state, setting), "orders of layers")

    def arrangements(self, layers: int, seed: int) -> list[Arrangement]:
        """Every order asked for of so many layers."""
        made = {
            "pairs": lambda: [_swap("pairs", i, j, layers) for i in range(layers) for j in range(i + 1, layers)],
            "adjacent": lambda: [_swap("adjacent", i, i + 1, layers) for i in range(layers - 1)],
            "mirrored": lambda: [_swap("mirrored", i, layers - 1 - i, layers) for i in range(layers // 2)],
            "reversal": lambda: [_reversal(i, layers) for i in range(layers - 2)],
            "shuffle": lambda: self._shuffled(layers, seed),
            "repeat": lambda: [_repeat(j, layers) for j in range(layers)],
            "pattern": lambda: [_pattern(i, w, layers) for w in self.pattern_widths for i in _starts(w, layers)],
        }
        return [one for kind in dict.fromkeys(self.kinds) for one in made[kind]()]

    def _shuffled(self, layers: int, seed: int) -> list[Arrangement]:
        counts = _spread(layers - 2) if self.fixed is None else self.fixed
        found = []
        for fixed in counts:
            if not 0 <= fixed <= layers:
                raise InputError(f"commutativity: {fixed} layers cannot be fixed; the model has {layers}")
            for draw in range(self.shuffles):
                rng = np.random.Generator(np.random.PCG64([seed % 2**32, fixed, draw]))
                moved = np.sort(rng.permutation(layers)[fixed:])
                order = np.arange(layers)
                order[moved] = rng.permutation(moved)
                words = f"shuffle, {fixed} of {layers} fixed"
                found.append(Arrangement("shuffle", words, 0, layers - 1, tuple(order.tolist()), part=f"{fixed} fixed"))
        return found


def _swap(kind: str, i: int, j: int, layers: int) -> Arrangement:
    order = list(range(layers))
    order[i], order[j] = j, i
    return Arrangement(kind, f"swap {i},{j}", i, j, tuple(order))


def _reversal(i: int, layers: int) -> Arrangement:
    order = (*range(i), i + 2, i + 1, i, *range(i + 3, layers))
    return Arrangement("reversal", f"reverse {i}-{i + 2}", i, i + 2, order)


def _repeat(layer: int, layers: int) -> Arrangement:
    return Arrangement("repeat", f"repeat {layer}", layer, None, (layer,) * layers)


def _pattern(first: int, width: int, layers: int) -> Arrangement:
    order = tuple(first + place % width for place in range(layers))
    words = ",".join(str(layer) for layer in range(first, first + width))
    return Arrangement("pattern", f"pattern {words}", first, first + width - 1, order)


def _starts(width: int, layers: int) -> range:
    """Where the runs that are tiled begin; none as wide as the model, which is its own order."""
    return range(0, layers - width + 1, width) if width < layers else range(0)


def _spread(most: int) -> tuple[int, ...]:
    """Up to seven numbers of fixed layers from none to all but two."""
    return tuple(sorted({round(x) for x in np.linspace(0, most, 7)})) if most >= 0 else ()


def _shuffle_rows(arrangements: list[Arrangement], found: Measured) -> Iterator[Row]:
    """One row for each number of fixed layers: the mean over orders, with the error over orders."""
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(arrangements):
        if one.kind == "shuffle":
            groups.setdefault(one.edit, []).append(number)
    for numbers in groups.values():
        like = arrangements[numbers[0]].row()
        per_order = [list(found.rows(number, like)) for number in numbers]
        for rows in zip(*per_order, strict=True):
            values = [row.value for row in rows if row.value is not None]
            if len(values) < len(rows):
                yield next(row for row in rows if row.value is None)
                continue
            mean = float(np.mean(values))
            if len(values) < 2:
                yield rows[0].measured(mean)
                continue
            stderr = float(np.std(values, ddof=1) / len(values) ** 0.5)
            yield rows[0].measured(mean, Error(stderr, mean - 1.96 * stderr, mean + 1.96 * stderr))
