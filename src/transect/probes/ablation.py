"""What breaks when a part goes: the cost of removing or replacing heads, FFNs, attention and whole layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from transect.after_edit import TransferOption
from transect.effects import BLANK, Effects, Measured, evaluation_rows, fixed_order, measured
from transect.errors import InputError
from transect.parallel import on_every_core
from transect.probes._after_edit import AfterState, Found, after_edit, behind, found_of, split_for, work_of
from transect.probes._cases import Case, element_of, has, nothing_left, runs
from transect.probes._continued import Course
from transect.probes._learnt import Learnt
from transect.probes._on_labels import Labels
from transect.probes._on_text import Text
from transect.probes._replacements import FITTED, METHODS, TRAINED, Replacement, change
from transect.probes.base import Outcome, Probe, Reading, Setting, Sight, SplitRule
from transect.results import Row
from transect.targets import Asked, check_objective, objective_for
from transect.view import edits
from transect.view.capture import Seen
from transect.view.sites import ELEMENTS, Element, present
from transect.view.variants import Change, Variant
from transect.view.view import View

PARTS = ("ffn", "ffn_up", "attn_heads", "attn", "layer", "head", "ffn2", "inner_ffn")
SCHEDULES = ("single", "from_below", "from_above")
RESIDUALS = ("both", "attn", "ffn", "ffn2")
_OF_HEADS = ("zero", "mean")
FREEZE = "freeze"
_FREEZABLE = ("ffn", "attn", "layer", "ffn2")


@dataclass(slots=True, eq=False)
class AblationState:
    """What was fitted for each layer and part, and what the edits cost."""

    fitted: dict[tuple[int, str], Replacement]
    effects: Effects
    epoch: int = 0
    after: AfterState | None = None

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        fitted = {f"{layer} {part}": one.pack() for (layer, part), one in self.fitted.items()}
        after = self.after and self.after.pack()
        return {"fitted": fitted, "effects": self.effects.pack(), "epoch": self.epoch, "after": after}


@dataclass(frozen=True, kw_only=True)
class Ablation(Probe):
    """What it costs to take a part out of one layer, of all layers up to one, or of all from one on.

    Parts: `ffn`, `ffn_up` (up-projection and activation: ffn_hidden is replaced, the last map stays), `attn_heads`
    (heads_out is replaced, the output projection stays), `attn`, `layer`, `head`, and where there are such: `ffn2`, a
    second FFN, and `inner_ffn`, the one inside attention. Methods: `zero` (the branch adds
    nothing, residual and norms stay; a layer is left out with its norms), `noise` (fresh weights, std 0.02), and,
    fitted on other documents than those scored: `mean` of the output (of a layer's update), `linear` (ridge map of
    the part's own input), and trained by Adam `cosine_adam`, `mse_adam`, `relu_control` (one ReLU layer), `two_linear`
    (d -> 4d -> d). Heads take `zero` and `mean`, one at a time. Residuals: stream = w x + branch for each weight w of
    `residual_weights`. loss_change, kl, agreement and state_change as in `commutativity`, as are the rows of transfer,
    whose trainings of ablated models start from the model as it is and a new classifier; fitted maps learn with it,
    random weights do not. `freeze`, with such trainings alone: nothing goes, but the part does not learn.

    Range and unit: loss, loss_change and kl in nats per target; agreement, state_change and accuracy 0 to 1; recovered
    up to 1.
    Reads: with fitted methods the parts' inputs and outputs; the losses are causal or masked.
    Source: arXiv 2101.04547, replacement, removal and cancelled skips. Differences: exact zero by default, where the
    paper's code left frozen noise; no training after the edit unless asked for; cosine-trained maps are rescaled by
    <y,y*>/<y*,y*>.
    Raises: InputError for an unknown part, method or schedule, an unknown mask token, layers to leave out of a loop.
    Cost: about L^2 layers for each part, method and schedule on `sample` tokens; layers below the first ablated one
    are run once for all. With transfer: one training for each.
    """

    title: ClassVar[str] = "What breaks when a part goes"
    source: ClassVar[str] = "arXiv 2101.04547"
    saving: ClassVar[str] = "measure fewer parts or methods at a time"
    costly: ClassVar[bool] = True

    parts: tuple[str, ...] = ("ffn", "attn", "layer")
    methods: tuple[str, ...] = ("zero",)
    schedules: tuple[str, ...] = SCHEDULES
    residuals: tuple[str, ...] = ("both",)
    residual_weights: tuple[float, ...] = ()
    train_epochs: int = 3
    score_fraction: float = 0.25
    tune_fraction: float = 0.125
    sample: int = 2048
    objective: Asked = "auto"
    mask_id: int | None = None
    mask_rate: float = 0.15
    transfer: TransferOption = None

    def __post_init__(self) -> None:
        allowed = {"parts": PARTS, "methods": (*METHODS, FREEZE), "schedules": SCHEDULES, "residuals": RESIDUALS}
        for name, known in allowed.items():
            for value in getattr(self, name):
                if value not in known:
                    raise InputError(f"ablation: {value!r} is no entry of {name}; allowed are {', '.join(known)}")
        if self.sample < 1 or self.train_epochs < 0:
            raise InputError("ablation: sample is 1 or more, train_epochs 0 or more")
        if FREEZE in self.methods and (self.transfer is None or not self.transfer.continued):
            raise InputError(
                "ablation: freeze says what training leaves alone; give transfer with after_edit: continued"
            )
        check_objective("ablation", self.objective, self.mask_rate)

    @property
    def fitted_methods(self) -> tuple[str, ...]:
        """The methods that must see other documents first."""
        return tuple(method for method in self.methods if method in FITTED)

    def refusal(self, view: View) -> str | None:
        """Layers cannot be left out of a model that runs them in a loop."""
        reason = fixed_order(view) if "layer" in self.parts and "zero" in self.methods else None
        if reason is not None:
            return f"{reason}; ablate other parts of it, as in --set ablation.parts=[ffn, attn]"
        return None if self.transfer is None else self.transfer.refusal(view)

    def reading(self, view: View) -> Reading:
        """Edits on a sample; where something is fitted, on a sample of the documents it was not fitted on."""
        targets = None
        if view.has_head:
            targets = objective_for(view, "ablation", self.objective, self.mask_id, self.mask_rate)
        fits = bool(self.fitted_methods)
        split = SplitRule(self.score_fraction, self.tune_fraction) if fits or split_for(self.transfer) else None
        return Reading(split=split, targets=targets, edit_tokens=self.sample, observes=False, fits=fits)

    def epochs(self) -> int:
        """Training epochs, and one more that finds the scale of what was trained on a cosine."""
        return self.train_epochs + 1 if set(self.methods) & set(TRAINED) else 0

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """Inputs and outputs of the parts that something is fitted for."""
        found = self._fitted_elements(view, layer).values()
        return tuple(dict.fromkeys(site for element in found for site in (element.source, element.target)))

    def _fitted_elements(self, view: View, layer: int) -> dict[str, Element]:
        if not self.fitted_methods:
            return {}
        named = {part: present(ELEMENTS[element_of(part)], view.maps[layer]) for part in self.parts}
        return {part: element for part, element in named.items() if isinstance(element, Element)}

    def memory(self, setting: Setting) -> int:
        """The effects' sums, and moments of every fitted part."""
        view, total = setting.view, Effects.nbytes(len(self.cases(setting.view)), setting.units)
        if set(self.fitted_methods) - {"mean"}:
            for layer in range(view.num_layers):
                for element in self._fitted_elements(view, layer).values():
                    d, e = view.site_width(layer, element.source), view.site_width(layer, element.target)
                    trained = len(set(self.methods) & set(TRAINED)) + 8 * ("two_linear" in self.methods)
                    total += 16 * (d * d + 2 * d * e) + 8 * d * e * (1 + 3 * trained)
        after = self._after(setting)
        return total + (0 if after is None else after.memory())

    def _after(self, setting: Setting) -> Labels | Text | None:
        direct, more = len(self.cases(setting.view)), len(self.frozen_cases(setting.view))
        return after_edit(self.transfer, setting, direct + more, direct, fresh=True)

    def start(self, setting: Setting, packed: dict | None) -> AblationState:
        """Nothing fitted and nothing added up, or what a file holds."""
        view = setting.view
        fitted = {
            (layer, part): Replacement(element, self.fitted_methods, part == "layer")
            for layer in range(view.num_layers)
            for part, element in self._fitted_elements(view, layer).items()
        }
        after = self._after(setting)
        own = None if after is None else after.start(None if packed is None else packed["after"])
        if packed is None:
            return AblationState(fitted, Effects.empty(len(self.cases(view)), setting.units), after=own)
        for (layer, part), one in fitted.items():
            one.unpack(packed["fitted"][f"{layer} {part}"])
        return AblationState(fitted, Effects(**packed["effects"]), packed["epoch"], own)

    def see(self, state: AblationState, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """Fit rows, tune rows, or a training step."""
        for (at, _), one in state.fitted.items():
            if at != layer:
                continue
            x, y = (sight.rows(seen[site]) for site in (one.element.source, one.element.target))
            if sight.phase == "train":
                one.train(x, y, last=state.epoch == self.train_epochs)
            else:
                one.add(sight.phase, x, y)

    def turn(self, state: AblationState, setting: Setting, phase: str) -> None:
        """Solve when the tune documents are done; count epochs."""
        if phase == "tune":
            on_every_core(lambda one: one.solve(setting.view.dtype, setting.seed), list(state.fitted.values()))
        if phase == "train":
            state.epoch += 1

    def variants(self, state: AblationState | None, setting: Setting) -> tuple[Variant, ...]:
        """Every case as a variant; one whose replacement could not be fitted is the unedited model."""
        everything = tuple(range(setting.view.num_layers))
        fitted = {} if state is None else state.fitted
        return tuple(
            Variant(everything)
            if state is not None and self._missing(state, case)
            else self._variant(case, everything, fitted, setting.seed)
            for case in self.cases(setting.view)
        )

    def _variant(self, case: Case, everything: tuple[int, ...], fitted: dict, seed: int) -> Variant:
        if case.part == "layer" and case.method == "zero":
            return Variant(tuple(layer for layer in everything if layer not in case.layers))
        made = []
        for layer in case.layers:
            if case.weight is not None:
                made.append((layer, _residual(case.part.removeprefix("residual_"), case.weight)))
            else:
                made.append((layer, change(case.part, case.head, case.method, fitted.get((layer, case.part)), seed)))
        return Variant(everything, tuple(made))

    def _missing(self, state: AblationState, case: Case) -> str | None:
        if case.method not in FITTED:
            return None
        reasons = (state.fitted[layer, case.part].reason(case.method) for layer in case.layers)
        return next((reason for reason in reasons if reason is not None), None)

    def see_edit(self, state: AblationState, setting: Setting, variant: int | None, outcome: Outcome) -> None:
        """Add a case's losses and distances."""
        state.effects.add(variant, outcome)

    def work(self, setting: Setting) -> float:
        """Operations of the trainings."""
        return work_of(self._after(setting))

    def trainings(self, setting: Setting) -> tuple[int, ...]:
        """One of the unedited model, one for each case and one for each frozen part."""
        after = self._after(setting)
        return () if after is None else after.trainings()

    def train(self, state: AblationState, setting: Setting, number: int, tick: Callable[[int], None]) -> None:
        """Train the model without what a case takes, or with what it holds still."""
        after, view = self._after(setting), setting.view
        assert after is not None
        cases = [*self.cases(view), *self.frozen_cases(view)]
        after.train(state.after, number, lambda at: self._course(state, cases[at], setting), tick)  # pyright: ignore[reportArgumentType]

    def _course(self, state: AblationState, case: Case, setting: Setting) -> Course:
        """The case as it is trained: fitted maps as parameters, random weights held still."""
        view, parts = setting.view, tuple(f"{case.part}:{layer}" for layer in case.layers)
        everything = tuple(range(view.num_layers))
        if case.method == FREEZE:
            return Course(Variant(everything), frozen=parts)
        reason = self._missing(state, case)
        if reason is not None:
            return Course(Variant(everything), reason=reason)
        maps = {}
        if case.method in FITTED:
            maps = {(n, case.part): Learnt(state.fitted[n, case.part], case.method, view) for n in case.layers}
        variant = self._variant(case, everything, maps, setting.seed)
        if case.method != "noise":
            return Course(variant, nn.ModuleList(maps.values()))
        if case.part in _FREEZABLE:
            return Course(variant, frozen=parts)
        return Course(variant, reason=f"the random weights of {case.part} cannot be held still in training")

    def rows(self, state: AblationState, setting: Setting) -> Iterator[Row]:
        """The intact loss, every case, both again for what trainings came to, lacking parts, layers run and saved."""
        view, cases, after = setting.view, self.cases(setting.view), self._after(setting)
        stages: list[tuple[str, Measured | Found]] = [("", measured(state.effects, setting))]
        if after is not None and state.after is not None:
            stages += found_of(after, state.after, state.effects)
        for stage, found in stages:
            intact = replace(BLANK, variant="intact", edit="intact")
            yield from found.rows(None, behind(_of_all(intact, view), stage))
            for number, case in enumerate([*cases, *(self.frozen_cases(view) if stage else ())]):
                reason = self._missing(state, case)
                rows = found.rows(number, behind(case.row(), stage))
                yield from rows if reason is None else (row.missing(reason) for row in rows)
        for part in self.parts:
            for layer in range(view.num_layers):
                element = present(ELEMENTS[element_of(part)], view.maps[layer])
                if isinstance(element, str):
                    metric, unit = ("loss_change", "nats") if view.has_head else ("state_change", "1")
                    yield Row(metric=metric, value=None, unit=unit, reason=element, layer=layer, element=part)
        yield from evaluation_rows(state.effects, setting, self.variants(state, setting), "ablations")

    def cases(self, view: View) -> list[Case]:
        """Every ablated model, in a fixed order."""
        found = []
        for part in self.parts:
            layers = [n for n in range(view.num_layers) if has(view, n, part)]
            for method in self.methods:
                if method == FREEZE:
                    continue
                if part == "head":
                    heads = (range(view.heads(layer)) if method in _OF_HEADS else () for layer in layers)
                    pairs = [(n, head) for n, own in zip(layers, heads, strict=True) for head in own]
                    found += [Case(part, method, "single", (layer,), head) for layer, head in pairs]
                    continue
                for schedule in self.schedules:
                    found += [Case(part, method, schedule, run) for run in runs(schedule, layers)]
        found = [case for case in found if not nothing_left(case, view)]
        for weight in self.residual_weights:
            for residual in self.residuals:
                layers = [n for n in range(view.num_layers) if residual == "both" or residual in view.maps[n].sublayers]
                for schedule in self.schedules:
                    found += [
                        Case(f"residual_{residual}", f"scale {weight:g}", schedule, run, None, weight)
                        for run in runs(schedule, layers)
                    ]
        return found

    def frozen_cases(self, view: View) -> list[Case]:
        """Every choice of layers whose part does not learn, where that is asked for."""
        if FREEZE not in self.methods:
            return []
        found = []
        for part in (part for part in self.parts if part in _FREEZABLE):
            layers = [n for n in range(view.num_layers) if has(view, n, part)]
            found += [
                Case(part, FREEZE, schedule, run) for schedule in self.schedules for run in runs(schedule, layers)
            ]
        return found


def _residual(which: str, weight: float) -> Change:
    return Change(f"residual {which} {weight!r}", lambda view, place: edits.scale_residual(view, place, weight, which))


def _of_all(row: Row, view: View) -> Row:
    return replace(row, layer=0, layer_to=view.num_layers - 1)
