"""Figures of `ablation`: what it costs to remove or replace a part of a layer, or of many layers."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transect.report.cells import cells, layers_of
from transect.report.charts import Figure, lines, spec_of
from transect.report.costs import amount, by_cost, cost_values, run_numbers
from transect.report.figures.commutativity import STAGES, after
from transect.report.generic import by_series, file_name
from transect.report.pick import Pick
from transect.report.scales import LAYER, Field
from transect.report.words import capital, metric_name

_SCHEDULES = {
    "single": "one layer at a time",
    "from_below": "from the first layer up to this one",
    "from_above": "from this layer up to the last",
}
_VERBS = {"parts": "ablated", "residuals": "scaled"}
_METHODS = ("zero", "mean", "noise", "linear", "cosine_adam", "mse_adam", "two_linear", "relu_control")
_PARTS = {
    "ffn": "FFN",
    "ffn_up": "FFN's first half",
    "attn_heads": "attention before its projection",
    "attn": "attention",
    "layer": "whole layer",
    "residual_attn": "residual around attention",
    "residual_ffn": "residual around the FFN",
    "residual_both": "both residuals",
}
_BELOW = Field(name="top", title="last layer ablated", formula="isValid(datum.layer_to) ? datum.layer_to : datum.layer")
_PLACES = {"single": LAYER, "from_below": _BELOW, "from_above": replace(LAYER, title="first layer ablated")}


def figures(pick: Pick) -> list[Figure]:
    """The parts side by side and the methods side by side, for each schedule; then the heads."""
    costs = [*by_cost(pick), *(pick.where("metric", name) for name in ("accuracy_change", "recovered"))]
    return [after(figure, stage) for cost in costs for stage in STAGES for figure in _of_cost(cost, stage)]


def _of_cost(cost: Pick, stage: str) -> Iterator[Figure]:
    whole = cost.where("element", *(name for name in cost.distinct("element") if name != "head"))
    groups = {"parts": _elements(whole, residual=False), "residuals": _elements(whole, residual=True)}
    for schedule in _SCHEDULES:
        own = _on_schedule(whole, f"{schedule}{stage}")
        for name, elements in groups.items():
            yield from _parts(own.where("element", *elements), name, schedule)
    for element in whole.distinct("element"):
        for schedule in _SCHEDULES:
            yield from _methods(_on_schedule(whole, f"{schedule}{stage}").where("element", element), element, schedule)
    yield from _heads(_on_schedule(cost, f"single{stage}").where("element", "head"))


def key_numbers(pick: Pick) -> dict[str, str]:
    """The intact loss and the costliest layer of every part, by the main method, of one model."""
    found = run_numbers(pick)
    for cost in by_cost(pick):
        for element in cost.distinct("element"):
            records = _main_method(_on_schedule(cost.where("element", element), "single")).present
            if records:
                most = max(records, key=lambda record: record["value"])
                place = f"layer {most['layer']}" + (f", {most['part']}" if most["part"] else "")
                found[f"costliest {_words(element)} ({_method(most)})"] = f"{place}: {amount(most)}"
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """The cost of ablating each part of one layer by the main method."""
    found = {}
    for cost in by_cost(pick):
        for element in cost.distinct("element"):
            one = _main_method(_on_schedule(cost.where("element", element), "single")).without("part")
            if one.present:
                metric, verb = metric_name(one.records[0]["metric"]), _verb(element)
                found[f"{metric}, {_words(element)} {verb} ({_method(one.records[0])})"] = one
    return found


def _elements(pick: Pick, residual: bool) -> list[str]:
    return [name for name in pick.distinct("element") if name.startswith("residual_") == residual]


def _parts(pick: Pick, name: str, schedule: str) -> Iterator[Figure]:
    main = _main_method(pick)
    if not main.present:
        return
    one_part = len(main.distinct("element")) == 1
    what = _words(main.distinct("element")[0]) if one_part else name
    what = f"{what} {_VERBS[name]} ({_method(main.records[0])}), {_SCHEDULES[schedule]}"
    together = one_part and len(main.distinct("series")) > 1
    for label, one in [("", main)] if together else by_series(main):
        if one.present:
            spec = spec_of(lines(one, cost_values(one), "series" if together else "element", x=_PLACES[schedule]))
            yield _figure(one, f"{name}_{schedule}", what, label, spec)


def _methods(pick: Pick, element: str, schedule: str) -> Iterator[Figure]:
    for label, one in by_series(pick):
        variants = sorted((record["variant"] for record in one.present), key=_rank)
        order = tuple(dict.fromkeys(variant.split("/")[0] for variant in variants))
        if len(order) > 1:
            method = Field(name="method", formula="split(datum.variant, '/')[0]", uses=("variant",), order=order)
            spec = spec_of(lines(one, cost_values(one), method, x=_PLACES[schedule]))
            what = f"{_words(element)} {_verb(element)} in several ways, {_SCHEDULES[schedule]}"
            yield _figure(one, f"{element}_{schedule}", what, label, spec)


def _heads(pick: Pick) -> Iterator[Figure]:
    for variant in sorted(pick.distinct("variant"), key=_rank):
        for label, one in by_series(pick.where("variant", variant)):
            if one.present:
                order = tuple(range(1 + max(int(part.split()[1]) for part in one.distinct("part"))))
                head = Field(name="head", title="head", formula="toNumber(split(datum.part, ' ')[1])", order=order)
                chart = cells(one, cost_values(one), layers_of(one), head)
                spec = spec_of(chart, height=max(160, min(420, 26 * len(order))))
                method = variant.split("/")[0]
                yield _figure(one, f"heads_{method}", f"one head ablated ({method})", label, spec)


def _on_schedule(pick: Pick, schedule: str) -> Pick:
    return pick.matching("variant", lambda name: name.endswith(f"/{schedule}"))


def _main_method(pick: Pick) -> Pick:
    # The method that most parts were ablated by, so that they can stand side by side.
    covered: dict[str, set[str]] = {}
    for record in pick.present:
        covered.setdefault(record["variant"], set()).add(record["element"])
    variants = sorted(covered, key=lambda name: (-len(covered[name]), _rank(name)))
    return pick.where("variant", *variants[:1])


def _rank(variant: str) -> tuple[int, float]:
    method = variant.split("/")[0]
    number = re.search(r"[\d.]+$", method)
    return (_METHODS.index(method) if method in _METHODS else len(_METHODS), float(number[0]) if number else 0)


def _method(record: dict[str, Any]) -> str:
    return record["variant"].split("/")[0]


def _verb(element: str) -> str:
    return _VERBS["residuals" if element.startswith("residual_") else "parts"]


def _words(element: str) -> str:
    return _PARTS.get(element, element)


def _figure(pick: Pick, name: str, what: str, label: str, spec: dict[str, Any]) -> Figure:
    metric = str(pick.records[0]["metric"])
    title = f"{capital(metric_name(metric))}: {what}{label}"
    return Figure(name=file_name(f"{metric}_{name}", label), title=title, spec=spec)
