"""Figures of `routing`: how tokens are spread over the experts of each sparse FFN, and what each expert does."""

from collections.abc import Iterator

from transect.report.cells import cells, layers_of, pair_facets
from transect.report.charts import Figure, lines, ranked, spec_of
from transect.report.generic import by_series, file_name
from transect.report.pick import Pick
from transect.report.scales import Field, Values, spread_values
from transect.report.words import capital, digits, metric_name, with_unit

_EXPERT = "toNumber(split(datum.part, ' ')[1])"
_MAPS = {
    "load": "Share of a layer's choices that fall on an expert",
    "influence": "",
    "removal_cost": "What the model loses without the expert.",
    "r2_heldout": "How well an affine map replaces the expert, on held-out text: 1 is linear.",
    "type_preference": "",
}
_UNUSED = ("dead_fraction", "drop_fraction")
_LEAST_R2 = -0.5
_MOST_EXPERTS = 64
_FEW_EXPERTS = 16
_MOST_CELLS = 6500
_MOST_LAYERS = 12
_STRONGEST = 20


def figures(pick: Pick) -> list[Figure]:
    """Entropy and unused experts over layers, maps of experts, and which experts are chosen together."""
    whole = pick.without("part")
    return [
        *_entropy(whole.where("metric", "entropy")),
        *_unused(whole.where("metric", *_UNUSED)),
        *_entropy(whole.where("metric", "type_preference")),
        *(figure for metric in _MAPS for figure in _maps(pick.where("metric", metric), metric)),
        *(figure for label, one in by_series(pick.where("metric", "co_selection")) for figure in _pairs(one, label)),
    ]


def key_numbers(pick: Pick) -> dict[str, str]:
    """The mean evenness and unused part over layers, and the most extreme experts, of one model."""
    found = {}
    for metric in ("entropy", *_UNUSED):
        values = [record["value"] for record in pick.where("metric", metric).without("part").present]
        if values:
            found[f"mean {metric_name(metric)}"] = digits(sum(values) / len(values))
    for metric, name, sign in (
        ("load", "highest load", 1),
        ("removal_cost", "costliest expert to remove", 1),
        ("r2_heldout", "least linear expert", -1),
    ):
        experts = _experts(pick.where("metric", metric)).present
        if experts:
            most = max(experts, key=lambda record: sign * record["value"])
            found[name] = f"{digits(most['value'])} (layer {most['layer']}, {most['part']})"
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """Entropy, dead and dropped fractions of each layer."""
    found = {metric_name(metric): pick.where("metric", metric).without("part") for metric in ("entropy", *_UNUSED)}
    return {title: one for title, one in found.items() if one.present}


def _entropy(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    metric = pick.records[0]["metric"]
    even = metric == "entropy"
    values = Values(title=_title(pick), domain=(0, 1.02) if even else None, from_zero=True)
    colour = "series" if len(pick.distinct("series")) > 1 else None
    note = "1: every expert is chosen equally often; 0: always the same one." if even else ""
    spec = spec_of(lines(pick, values, colour))
    return [Figure(name=metric, title=f"{capital(metric_name(metric))} per layer", spec=spec, note=note)]


def _unused(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    several = len(pick.distinct("series")) > 1
    colour, dash = ("series", "metric") if several else ("metric", None)
    spec = spec_of(lines(pick, Values(title="fraction", from_zero=True), colour, dash))
    note = "Dead: experts that no token chose. Drop: choices that found their expert full."
    return [Figure(name="unused", title="Dead experts and dropped choices per layer", spec=spec, note=note)]


def _maps(pick: Pick, metric: str) -> Iterator[Figure]:
    for label, one in by_series(_experts(pick)):
        if not one.present:
            continue
        order = tuple(range(1 + max(int(part.split()[1]) for part in one.distinct("part"))))
        expert = Field(name="expert", title="expert", formula=_EXPERT, order=order)
        spec = spec_of(cells(one, _map_values(one, metric), layers_of(one), expert), _height(len(order)))
        note = f"{_MAPS[metric]}; even: {digits(1 / len(order))}." if metric == "load" else _MAPS[metric]
        title = f"{capital(metric_name(metric))} of each expert{label}"
        yield Figure(name=file_name(f"expert_{metric}", label), title=title, spec=spec, note=note)


def _map_values(pick: Pick, metric: str) -> Values:
    if metric == "r2_heldout":
        lowest = min(record["value"] for record in pick.present)
        return Values(title="R²", domain=(max(_LEAST_R2, min(0, lowest)), 1))
    return spread_values(pick.present, _title(pick))


def _pairs(pick: Pick, label: str) -> list[Figure]:
    if not pick.present:
        return []
    experts = {int(number) for part in pick.distinct("part") for number in part.split(",")}
    name, title = file_name("co_selection", label), f"{{}} chosen together{label}"
    if max(experts) >= _MOST_EXPERTS:
        pair = Field(name="pair", formula="'layer ' + datum.layer + ': ' + replace(datum.part, ',', ' and ')")
        spec = spec_of(ranked(pick, Values(title=_title(pick), from_zero=True), pair, _STRONGEST), height=360)
        return [Figure(name=name, title=title.format("Experts most often"), spec=spec, note="The strongest pairs.")]
    mirrored = len(experts) <= _FEW_EXPERTS
    shown, note = _few_layers(pick, len(experts) ** 2 // (1 if mirrored else 2))
    order = tuple(range(max(experts) + 1))
    first, second = (
        Field(name=edge, formula=f"toNumber(split(datum.part, ',')[{at}])", order=order)
        for at, edge in enumerate(("first", "second"))
    )
    columns = min(4, max(2, len(shown.distinct("layer"))))
    spec = pair_facets(shown, spread_values(shown.present, _title(shown)), (second, first), columns, mirrored)
    return [Figure(name=name, title=title.format("Experts"), spec=spec, note=note)]


def _few_layers(pick: Pick, cells_each: int) -> tuple[Pick, str]:
    note = f"{capital(_title(pick))}; expert 0 at the top left."
    layers = sorted(pick.distinct("layer"))
    most = min(_MOST_LAYERS, max(1, _MOST_CELLS // cells_each))
    if len(layers) <= most:
        return pick, note
    chosen = sorted({layers[round(at * (len(layers) - 1) / max(1, most - 1))] for at in range(most)})
    return pick.where("layer", *chosen), f"{note} {len(chosen)} of {len(layers)} layers; the rows below have all."


def _experts(pick: Pick) -> Pick:
    return pick.matching("part", lambda name: name.startswith("expert "))


def _title(pick: Pick) -> str:
    return with_unit(pick.records[0]["metric"], pick.records[0]["unit"])


def _height(rows: int) -> int:
    return max(160, min(420, 26 * rows))
