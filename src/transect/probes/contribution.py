"""Who predicts the token: what each attention and each FFN adds to what a state says about its target."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from transect.data.objective import Objective
from transect.errors import InputError
from transect.metrics.angles import unit, widened
from transect.metrics.errors import jackknife
from transect.metrics.kmeans import start_work
from transect.metrics.prototypes import Prototypes, PrototypeSums, hits, prototypes
from transect.probes._information import GROUPS, Clusters
from transect.probes._levels import (
    TOTAL,
    Derived,
    Estimate,
    Names,
    Place,
    Rule,
    over_seeds,
    places_of,
    ratios,
    rows_of,
    with_seeds,
)
from transect.probes._sample import Sample, Tokens, drawn
from transect.probes.base import Probe, Reading, Setting, Sight
from transect.results import Row
from transect.targets import Asked, check_objective, objective_for
from transect.view.capture import Seen
from transect.view.lens import Lens
from transect.view.view import View

ESTIMATORS = ("mutual_information", "token_prediction", "lens_loss")
CHOICES = {
    "mi_state": ("normalised", "raw"),
    "mi_debias": ("off", "shuffle", "miller_madow"),
    "mi_fit_positions": ("all", "masked"),
    "tp_split": ("same", "split_half"),
    "ratio_start": ("embeddings", "a_1"),
    "ratio_negative": ("keep", "clip"),
}
_LENS_ROWS = 512


@dataclass(slots=True, eq=False)
class ContributionState:
    """Everything added up: clusters, prototypes [places], hits [places, units, 3], lens losses [places, units]."""

    clusters: Clusters | None
    prototypes: list[PrototypeSums]
    hits: Tensor
    counts: Tensor  # [units, 2] tokens with a kept target, and lens tokens
    losses: Tensor
    sample: Sample
    places: list[Place]
    known: list[Prototypes] = field(default_factory=list)  # made of the sums when they are complete
    lens: Lens | None = None
    no_lens: str | None = None  # the reason

    def pack(self) -> dict:
        """Plain tensors, numbers and lists; prototypes and lens follow from them and the model."""
        return {
            "clusters": self.clusters and self.clusters.pack(),
            "prototypes": [sums.pack() for sums in self.prototypes],
            "hits": self.hits,
            "counts": self.counts,
            "losses": self.losses,
            "ready": bool(self.known),
        }


@dataclass(frozen=True, kw_only=True)
class Contribution(Probe):
    """How much attention and FFN each add to what the stream says about the token to be predicted.

    M is read at resid[0], after every attention and after every FFN; dMHA_l = M(a_l) - M(h_{l-1}), dFFN_l = M(h_l) -
    M(a_l), share_FFN = sum_l dFFN_l / (M(h_L) - M(h_0)) = 1 - share_MHA. Three M: `mutual_information`, plug-in
    I(cluster of the state; target) with mini-batch k-means of `mi_clusters` (by default one for 500 positions, 2,000 at
    most); `token_prediction`, how often the nearest class mean by cosine is the target's (means of unit states, targets
    that come `tp_min_count` times; `same`: the same states make the means; `split_half`: those of the other half of the
    documents); `lens_loss`, the model's own loss with final norm and head applied at the place. Targets: the next
    token, or the original token at masked positions (15 %, 80/10/10). Errors are over documents, for MI by leaving out
    tenths of them; `MI/over_seeds` has the error over k-means seeds. A share is empty unless the total gain is above
    zero by two errors.

    Range and unit: mutual_information 0 to the target's entropy, nats; token_prediction 0 to 1; lens_loss from 0, nats.
    Reads: resid, resid_mid; in parallel layers only resid, so there are no shares.
    Source: arXiv 2403.02436, contribution ratio (method of arXiv 1909.01380); the lens is ours. Differences: k-means on
    states of length 1 by default (`mi_state`), starts on three states a cluster with Lloyd steps; both splits of token
    prediction are written; start at the embeddings and negative increments are our reading.
    Raises: InputError for an unknown option, an unknown mask token, or fewer states than clusters.
    Cost: two passes over the text, one for the lens alone; 4 K d operations a token, place and seed; 6 (kept targets) d
    a token and place; 2 d V a lens token and place. Memory: 2 bytes a position, place and seed; 3 K d numbers a place
    for the start.
    """

    title: ClassVar[str] = "Who predicts the token"
    source: ClassVar[str] = "arXiv 2403.02436"
    saving: ClassVar[str] = "set a smaller contribution.mi_clusters or measure less text"

    estimators: tuple[str, ...] = ESTIMATORS
    mi_clusters: int | None = None
    mi_positions: int = 6_940_000
    mi_state: Literal["normalised", "raw"] = "normalised"
    mi_seeds: int = 2
    mi_debias: Literal["off", "shuffle", "miller_madow"] = "off"
    mi_fit_positions: Literal["all", "masked"] = "all"
    tp_min_count: int = 50
    tp_split: tuple[str, ...] = ("same", "split_half")
    lens_tokens: int = 16_384
    ratio_start: Literal["embeddings", "a_1"] = "embeddings"
    ratio_negative: Literal["keep", "clip"] = "keep"
    objective: Asked = "auto"
    mask_id: int | None = None
    mask_rate: float = 0.15

    def __post_init__(self) -> None:
        for name in self.estimators:
            if name not in ESTIMATORS:
                raise InputError(f"contribution: estimator {name!r} is unknown; allowed are {', '.join(ESTIMATORS)}")
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value not in allowed:
                    raise InputError(f"contribution: {name} is {value!r}; allowed are {', '.join(allowed)}")
        for name in ("mi_positions", "mi_seeds", "tp_min_count", "lens_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"contribution: {name} is {getattr(self, name)}; it is 1 or more")
        if self.mi_clusters is not None and self.mi_clusters < 2:
            raise InputError(f"contribution: mi_clusters is {self.mi_clusters}; it is 2 or more")
        check_objective("contribution", self.objective, self.mask_rate)

    def refusal(self, view: View) -> str | None:
        """A masked model whose mask token nobody names cannot be asked."""
        try:
            self.asked(view)
        except InputError as error:
            return str(error).removeprefix("contribution: ")
        return None

    def asked(self, view: View) -> Objective:
        """What each position is asked for."""
        return objective_for(view, "contribution", self.objective, self.mask_id, self.mask_rate)

    def reading(self, view: View) -> Reading:
        """Two rounds: centres and class means, then labels and hits; one for the lens alone, which learns nothing."""
        return Reading(rounds=2 if self._learns else 1, canonical=True, targets=self.asked(view))

    @property
    def _learns(self) -> bool:
        return bool(set(self.estimators) - {"lens_loss"})

    def _first_round(self, sight: Sight) -> bool:
        return sight.phase == "fit" or not self._learns

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """The stream after each sub-layer, and what enters the first."""
        return tuple(place.captured for place in places_of(view) if place.layer == layer)

    def memory(self, setting: Setting) -> int:
        """Labels, buffers and centres of the clusters; class means; sums of hits and losses."""
        sample, places, width = drawn(self, setting), len(places_of(setting.view)), setting.view.width
        size = torch.promote_types(setting.view.dtype, torch.float32).itemsize
        total = (4 * places + 2) * setting.units * 8 + 24 * setting.data.num_tokens
        if self.measures("mutual_information"):
            total += Clusters.nbytes(places, self.mi_seeds, sample.clusters, len(sample.mi), width, size)
        if self.measures("token_prediction"):
            total += places * sample.classes * width * (2 * 8 + 3 * 8)
        if self._lens_reason(setting.view) is None:
            total += 3 * _LENS_ROWS * setting.view.vocab_size * size
        return total

    def work(self, setting: Setting) -> float:
        """Distances to the centres in both rounds, cosines with the class means, and the head at every place."""
        sample, places, width = drawn(self, setting), len(places_of(setting.view)), setting.view.width
        total = 0.0
        if self.measures("mutual_information"):
            assigned = int(sample.fits.sum()) + len(sample.mi)
            total += places * 2.0 * width * self.mi_seeds * sample.clusters * assigned
            total += places * start_work(sample.clusters, width, self.mi_seeds)
        if self.measures("token_prediction"):
            total += places * 4.0 * width * sample.classes * int((sample.class_of >= 0).sum())
        if self._lens_reason(setting.view) is None:
            total += places * 2.0 * width * setting.view.vocab_size * int(sample.lens.sum())
        return total

    def measures(self, name: str) -> bool:
        """Whether an estimator is asked for."""
        return name in self.estimators

    def _lens_reason(self, view: View) -> str | None:
        """Why there is no lens; None when there is."""
        if not self.measures("lens_loss"):
            return "not asked for"
        return None if view.has_head else "the model has no head, so states cannot be read as tokens"

    def _lens(self, view: View) -> tuple[Lens | None, str | None]:
        """The lens, or why there is none."""
        reason = self._lens_reason(view)
        if reason is not None:
            return None, reason
        try:
            return Lens(view), None
        except InputError as error:
            return None, str(error).removeprefix(f"{view.name}: ")

    def start(self, setting: Setting, packed: dict | None) -> ContributionState:
        """Nothing seen, or what a file holds."""
        view, sample, places = setting.view, drawn(self, setting), places_of(setting.view)
        lens, no_lens = self._lens(view)
        if packed is not None:
            clusters = packed["clusters"] and Clusters.unpack(packed["clusters"])
            sums = [PrototypeSums(**parts) for parts in packed["prototypes"]]
            known = [prototypes(one) for one in sums] if packed["ready"] else []
            kept = packed["hits"], packed["counts"], packed["losses"]
            return ContributionState(clusters, sums, *kept, sample, places, known, lens, no_lens)
        clusters = None
        if self.measures("mutual_information"):
            seeds = [setting.seed + number for number in range(self.mi_seeds)]
            clusters = Clusters.empty(len(places), seeds, sample.clusters, len(sample.mi))
        measured = len(places) if self.measures("token_prediction") and sample.classes else 0
        sums = [PrototypeSums.empty(sample.classes, view.width, device=view.device) for _ in range(measured)]
        shapes = (len(places), setting.units, 3), (setting.units, 2), (len(places), setting.units)
        hits_, counts, losses = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        return ContributionState(clusters, sums, hits_, counts, losses, sample, places, [], lens, no_lens)

    def see(self, state: ContributionState, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """First round: learn centres, add up class means, keep the lens tokens' states. Second: labels and hits."""
        if "contribution" not in sight.scratch:
            sight.scratch["contribution"] = Tokens.of(state.sample, sight)
        tokens = sight.scratch["contribution"]
        fitting = self._first_round(sight)
        for number, place in enumerate(state.places):
            if place.layer != layer:
                continue
            rows = widened(sight.rows(seen[place.captured]))
            if state.clusters is not None:
                chosen = tokens.fits if fitting else tokens.labelled
                states = rows[chosen]
                states = unit(states, 1e-30) if self.mi_state == "normalised" else states
                if fitting:
                    state.clusters.fit(number, states)
                else:
                    state.clusters.label(number, tokens.places, states)
            if state.prototypes:
                states = rows[tokens.kept]
                if fitting:
                    state.prototypes[number].add(states, tokens.classes, tokens.halves)
                else:
                    found = hits(states, tokens.classes, tokens.halves, state.known[number])
                    state.hits[number].index_add_(0, tokens.kept_units, torch.stack(found, dim=1).double().cpu())
            if fitting and state.lens is not None:
                tokens.lens_states.append(rows[tokens.lens])

    def end(self, state: ContributionState, setting: Setting, sight: Sight) -> None:
        """The lens runs once the model's own pass is over."""
        tokens = sight.scratch["contribution"]
        if not self._first_round(sight):
            return
        ones = torch.ones(len(tokens.kept_units), dtype=torch.float64)
        state.counts[:, 0].index_add_(0, tokens.kept_units, ones)
        if state.lens is None or not len(tokens.lens):
            return
        state.counts[:, 1].index_add_(0, tokens.lens_units, torch.ones(len(tokens.lens_units), dtype=torch.float64))
        states, targets = torch.cat(tokens.lens_states), tokens.lens_targets.repeat(len(state.places))
        parts = zip(states.split(_LENS_ROWS), targets.split(_LENS_ROWS), strict=True)
        losses = [
            torch.nn.functional.cross_entropy(widened(state.lens(own)), asked, reduction="none") for own, asked in parts
        ]
        by_place = torch.cat(losses).double().cpu().view(len(state.places), -1)
        state.losses.index_add_(1, tokens.lens_units, by_place)

    def turn(self, state: ContributionState, setting: Setting, phase: str) -> None:
        """Centres and class means are complete after the first round."""
        if phase == "fit":
            if state.clusters is not None:
                state.clusters.finish()
            state.known = [prototypes(sums) for sums in state.prototypes]

    def rows(self, state: ContributionState, setting: Setting) -> Iterator[Row]:
        """Levels, increments, cumulative sums and shares of each estimator; an estimator without values is one row."""
        if state.clusters is not None:
            yield from self._information_rows(state, setting)
        if self.measures("token_prediction"):
            for column, split in enumerate(("same", "split_half")):
                if split in self.tp_split:
                    yield from self._prediction_rows(state, setting, split, column)
        if self.measures("lens_loss"):
            yield from self._lens_rows(state, setting)

    def _derived(self, state: ContributionState, falling: bool = False) -> Derived:
        owners = tuple(str(place.owner) for place in state.places[1:])
        return Derived(owners, Rule(start=self.ratio_start, negative=self.ratio_negative, falling=falling))

    def _information_rows(self, state: ContributionState, setting: Setting) -> Iterator[Row]:
        data, mi = setting.data, state.sample.mi
        assert state.clusters is not None and data.target is not None
        unit_of = np.repeat(setting.unit_of, data.lengths)[mi]
        present, groups = np.unique(setting.unit_keys[unit_of] % np.uint64(GROUPS), return_inverse=True)
        levels = state.clusters.levels(data.target[mi], groups, self.mi_debias, setting.seed)
        derive = self._derived(state)
        derived, by_seed = derive(levels.mean(0)), derive(levels[:, 0])
        several = len(present) > 1
        errors = [
            jackknife(v, list(rest)) if several else None for v, rest in zip(derived[0], derived[1:].T, strict=True)
        ]
        errors[TOTAL] = with_seeds(errors[TOTAL], by_seed[:, TOTAL])  # it decides whether there are shares
        names = Names("mutual_information", "nats", self.mi_state, "MI")
        estimate = Estimate(names, derived[0], errors, len(mi), len(np.unique(unit_of)))
        yield from rows_of(estimate, state.places)
        yield from over_seeds(by_seed, estimate)

    def _prediction_rows(self, state: ContributionState, setting: Setting, split: str, column: int) -> Iterator[Row]:
        row = Row(metric="token_prediction", value=None, unit="1", reason="", variant=split, layer=0, site="resid")
        if not state.prototypes:
            yield row.missing(f"no target comes {self.tp_min_count} times in {setting.data.num_tokens:,} tokens")
            return
        hit = state.hits[:, :, column].numpy()  # [places, units]
        same = np.broadcast_to(state.counts[:, 0].numpy(), hit.shape)
        total = same if split == "same" else state.hits[:, :, 2].numpy()
        if not total.sum(1).all():
            yield row.missing("no target comes in both halves of the documents")
            return
        names = Names("token_prediction", "1", split, f"TP/{split}")
        yield from rows_of(ratios(names, hit, total, setting, self._derived(state)), state.places)

    def _lens_rows(self, state: ContributionState, setting: Setting) -> Iterator[Row]:
        kind = self.asked(setting.view).kind
        if state.no_lens is not None:
            reason = state.no_lens
            yield Row(metric="lens_loss", value=None, unit="nats", reason=reason, variant=kind, layer=0, site="resid")
            return
        total = np.broadcast_to(state.counts[:, 1].numpy(), state.losses.shape)
        names = Names("lens_loss", "nats", kind, "lens")
        derive = self._derived(state, falling=True)
        yield from rows_of(ratios(names, state.losses.numpy(), total, setting, derive), state.places)
