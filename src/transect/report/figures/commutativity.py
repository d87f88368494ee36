"""Figures of `commutativity`: what it costs when layers change places, are reversed, shuffled or repeated."""

from dataclasses import replace
from typing import Any

from transect.report.cells import layer_pairs
from transect.report.charts import Figure, bars, lines, points, spec_of
from transect.report.costs import amount, by_cost, cost_values, mean_amount, run_numbers
from transect.report.generic import by_series, file_name
from transect.report.pick import Pick
from transect.report.scales import Field
from transect.report.words import capital, metric_name

_OF_TASKS = ("accuracy_change", "recovered")
STAGES = {"": "", "/continued": ", after training"}
"""What stands behind a variant, and what a title says of it."""

_DISTANCE = Field(name="distance", title="distance between the two layers", formula="datum.layer_to - datum.layer")
_FIXED = Field(
    name="fixed",
    title="layers that keep their place",
    formula="toNumber(split(datum.part, ' ')[0])",
    uses=("part",),
)


def figures(pick: Pick) -> list[Figure]:
    """Swaps of pairs and their distance, neighbours, mirrored pairs, reversals, shuffles, repeats and patterns."""
    costs = [*by_cost(pick), *(pick.where("metric", name) for name in _OF_TASKS)]
    return [figure for one in costs for stage in STAGES for figure in _of_cost(one, stage)]


def key_numbers(pick: Pick) -> dict[str, str]:
    """The mean cost of a pair and of neighbours, the worst pair, and the work done and saved, of one model."""
    found = run_numbers(pick)
    for cost in by_cost(pick):
        name = metric_name(cost.records[0]["metric"])
        pairs, neighbours = cost.where("variant", "pairs").present, _neighbours(cost).present
        if neighbours:
            found[f"mean {name}, neighbours swapped"] = mean_amount(neighbours)
        if pairs:
            worst = max(pairs, key=lambda record: record["value"])
            found[f"mean {name}, any pair swapped"] = mean_amount(pairs)
            found["worst pair"] = f"{amount(worst)} (layers {worst['layer']} and {worst['layer_to']})"
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """The cost of swapping neighbours, and of shuffling."""
    found = {}
    for cost in by_cost(pick):
        name = metric_name(cost.records[0]["metric"])
        found[f"{name}, neighbours swapped"] = _neighbours(cost)
        found[f"{name}, one layer repeated"] = cost.where("variant", "repeat")
    return {title: one for title, one in found.items() if one.present}


def _of_cost(every: Pick, stage: str) -> list[Figure]:
    def pick(kind: str) -> Pick:
        return every.where("variant", f"{kind}{stage}")

    pairs = pick("pairs")
    found = [
        *(figure for label, one in by_series(pairs) for figure in _pairs(one, label)),
        *_bars(_neighbours(every, stage), "neighbours", "a layer swapped with the next"),
        *_bars(pick("mirrored"), "mirrored", "a layer swapped with its mirror image from the top"),
        *_reversals(pick("reversal")),
        *_shuffles(pick("shuffle")),
        *_bars(pick("repeat"), "repeat", "one layer in the place of all"),
        *_patterns(pick("pattern")),
    ]
    return [after(figure, stage) for figure in found]


def after(figure: Figure, stage: str) -> Figure:
    """The figure, its name and title saying which stage it is of."""
    return replace(figure, name=figure.name + stage.replace("/", "_"), title=figure.title + STAGES[stage])


def _neighbours(pick: Pick, stage: str = "") -> Pick:
    own = pick.where("variant", f"adjacent{stage}")
    if own.present:
        return own
    pairs = pick.where("variant", f"pairs{stage}")
    return pairs.such(lambda record: record["layer_to"] == record["layer"] + 1, "datum.layer_to === datum.layer + 1")


def _pairs(pick: Pick, label: str) -> list[Figure]:
    if not pick.present:
        return []
    values = cost_values(pick)
    cells = spec_of(layer_pairs(pick, values, mirrored=True), height=360)
    distances = spec_of(points(pick, values, _DISTANCE, _ends(pick)))
    note = f"Each cell swaps two layers. {_worst(pick)}"
    return [
        _figure(pick, "pairs", "two layers swapped", cells, note, label),
        _figure(pick, "distance", "swaps by distance", distances, "Each point is a pair of layers.", label),
    ]


def _ends(pick: Pick) -> Field:
    last = max(record["layer_to"] for record in pick.records)
    first_or_last = f"datum.layer === 0 ? 'with the first layer' : datum.layer_to === {last} ? 'with the last layer'"
    order = ("with the first layer", "with the last layer", "any other pair")
    return Field(name="ends", formula=f"{first_or_last} : 'any other pair'", order=order)


def _worst(pick: Pick) -> str:
    least = pick.records[0]["metric"] in _OF_TASKS
    worst = (min if least else max)(pick.present, key=lambda record: record["value"])
    return (
        f"The {'lowest' if least else 'highest'} is {amount(worst)}, layers {worst['layer']} and {worst['layer_to']}."
    )


def _bars(pick: Pick, name: str, what: str) -> list[Figure]:
    if not pick.present:
        return []
    colour = "series" if len(pick.distinct("series")) > 1 else None
    return [_figure(pick, name, what, spec_of(bars(pick, cost_values(pick), colour)))]


def _reversals(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    lengths = {record["layer_to"] - record["layer"] + 1 for record in pick.present}
    if len(lengths) == 1:
        return _bars(pick, "reversal", f"{lengths.pop()} layers in reverse, by the first of them")
    found = []
    for label, one in by_series(pick):
        chart = layer_pairs(one, cost_values(one), titles=("first layer", "last layer"))
        note = "Each cell reverses the layers from the first to the last."
        found.append(_figure(one, "reversal", "layers in reverse", spec_of(chart, height=360), note, label))
    return found


def _shuffles(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    colour = "series" if len(pick.distinct("series")) > 1 else None
    spec = spec_of(lines(pick, cost_values(pick), colour, x=_FIXED))
    note = "Means over random orders of the other layers; the band is the error over orders."
    return [_figure(pick, "shuffle", "layers shuffled", spec, note)]


def _patterns(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    colour = "series" if len(pick.distinct("series")) > 1 else None
    names = tuple(edit.removeprefix("pattern ") for edit in pick.distinct("edit"))
    pattern = Field(name="pattern", title="layers", formula="replace(datum.edit, 'pattern ', '')", order=names)
    spec = spec_of(bars(pick, cost_values(pick), colour, x=pattern))
    return [_figure(pick, "pattern", "a few layers in turn in the place of all", spec)]


def _figure(pick: Pick, name: str, what: str, spec: dict[str, Any], note: str = "", label: str = "") -> Figure:
    metric = str(pick.records[0]["metric"])
    title = f"{capital(metric_name(metric))}: {what}{label}"
    return Figure(name=file_name(f"{metric}_{name}", label), title=title, spec=spec, note=note)
