"""Figures for any metric: layers across, values up, colour by whatever tells the rows apart."""

from dataclasses import dataclass

from transect.report.cells import layer_pairs
from transect.report.charts import Figure, bars, lines, spec_of
from transect.report.pick import Pick
from transect.report.scales import Values
from transect.report.words import capital, metric_name, with_unit

_TELL_APART = ("element", "variant", "site", "part", "edit", "domain", "task", "split")
_MOST_COLOURS = 20
_MOST_DASHES = 4
_MOST_FOLLOWED = 4


@dataclass(frozen=True)
class _Panel:
    pick: Pick
    label: str
    colour: str | None
    dash: str | None


def figures(pick: Pick) -> list[Figure]:
    """Every metric of a probe that has no figures of its own."""
    return [figure for metric in pick.distinct("metric") for figure in metric_figures(pick, metric)]


def metric_figures(pick: Pick, metric: str, values: Values | None = None, note: str = "") -> list[Figure]:
    """One metric as lines, cells or bars; one figure, or one for each model when more than the model varies."""
    chosen = pick.where("metric", metric)
    if not chosen.present:
        return []
    values = values or Values(title=with_unit(metric, str(chosen.records[0]["unit"])))
    if values.kind == "log" and all(record["value"] <= 0 for record in chosen.present):
        return []
    if len({record["layer_to"] for record in chosen.present} - {None}) > 1:
        return pair_figures(pick, metric, values, note=note)
    return [_layers_or_bars(panel, metric, values, note) for panel in _panels(chosen)]


def pair_figures(pick: Pick, metric: str, values: Values, mirrored: bool = False, note: str = "") -> list[Figure]:
    """A metric of pairs of layers as one map of cells for each model."""
    found = []
    for label, one in by_series(pick.where("metric", metric).main_variant()):
        if one.present:
            spec = spec_of(layer_pairs(one, values, mirrored), height=360)
            title = f"{capital(metric_name(metric))} between layers{label}"
            found.append(Figure(name=file_name(metric, label), title=title, spec=spec, note=note))
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """What to follow over training: every metric that has one value a layer, and a few of its elements."""
    found = {}
    for metric in pick.distinct("metric"):
        chosen = pick.where("metric", metric).main_variant().without("layer_to").without("part")
        for name in ("site", "edit", "domain", "task"):
            if chosen.distinct("layer") and len(chosen.distinct(name)) > 1:
                chosen = chosen.where(name, chosen.distinct(name)[0])
        if len(chosen.distinct("element")) > 1 and chosen.distinct("layer"):
            elements = chosen.distinct("element")[:_MOST_FOLLOWED]
            found |= {f"{metric_name(metric)}, {name}": chosen.where("element", name) for name in elements}
        else:
            found[metric_name(metric)] = chosen
    return found


def by_series(pick: Pick) -> list[tuple[str, Pick]]:
    """The records of each model, with what to add to a title when there are several."""
    series = pick.distinct("series")
    return [(f": {name}" if len(series) > 1 else "", pick.where("series", name)) for name in series]


def by_domain(pick: Pick) -> list[tuple[str, Pick]]:
    """The records of each domain."""
    return [(str(domain), pick.where("domain", domain)) for domain in pick.distinct("domain")]


def _layers_or_bars(panel: _Panel, metric: str, values: Values, note: str) -> Figure:
    layered = bool({record["layer"] for record in panel.pick.present} - {None})
    if layered:
        chart = lines(panel.pick, values, panel.colour, panel.dash)
    else:
        several = len(panel.pick.distinct("series")) > 1
        chart = bars(panel.pick, values, "series" if several else None, x=panel.colour or "series")
    title = capital(metric_name(metric)) + (" per layer" if layered else "") + panel.label
    return Figure(name=file_name(metric, panel.label), title=title, spec=spec_of(chart), note=note)


def _panels(pick: Pick) -> list[_Panel]:
    varying = sorted(
        (name for name in _TELL_APART if len(pick.distinct(name)) > 1), key=lambda name: -len(pick.distinct(name))
    )
    few = all(len(pick.distinct(name)) <= _MOST_DASHES for name in varying)
    if len(pick.distinct("series")) > 1 and len(varying) <= 1 and few:
        return [_Panel(pick, "", "series", varying[0] if varying else None)]
    panels = []
    for label, one in by_series(pick):
        colour = next((name for name in varying if len(one.distinct(name)) <= _MOST_COLOURS), None)
        rest = [name for name in varying if name != colour and len(one.distinct(name)) <= _MOST_DASHES]
        panels.append(_Panel(one, label, colour, rest[0] if rest else None))
    return panels


def file_name(metric: str, label: str) -> str:
    """The name of a figure's file: what it shows, and which model when there are several."""
    return metric + label.replace(": ", "_")
