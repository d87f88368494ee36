"""Which layers can change places: the cost of running whole layers in another order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from transect.after_edit import TransferOption
from transect.effects import BLANK, Effects, Measured, evaluation_rows, fixed_order, measured
from transect.errors import InputError
from transect.metrics.errors import Error
from transect.probes._after_edit import AfterState, Found, after_edit, behind, found_of, split_for, work_of
from transect.probes._continued import Course
from transect.probes._on_labels import Labels
from transect.probes._on_text import Text
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


@dataclass(slots=True, eq=False)
class OrderState:
    """What the orders cost, and what came of trainings after them."""

    effects: Effects
    after: AfterState | None = None

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {"effects": self.effects.pack(), "after": self.after and self.after.pack()}


@dataclass(frozen=True, kw_only=True)
class Commutativity(Probe):
    """What it costs to run layers in another order: swaps, reversals, shuffles, one layer or a short pattern repeated.

    h = embed(tokens); for p in order: h = layer[p](h); logits = head(h). loss_change = loss(order) - loss(intact) on
    the same tokens, kl = KL(intact || edited), agreement = how often the most probable token stays, state_change =
    (1 - cos)/2 of the last hidden state (after the final norm) from the intact model's. Kinds: `pairs` (i, j),
    `adjacent` (i, i+1), `mirrored` (i, L-1-i), `reversal` of three, `shuffle` with k layers fixed (a layer may land
    home), `repeat` one layer L times, `pattern` a run of layers tiled to L. Shuffles are means over orders, their
    errors are over orders; all others are over documents. transfer: the accuracy of a fine-tuned model in each order
    (accuracy, accuracy_change), and all of it again after training in that order (variant `.../continued`), against the
    unedited model trained as long; recovered = 1 - cost after training / cost before. Orders start from the fine-tuned
    model. See docs/train_after_an_edit.md.

    Range and unit: loss, loss_change and kl in nats per target; agreement, state_change and accuracy 0 to 1; layers in
    order; recovered up to 1.
    Reads: nothing inside the model; the losses are causal (next token) or masked (15 % of the tokens, 80/10/10).
    Source: arXiv 2101.04547, swaps, shuffles and repeats. Differences: loss and KL beside task accuracy, no
    training after the edit unless asked for; pairs of any layers; 10 orders for each number of fixed layers, not 100.
    Raises: InputError for an unknown kind, a model that runs its layers in a loop, or an unknown mask token.
    Cost: layers up to the first one moved are run once for all arrangements: (L-1) L (L+1) / 3 + L layers for all
    pairs; one head for each arrangement; `sample` tokens. With transfer: one training for each arrangement.
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
    transfer: TransferOption = None

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
        split = split_for(self.transfer)
        return Reading(split=split, targets=targets, edit_tokens=self.sample, observes=False, fits=False)

    def refusal(self, view: View) -> str | None:
        """A model that runs its layers in a loop has no order to change; not every model can be trained further."""
        return fixed_order(view) or (None if self.transfer is None else self.transfer.refusal(view))

    def memory(self, setting: Setting) -> int:
        """The sums of every arrangement, and what trainings take."""
        after, count = self._after(setting), len(self.arrangements(setting.view.num_layers, setting.seed))
        return Effects.nbytes(count, setting.units) + (0 if after is None else after.memory())

    def start(self, setting: Setting, packed: dict | None) -> OrderState:
        """Zeros, or what a file holds."""
        after, count = self._after(setting), len(self.arrangements(setting.view.num_layers, setting.seed))
        own = None if after is None else after.start(None if packed is None else packed["after"])
        if packed is not None:
            return OrderState(Effects(**packed["effects"]), own)
        return OrderState(Effects.empty(count, setting.units), own)

    def _after(self, setting: Setting) -> Labels | Text | None:
        if self.transfer is None:
            return None
        count = len(self.arrangements(setting.view.num_layers, setting.seed))
        return after_edit(self.transfer, setting, count, count, fresh=False)

    def variants(self, state: Any, setting: Setting) -> tuple[Variant, ...]:
        """Every order as a variant without changes inside layers."""
        return tuple(Variant(one.order) for one in self.arrangements(setting.view.num_layers, setting.seed))

    def see_edit(self, state: OrderState, setting: Setting, variant: int | None, outcome: Outcome) -> None:
        """Add an order's losses and distances."""
        state.effects.add(variant, outcome)

    def work(self, setting: Setting) -> float:
        """Operations of the trainings."""
        return work_of(self._after(setting))

    def trainings(self, setting: Setting) -> tuple[int, ...]:
        """One of the unedited model, and one for each order."""
        after = self._after(setting)
        return () if after is None else after.trainings()

    def train(self, state: OrderState, setting: Setting, number: int, tick: Callable[[int], None]) -> None:
        """Train the model in one order."""
        after = self._after(setting)
        assert after is not None
        variants = self.variants(state, setting)
        after.train(state.after, number, lambda at: Course(variants[at]), tick)  # pyright: ignore[reportArgumentType]

    def rows(self, state: OrderState, setting: Setting) -> Iterator[Row]:
        """The intact loss, every arrangement, both again for what trainings came to, and the layers run and saved."""
        arrangements = self.arrangements(setting.view.num_layers, setting.seed)
        after = self._after(setting)
        stages: list[tuple[str, Measured | Found]] = [("", measured(state.effects, setting))]
        if after is not None and state.after is not None:
            stages += found_of(after, state.after, state.effects)
        last = setting.view.num_layers - 1
        for stage, found in stages:
            yield from found.rows(None, behind(Arrangement("intact", "intact", 0, last, ()).row(), stage))
            for number, one in enumerate(arrangements):
                if one.kind != "shuffle":
                    yield from found.rows(number, behind(one.row(), stage))
            yield from _shuffle_rows(arrangements, found, stage)
        yield from evaluation_rows(state.effects, setting, self.variants(state, setting), "orders of layers")

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


def _shuffle_rows(arrangements: list[Arrangement], found: Measured | Found, stage: str) -> Iterator[Row]:
    """One row for each number of fixed layers: the mean over orders, with the error over orders."""
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(arrangements):
        if one.kind == "shuffle":
            groups.setdefault(one.edit, []).append(number)
    for numbers in groups.values():
        like = behind(arrangements[numbers[0]].row(), stage)
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
