"""How far each element of a layer is from a linear map: held-out ridge R^2, cosines, and the paper's approximator."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from transect.errors import InputError
from transect.metrics.moments import Moments
from transect.parallel import on_every_core
from transect.probes._elementwise import Lines
from transect.probes._fits import Group, Scores
from transect.probes._linear_rows import element_rows
from transect.probes._rows import ChosenRows
from transect.probes._trained import OBJECTIVES, Approximator
from transect.probes.base import Probe, Reading, Setting, Sight, SplitRule
from transect.results import Row
from transect.view.capture import Seen
from transect.view.sites import COMMON, ELEMENTS, Element, present
from transect.view.view import View

Tokens = Literal["actual", "padding", "all"]
CHOICES = {
    "tokens": ("actual", "padding", "all"),
    "fit_tokens": (None, "actual", "padding", "all"),
    "split": ("hash", "ordered"),
    "average": ("token_then_example", "token"),
    "cosine_weights": ("inverse_norm2", "none"),
    "r2_baseline": ("score_mean", "fit_mean"),
    "cone_vectors": ("outputs", "layer_outputs"),
    "trained": (None, *OBJECTIVES),
    "init": ("closed_form", "truncated_normal"),
}
_WIDE = 8


@dataclass(slots=True, eq=False)
class LayerState:
    """One layer: its fits by source site, the weighted fits of the cosine elements, scores and approximators."""

    elements: dict[str, Element | str]
    groups: list[Group | Lines]
    scores: dict[str, Scores]
    fit_directions: dict[str, Tensor]  # [e + 1] sum of unit targets of the fit rows, and their number
    trained: dict[str, Approximator]


@dataclass(slots=True, eq=False)
class NonlinearityState:
    """The state of each layer of this pass."""

    layers: dict[int, LayerState]

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {
            layer: {
                "groups": [group.pack() for group in state.groups],
                "scores": {name: scores.pack() for name, scores in state.scores.items()},
                "fit_directions": dict(state.fit_directions),
                "trained": {name: approximator.pack() for name, approximator in state.trained.items()},
            }
            for layer, state in self.layers.items()
        }


@dataclass(frozen=True, kw_only=True)
class Nonlinearity(Probe):
    """How well the best linear map of an element's input predicts its output, token by token.

    R^2 = 1 - |Y - Y*|^2 / |Y - mean(Y)|^2 with Y* = W X + b, W the ridge fit on other documents; `r2_insample` is the
    unregularised fit on its own rows, with `r2_floor` = rank / (n - 1), what independent data would score. For the
    `cosine` elements: gamma = mean cos(y, y*) of the fit weighted by 1/|y|^2 (`cosine_closed_form`), mean cosine over
    pairs of outputs (`cone_size`), gamma corrected for it (`linearity_normalized`, A and B), the best constant
    direction (`constant_baseline`), and with `trained` the paper's approximator (`linearity`). For attention the map
    sees only the token's own input: the score mixes "not linear" with "uses other tokens".

    Range and unit: R^2 up to 1 (negative when worse than the mean); cosines -1 to 1; ranks in directions.
    Reads: the element's sites; padding never counts unless `tokens` asks for it.
    Source: arXiv 2101.04547 for elements, cosine score, cone and approximator. Differences: the closed-form held-out
    fit is ours; cone normalisation A is assumed; layers are 0-based; residual rows of pre-norm models equal the
    sub-layer's.
    Raises: InputError for an unknown element or option, or a NaN in a site.
    Cost: 8 d^2 + 12 d e bytes and 2 (d^2 + d e) operations per token for each input of width d and target of width e;
    one eigendecomposition (d^3) for each input; `trained` runs the fit documents `epochs` more times.
    """

    title: ClassVar[str] = "How non-linear each element is"
    source: ClassVar[str] = "arXiv 2101.04547"
    saving: ClassVar[str] = "give fewer elements or a projection (`project`)"
    by_layer: ClassVar[bool] = True

    elements: tuple[str, ...] = COMMON
    cosine: tuple[str, ...] = ("ffn", "attn")
    score_fraction: float = 0.25
    tune_fraction: float = 0.125
    ridge: float | None = None
    split: Literal["hash", "ordered"] = "hash"
    tokens: Tokens = "actual"
    fit_tokens: Tokens | None = None
    special_tokens: bool = True
    average: Literal["token_then_example", "token"] = "token_then_example"
    cosine_weights: Literal["inverse_norm2", "none"] = "inverse_norm2"
    r2_baseline: Literal["score_mean", "fit_mean"] = "score_mean"
    cone_vectors: Literal["outputs", "layer_outputs"] = "outputs"
    trained: Literal["cosine_adam", "mse_adam", "relu_control"] | None = None
    init: Literal["closed_form", "truncated_normal"] = "closed_form"
    train_epochs: int = 3
    project: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(value) for value in allowed)
                raise InputError(f"nonlinearity: {name} is {getattr(self, name)!r}; allowed are {listed}")
        for name in (*self.elements, *self.cosine):
            if name not in ELEMENTS:
                raise InputError(f"nonlinearity: unknown element {name!r}; elements are {', '.join(ELEMENTS)}")
        if not set(self.cosine) <= set(self.elements):
            raise InputError("nonlinearity: cosine elements must be among the elements")
        if self.ridge is not None and self.ridge < 0:
            raise InputError(f"nonlinearity: ridge is {self.ridge}; it is 0 or more")

    def reading(self, view: View) -> Reading:
        """Fit, tune and score documents; a given ridge needs no tune documents."""
        tune = self.tune_fraction if self.ridge is None else 0.0
        return Reading(split=SplitRule(self.score_fraction, tune, self.split))

    def epochs(self) -> int:
        """Passes of the trained approximator."""
        return self.train_epochs if self.trained else 0

    def wants_padding(self) -> bool:
        """Whether padding positions are measured."""
        return {self.tokens, self.fit_tokens} & {"padding", "all"} != set()

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """Every site of the elements that this layer has."""
        found = self._elements(view, layer).values()
        sites = [site for element in found if isinstance(element, Element) for site in element.sites]
        if self.cone_vectors == "layer_outputs":
            sites.append("resid_next")
        return tuple(dict.fromkeys(sites))

    def _elements(self, view: View, layer: int) -> dict[str, Element | str]:
        """The elements of a layer, or why it has none.

        Where all common ones are asked for, so are those of an FFN inside attention and of a second FFN where they are.
        """
        found = {name: present(ELEMENTS[name], view.maps[layer]) for name in ELEMENTS}
        rare = {name for name, element in found.items() if name not in COMMON and isinstance(element, Element)}
        wanted = [*self.elements, *(sorted(rare - set(self.elements)) if set(COMMON) <= set(self.elements) else ())]
        return {name: found[name] for name in wanted}

    def memory(self, setting: Setting) -> int:
        """Moments of fit and tune rows, the solved maps, and the work space of one eigendecomposition."""
        total, widest = 0, 0
        for layer in setting.layers:
            state = self._layer(setting, layer)
            for group in state.groups:
                if isinstance(group, Lines):
                    continue
                elements = [element for element in state.elements.values() if isinstance(element, Element)]
                width = self.width(setting.view, layer, group.source)
                targets = {e.output: self.width(setting.view, layer, e.target) for e in elements}
                widths = [targets[key] for key in group.elements]
                total += 2 * Moments.nbytes(width, widths) + _WIDE * width * sum(widths)
                widest = max(widest, width, *widths)
        return total + 6 * _WIDE * widest * widest

    def work(self, setting: Setting) -> float:
        """Moments of every token, the float64 part counted twice, and the solutions."""
        total = 0.0
        for layer in setting.layers:
            state = self._layer(setting, layer)
            targets = {e.output: e.target for e in state.elements.values() if isinstance(e, Element)}
            for group in state.groups:
                if not isinstance(group, Lines):
                    d = self.width(setting.view, layer, group.source)
                    widths = [self.width(setting.view, layer, targets[key]) for key in group.elements]
                    total += setting.data.num_tokens * (2.4 * d * d + 2.5 * d * sum(widths)) + 40.0 * d**3
        epochs = 3.0 * self.epochs() * len(self.cosine) / max(len(self.elements), 1)
        return total * (1 + epochs)

    def width(self, view: View, layer: int, site: str) -> int:
        """The width a site is measured with: its own, or that of the projection where it is narrower."""
        width = view.site_width(layer, site)
        return width if self.project is None else min(width, self.project)

    def start(self, setting: Setting, packed: dict | None) -> NonlinearityState:
        """Empty fits for each layer of the pass, or those of a file."""
        layers = {layer: self._layer(setting, layer) for layer in setting.layers}
        if packed is not None:
            for layer, state in layers.items():
                kept = packed[layer]
                for group, parts in zip(state.groups, kept["groups"], strict=True):
                    group.unpack(parts)
                state.scores = {name: Scores(**parts) for name, parts in kept["scores"].items()}
                state.fit_directions = kept["fit_directions"]
                state.trained = {
                    name: Approximator.unpack(str(self.trained), parts) for name, parts in kept["trained"].items()
                }
        return NonlinearityState(layers)

    def _layer(self, setting: Setting, layer: int) -> LayerState:
        elements = self._elements(setting.view, layer)
        by_source: dict[str, list[str]] = {}
        groups: list[Group | Lines] = []
        for element in elements.values():
            if isinstance(element, str):
                continue
            if element.elementwise:
                groups.append(Lines(element.source, (element.output,)))
            elif element.output not in by_source.setdefault(element.source, []):
                by_source[element.source].append(element.output)
        groups += [Group(source, tuple(keys), weighted=False) for source, keys in by_source.items()]
        weighted = {_path(elements[name]): elements[name] for name in self.cosine}  # one for elements that coincide
        for element in weighted.values():
            if isinstance(element, Element) and self._weights(element):
                groups.append(Group(element.source, (element.output,), weighted=True))
        return LayerState(elements, groups, {}, {}, {})

    def see(self, state: NonlinearityState, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """Add a layer's rows to the moments, take a training step, or score."""
        mine = state.layers.get(layer)
        if mine is None:
            return
        scoring = sight.phase == "score"
        chosen = self._chosen(sight, self.tokens if scoring else self.fit_tokens or self.tokens)
        if not bool(chosen.any()):
            return
        rows = ChosenRows(setting, seen, sight, chosen, self.project)
        if sight.phase == "train":
            self._train(mine, rows)
            return
        for group in mine.groups:
            x = rows.site(group.source)
            ys = [rows.target(key) for key in group.elements]
            if scoring:
                self._score(mine, setting, group, rows, x, ys)
            group.add(sight.phase, x, ys)
        if not scoring:
            self._fit_directions(mine, rows)

    def _chosen(self, sight: Sight, tokens: Tokens) -> Tensor:
        masks = sight.scratch.setdefault("masks", {})
        if tokens not in masks:
            every = torch.ones_like(sight.mask)
            chosen = {"actual": sight.mask, "padding": ~sight.mask, "all": every}[tokens]
            masks[tokens] = chosen if self.special_tokens else chosen & ~sight.special
        return masks[tokens]

    def _fit_directions(self, mine: LayerState, rows: ChosenRows) -> None:
        for name in self.cosine:
            element = mine.elements[name]
            if isinstance(element, Element):
                y = rows.target(element.output)
                length = y.norm(dim=1, keepdim=True)
                total = (y / length.clamp_min(1e-30)).sum(0, dtype=torch.float64)
                total = torch.cat([total, (length > 0).sum(0).double()])
                mine.fit_directions[name] = mine.fit_directions.get(name, torch.zeros_like(total)) + total

    def _train(self, mine: LayerState, rows: ChosenRows) -> None:
        for name, approximator in mine.trained.items():
            element = mine.elements[name]
            assert isinstance(element, Element)
            approximator.step(rows.site(element.source), rows.target(element.output))

    def _score(
        self, mine: LayerState, setting: Setting, group: Group | Lines, rows: ChosenRows, x: Tensor, ys: list[Tensor]
    ) -> None:
        owners = rows.owners
        for fit, key, y in zip(group.fits, group.elements, ys, strict=False):
            path = f"{group.source}>{key}"
            if path not in mine.scores:
                cone = y if self.cone_vectors == "outputs" else rows.site("resid_next")
                mine.scores[path] = Scores.empty(setting.units, y.shape[1], cone.shape[1], y.device)
            scores, predicted = mine.scores[path], fit(x)
            if not group.weighted:
                scores.add_errors(y, predicted, fit.mean_y, owners)
            name = next((name for name in self.cosine if _path(mine.elements[name]) == path), None)
            if name is None or group.weighted != self._weights(mine.elements[name]):
                continue
            scores.add_cosines("cos", y, predicted, owners)
            scores.add_directions(y if self.cone_vectors == "outputs" else rows.site("resid_next"), owners)
            scores.add_cosines("const", y, mine.fit_directions[name][:-1].to(y.dtype).expand_as(y), owners)
            if name in mine.trained:
                scores.add_cosines("trained", y, mine.trained[name](x).detach(), owners)

    def _weights(self, element: Element | str) -> bool:
        """Whether an element's cosine comes from a fit weighted by 1/|y|^2."""
        return self.cosine_weights == "inverse_norm2" and isinstance(element, Element) and not element.elementwise

    def turn(self, state: NonlinearityState, setting: Setting, phase: str) -> None:
        """Solve every fit once the fit and tune documents are done, and start the approximators from them."""
        if phase != "tune":
            return
        for layer, mine in state.layers.items():
            for group in mine.groups:
                _refuse_nan(group, layer)
        filled = [group for mine in state.layers.values() for group in mine.groups if group.filled]
        on_every_core(lambda group: group.solve(self.ridge, setting.view.dtype), filled)
        for mine in state.layers.values() if self.trained is not None else ():
            for name in self.cosine:
                element = mine.elements[name]
                if isinstance(element, Element) and not element.elementwise:
                    approximator = self._approximator(mine, element, setting.seed)
                    if approximator is not None:
                        mine.trained[name] = approximator

    def _approximator(self, mine: LayerState, element: Element, seed: int) -> Approximator | None:
        key = element.output
        weighted = self._weights(element)
        group = next(
            g for g in mine.groups if g.source == element.source and key in g.elements and g.weighted == weighted
        )
        if not group.fits:  # no fit tokens, or a constant input
            return None
        fit = group.fits[group.elements.index(key)]
        assert not isinstance(group, Lines)
        weight = fit.weight  # type: ignore[union-attr]
        if self.init == "closed_form":
            bias = fit.mean_y - fit.mean_x @ weight
            return Approximator(str(self.trained), weight.clone(), bias)
        return Approximator.truncated_normal(str(self.trained), (weight.shape[0], weight.shape[1]), weight, seed)

    def rows(self, state: NonlinearityState, setting: Setting) -> Iterator[Row]:
        """Every row of every layer and element; an absent element is one empty row with the reason."""
        filled = [g for mine in state.layers.values() for g in mine.groups if g.filled and not g.weighted]
        found = on_every_core(lambda group: group.insample(setting.view.dtype), filled)
        insample = {id(group): numbers for group, numbers in zip(filled, found, strict=True)}
        for layer, mine in state.layers.items():
            for name, element in mine.elements.items():
                if isinstance(element, str):
                    yield Row(metric="r2_heldout", value=None, unit="1", reason=element, layer=layer, element=name)
                    continue
                yield from element_rows(self, setting, layer, name, mine, insample)


def _path(element: Element | str) -> str | None:
    """Where an element's scores stand: its source and its target."""
    return None if isinstance(element, str) else f"{element.source}>{element.output}"


def _refuse_nan(group: Group | Lines, layer: int) -> None:
    if isinstance(group, Lines):
        finite = group.sums is None or bool(torch.isfinite(group.sums).all())
    else:
        sums = [] if group.fit is None else [group.fit.sum_x, *group.fit.sum_y]
        finite = all(bool(torch.isfinite(total).all()) for total in sums)
    if not finite:
        raise InputError(f"layer {layer}: {group.source} or what it maps to holds NaN or infinity; check the model")
