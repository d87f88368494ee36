"""Which experts a sparse model chooses for what, how much each adds, how linear it is, and what it costs to lose it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from transect.effects import Effects, measured
from transect.errors import InputError
from transect.parallel import on_every_core
from transect.probes._fits import GROUPS
from transect.probes._routing_rows import kind_rows, linear_rows, pair_rows, spread_rows
from transect.probes._routing_sums import LayerSums, Tokens, places, spaced
from transect.probes.base import Outcome, Probe, Reading, Setting, Sight, SplitRule
from transect.results import Row
from transect.targets import Asked, check_objective, objective_for
from transect.view.capture import Seen
from transect.view.experts import Experts, choices, experts_of, one, silent
from transect.view.halves import routing_site
from transect.view.layout import LayerMap
from transect.view.variants import Change, Variant
from transect.view.view import View

Place = tuple[int, str]
"""A layer and one of its sparse FFNs: `ffn`, `ffn2` or `inner`."""

Case = tuple[Place, int]
"""A sparse FFN and one of its experts."""

_NO_HEAD = "the model has no head"


@dataclass(slots=True, eq=False)
class RoutingState:
    """The experts of each sparse FFN as they were found, what was added up, and what removing each one cost."""

    experts: dict[Place, Experts]
    sums: dict[Place, LayerSums]
    kinds: Tensor  # the ids that occur in the text, ascending
    effects: Effects

    def pack(self) -> dict:
        """Plain tensors and numbers; experts are found again."""
        return {
            "sums": {f"{layer} {half}": sums.pack() for (layer, half), sums in self.sums.items()},
            "effects": self.effects.pack(),
        }


@dataclass(frozen=True, kw_only=True)
class Routing(Probe):
    """How the tokens of a text are spread over the experts of each sparse layer, and what each expert does.

    Of a layer with E experts, k to a token: load_e = choices of e / choices; entropy = -sum load ln load / ln E;
    dead_fraction = share of experts that no token chose; drop_fraction = dropped choices / choices, dropped ones
    included. co_selection = correlation over tokens of "i is chosen" and "j is chosen". type_preference = KL(P(token id
    | e) || P(token id)), and for the layer its mean over choices, which is the mutual information of token id and
    chosen expert; both less the first-order bias of counting. influence = mean over the tokens that chose e of |weight
    e(x)| / |stream entering the FFN|, with the model's residual multiplier, before any norm of the FFN's output.
    r2_heldout = 1 - |Y - Y*|^2 / |Y - mean Y|^2 of a ridge map of x to e(x) over the tokens that chose e, fit on other
    documents; an expert with fewer than `min_rows` fit tokens (by default twice the width of x, always more than that
    width and 1) has none. removal_cost = loss without e - loss: its weight is 0, the others keep theirs and nothing is
    routed anew. For a model without a head state_change = (1 - cos)/2 of the last hidden state takes its place. All
    tokens count but padding; removals are run on `removal_sample` tokens, of the scored documents where there is a
    split. Of a layer with more than `most_experts` experts, evenly spaced ones, so many, have rows of their own; the
    layer's entropy, dead_fraction and drop_fraction are always those of all. Rows of a second FFN and of one inside
    attention have its output as their `site`; the stream of the latter is the one that enters attention.

    Range and unit: load, entropy, dead_fraction, drop_fraction 0 to 1; co_selection -1 to 1: 1 = always together,
    about -1/(E-1) by chance for k of E; type_preference in nats, 0 (below by chance) to H(expert) - ln k, biased upward
    where most ids occur less than about E / k times; influence from 0; r2_heldout up to 1; removal_cost in nats per
    target, below 0 where the model is better off; errors over documents, by a jackknife of ten groups for co_selection
    and type_preference, none for dead_fraction.
    Reads: selected, selected_weights, ffn_in and the stream entering the FFN; each expert is run again on its own
    tokens. With a masked objective everything is measured on the masked text.
    Source: arXiv 2409.02060 (OLMoE), section 5, for co-activation and vocabulary specialization; the others are ours.
    Differences: a correlation in place of P(j | i), information in place of a share; all k choices count alike.
    Raises: InputError for a model without sparse FFNs, experts that cannot be seen one at a time, or a bad option.
    Cost: the experts once more; 8 d^2 + 12 d^2 bytes twice and 4 d^2 operations per choice for each expert with
    `linearity`; E L (L + 1) / 2 layers on `removal_sample` tokens with `removal`; rows of `most_pairs` pairs a layer.
    """

    title: ClassVar[str] = "Which experts do what"
    source: ClassVar[str] = "arXiv 2409.02060"
    saving: ClassVar[str] = "set routing.linearity=false"
    by_layer: ClassVar[bool] = True
    costly: ClassVar[bool] = True

    linearity: bool = True
    min_rows: int | None = None
    score_fraction: float = 0.25
    tune_fraction: float = 0.125
    most_pairs: int = 2016
    most_experts: int = 512
    removal: bool = True
    removal_sample: int = 2048
    objective: Asked = "auto"
    mask_id: int | None = None
    mask_rate: float = 0.15

    def __post_init__(self) -> None:
        if self.min_rows is not None and self.min_rows < 2:
            raise InputError(f"routing: min_rows is {self.min_rows}; a fit needs 2 or more")
        for name in ("removal_sample", "most_pairs", "most_experts"):
            if getattr(self, name) < 1:
                raise InputError(f"routing: {name} is {getattr(self, name)}; it is 1 or more")
        check_objective("routing", self.objective, self.mask_rate)

    def refusal(self, view: View) -> str | None:
        """A model without a layer whose choices can be seen."""
        if any(_routed(known) for known in view.maps):
            return None
        reasons = (_unseen(known) for known in view.maps if known.sparse)
        return next(reasons, f"no layer of {view.name} has a sparse FFN")

    def reading(self, view: View) -> Reading:
        """Fit, tune and score documents for the linear maps; a sample of what was scored for removals."""
        split = SplitRule(self.score_fraction, self.tune_fraction) if self.linearity else None
        if not self.removal:
            return Reading(split=split)
        targets = None
        if view.has_head:
            targets = objective_for(view, "routing", self.objective, self.mask_id, self.mask_rate)
        return Reading(split=split, targets=targets, edit_tokens=self.removal_sample)

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """The choices; where their weights can be seen also the weights, the experts' input and the stream."""
        known = view.maps[layer]
        found: list[str] = []
        for half in _routed(known):
            found.append(routing_site(half, "selected"))
            if _weighted(known, half):
                found += [routing_site(half, "selected_weights"), f"{half}_in", _stream(known, half)]
        return tuple(dict.fromkeys(found))

    def memory(self, setting: Setting) -> int:
        """Counts, effects, moments of every expert, and the work space of one eigendecomposition."""
        view, kinds = setting.view, len(_kinds(setting))
        total = Effects.nbytes(len(self.cases(setting)), setting.units)
        for place in _places(setting):
            count, width = _count(view, place), self._fitted_width(view, place)
            total += LayerSums.nbytes(places(count, self.most_experts), setting.units, kinds, width)
            total += 8 * GROUPS * (count + 2) * (count > self.most_experts)
        return total + 16 * kinds + (48 * view.width**2 if self.linearity else 0)

    def work(self, setting: Setting) -> float:
        """Every chosen expert once more, and its second moments."""
        view, total = setting.view, 0.0
        for layer, half in _places(setting):
            known, active = view.maps[layer], view.site_width(layer, routing_site(half, "selected"))
            if _weighted(known, half):
                count = _count(view, (layer, half))
                experts = view.layers[layer].get_submodule(known.taps[routing_site(half, "selected_weights")].module)
                weights = sum(parameter.numel() for parameter in experts.parameters()) / count
                looked_at = active * min(1.0, self.most_experts / count)
                total += looked_at * (2.0 * weights + 4.0 * self._fitted_width(view, (layer, half)) ** 2)
        return setting.data.num_tokens * total

    def start(self, setting: Setting, packed: dict | None) -> RoutingState:
        """Find the experts and begin with nothing, or go on with what a file holds."""
        view, kinds = setting.view, _kinds(setting)
        experts = {(layer, half): experts_of(view, layer, half) for layer, half in _places(setting)}
        found = {}
        for place, known in experts.items():
            sizes = (known.count, setting.units, len(kinds), self._fitted_width(view, place))
            found[place] = LayerSums.empty(*sizes, view.device, self.most_experts)
        effects = Effects.empty(len(self.cases(setting)), setting.units)
        if packed is not None:
            effects = Effects(**packed["effects"])
            for (layer, half), sums in found.items():
                sums.unpack(packed["sums"][f"{layer} {half}"])
        return RoutingState(experts, found, kinds.to(view.device), effects)

    def see(self, state: RoutingState, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """Count a layer's choices, and run each expert on the tokens that chose it."""
        for place in state.sums:
            if place[0] == layer:
                self._see(state, setting, place, seen, sight)

    def _see(self, state: RoutingState, setting: Setting, place: Place, seen: Seen, sight: Sight) -> None:
        (layer, half), sums, experts = place, state.sums[place], state.experts[place]
        weights = routing_site(half, "selected_weights")
        index = sight.rows(seen[routing_site(half, "selected")])
        # Without weights ones stand in their place, which are not used.
        weight = sight.rows(seen[weights]) if weights in seen else _ones(index, experts)
        index, weight = choices(experts, index, weight)
        every = index if sums.some else None
        tokens = Tokens(sums.placed(index), *self._owners(state, setting, sight), every)
        sums.add(tokens)
        if weights not in seen:
            return
        known = setting.view.maps[layer]
        inputs = sight.rows(seen[f"{half}_in"])
        stream = torch.linalg.vector_norm(sight.rows(seen[_stream(known, half)]), dim=1).double().clamp_min(1e-300)
        weight = weight.double().abs() * abs(known.taps[f"{half}_out"].scale)
        numbers = sums.numbers.tolist()
        for at in tokens.index[tokens.index >= 0].unique().tolist():
            if at == len(numbers):  # the place of all experts without rows
                continue
            rows, slots = tokens.of(at)
            x, unit = inputs[rows], tokens.unit[rows]
            y = one(setting.view, layer, numbers[at], x, experts)
            size = torch.linalg.vector_norm(y, dim=1).double()
            sums.add_influence(at, weight[rows, slots] * size / stream[rows], unit)
            if self.linearity:
                sums.add_linearity(at, sight.phase, x, y, unit)

    def _owners(self, state: RoutingState, setting: Setting, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
        """Error unit, its hash group and the place of its id, for each real token; the same for every layer."""
        if "routing" not in sight.scratch:
            unit = sight.unit[sight.owners()]
            keys = torch.from_numpy((setting.unit_keys % GROUPS).astype("int64")).to(unit.device)
            kind = torch.searchsorted(state.kinds, sight.ids[sight.mask].to(state.kinds.dtype))
            sight.scratch["routing"] = unit, keys[unit], kind
        return sight.scratch["routing"]

    def turn(self, state: RoutingState, setting: Setting, phase: str) -> None:
        """Solve every expert's map once the tune documents are done; the moments have served."""
        if phase != "tune":
            return
        groups = [group for sums in state.sums.values() for group in sums.solvable()]
        on_every_core(lambda group: group.solve(None, setting.view.dtype), groups)
        for group in groups:
            group.fit = group.tune = None

    def cases(self, setting: Setting) -> list[Case]:
        """Every expert that is removed in this pass."""
        view, found = setting.view, _places(setting) if self.removal else ()
        return [(place, expert) for place in found for expert in spaced(_count(view, place), self.most_experts)]

    def variants(self, state: RoutingState | None, setting: Setting) -> tuple[Variant, ...]:
        """Every expert removed by itself; without a state, for a plan, experts are found where they are removed."""
        everything = tuple(range(setting.view.num_layers))
        known = {} if state is None else state.experts
        return tuple(
            Variant(everything, ((place[0], _removal(place, expert, known.get(place))),))
            for place, expert in self.cases(setting)
        )

    def see_edit(self, state: RoutingState, setting: Setting, variant: int | None, outcome: Outcome) -> None:
        """Add the losses and distances without an expert."""
        state.effects.add(variant, outcome)

    def rows(self, state: RoutingState, setting: Setting) -> Iterator[Row]:
        """Each sparse layer's and expert's rows; one empty row for any other layer."""
        for layer in setting.layers:
            known = setting.view.maps[layer]
            if not _routed(known):
                yield Row(metric="entropy", value=None, unit="1", reason=_unseen(known), layer=layer)
            for half in _routed(known):
                yield from (_sited(row, half) for row in self._rows_of(state, setting, (layer, half)))
        if self.removal:
            yield from self._removal_rows(state, setting)

    def _rows_of(self, state: RoutingState, setting: Setting, place: Place) -> Iterator[Row]:
        """The rows of one sparse FFN."""
        (layer, half), sums = place, state.sums[place]
        unweighted = setting.view.maps[layer].missing.get(routing_site(half, "selected_weights"))
        documents = int((sums.totals[:, sums.experts] > 0).sum())
        yield from spread_rows(setting, layer, sums, unweighted)
        yield from kind_rows(layer, sums, documents)
        yield from pair_rows(layer, sums, state.experts[place].active, self.most_pairs, documents)
        if self.linearity and unweighted is None:
            yield from linear_rows(setting, layer, sums, self._least(setting.view, place))
        elif self.linearity:
            row = Row(metric="r2_heldout", value=None, unit="1", reason=unweighted, layer=layer, element="expert")
            yield from (replace(row, part=f"expert {number}") for number in sums.numbers.tolist())

    def _removal_rows(self, state: RoutingState, setting: Setting) -> Iterator[Row]:
        found = measured(state.effects, setting)
        for number, ((layer, half), expert) in enumerate(self.cases(setting)):
            like = Row(metric="removal_cost", value=None, unit="nats", reason=_NO_HEAD, layer=layer)
            like = _sited(like, half)
            like = replace(like, part=f"expert {expert}", edit=f"remove expert {expert}")
            if not state.effects.has_head:
                yield like
            for row in found.rows(number, like):
                if row.metric == "loss_change":
                    yield replace(row, metric="removal_cost")
                elif row.metric == "state_change" and not state.effects.has_head:
                    yield row

    def _fitted_width(self, view: View, place: Place) -> int:
        """The width of the experts' input where their maps are fitted, else 0."""
        layer, half = place
        return view.site_width(layer, f"{half}_in") if self.linearity and _weighted(view.maps[layer], half) else 0

    def _least(self, view: View, place: Place) -> int:
        width = view.site_width(place[0], f"{place[1]}_in")
        return 2 * width if self.min_rows is None else max(self.min_rows, width + 2)


def _routed(known: LayerMap) -> list[str]:
    """The sparse FFNs of a layer whose choices can be seen."""
    return [half for half in known.blocks if routing_site(half, "selected") in known.taps]


def _unseen(known: LayerMap) -> str:
    """Why a layer has no choices that can be seen."""
    return known.missing[routing_site(next(iter(known.blocks), "ffn"), "selected")]


def _weighted(known: LayerMap, half: str) -> bool:
    return routing_site(half, "selected_weights") in known.taps


def _places(setting: Setting) -> tuple[Place, ...]:
    """The sparse FFNs of this pass's layers whose choices can be seen."""
    return tuple((layer, half) for layer in setting.layers for half in _routed(setting.view.maps[layer]))


def _stream(known: LayerMap, half: str) -> str:
    """What the FFN's output is added to; for one inside attention what attention's is."""
    addition = known.addition("attn" if half == "inner" else half)
    assert addition is not None
    return addition.source


def _count(view: View, place: Place) -> int:
    """How many experts there are."""
    return view.maps[place[0]].blocks[place[1]]


def _sited(row: Row, half: str) -> Row:
    return row if half == "ffn" else replace(row, site=f"{half}_out")


def _kinds(setting: Setting) -> Tensor:
    """The ids that occur in the text, ascending."""
    return torch.from_numpy(np.flatnonzero(np.bincount(setting.data.ids)))


def _ones(index: Tensor, experts: Experts) -> Tensor:
    return torch.ones(len(index), experts.count if experts.per_expert else index.shape[1], device=index.device)


def _removal(place: Place, expert: int, known: Experts | None) -> Change:
    name = f"remove expert {expert}" if place[1] == "ffn" else f"remove expert {expert} of {place[1]}"
    return Change(name, lambda view, at: silent(view, at, expert, known))
