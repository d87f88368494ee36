"""Figures of `contribution`: what attention and FFN each add to the prediction of the token."""

from transect.report.charts import Figure, bars, lines, ranges, spec_of
from transect.report.generic import by_series, file_name
from transect.report.pick import Pick
from transect.report.scales import Field, Values
from transect.report.words import capital, digits, metric_name, with_unit

_LEVELS = ("mutual_information", "token_prediction", "lens_loss")
_MAIN = ("normalised", "same", "causal", "masked")
_SEEDS = "MI/over_seeds"  # the share by MI once more, with another error
_SHARES = {"share_mha": "attention", "share_ffn": "FFN"}
_POSITION = Field(
    name="position",
    title="layer (half: after its attention)",
    formula="datum.layer + (datum.site === 'resid_mid' ? 0.5 : 0)",
    uses=("site",),
    format="~g",
)
_CHANGES = (
    (
        "/cumulative",
        "cumulative",
        "attention against FFN",
        "The changes up to a layer added up, by {estimator}; where a line ends is what its half brings.",
        lines,
    ),
    (
        "/increment",
        "increments",
        "change by each half",
        "By {estimator}. A bar against the direction of the whole curve takes away what others bring.",
        bars,
    ),
)
"""Rows, file name, title, note and chart."""
_HALVES = {"attn": "attention", "ffn": "FFN", "both": "both at once"}


def figures(pick: Pick) -> list[Figure]:
    """The shares of every estimator, then for each estimator its curve, the gains added up, and each gain."""
    levels = [figure for metric in _LEVELS for figure in _level(pick, metric)]
    halves = [
        figure
        for metric in _LEVELS
        for label, one in by_series(pick.where("metric", metric))
        for figure in _changes(one, metric, label)
    ]
    return [*_shares(pick.where("metric", "share_mha")), *levels, *halves]


def key_numbers(pick: Pick) -> dict[str, str]:
    """The shares of attention and FFN by every estimator of one model."""
    found = {}
    for metric, half in _SHARES.items():
        for record in pick.where("metric", metric).present:
            if record["variant"] != _SEEDS:
                error = f" ± {digits(record['stderr'])}" if record["stderr"] is not None else ""
                found[f"{half} share, {record['variant']}"] = digits(record["value"]) + error
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """The attention shares, and what the last state knows by each estimator."""
    shares = pick.where("metric", "share_mha").matching("variant", lambda name: name != _SEEDS)
    found = {"attention share": shares}
    for metric in _LEVELS:
        streams = _curve(pick.where("metric", metric).where("site", "resid"))
        found[metric_name(metric)] = _main_of(streams)
    return {title: one for title, one in found.items() if one.present}


def _shares(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    several = len(pick.distinct("series")) > 1
    variants = Field(name="variant", order=tuple(dict.fromkeys(record["variant"] for record in pick.present)))
    values = Values(title="share of the gain that attention brings", domain=_around(pick))
    chart = ranges(pick, values, variants, "series" if several else None, middle=0.5)
    rows = len(variants.order or ()) * max(1, len(pick.distinct("series")))
    missing = sum(record["value"] is None for record in pick.records)
    note = "The FFN brings the rest; left of the grey line, where both bring half, it brings more."
    note += " A share outside 0 to 1: one half takes away what the other brings." * (values.domain != (0, 1))
    note += f" {missing} without a value; why is told below." * bool(missing)
    return [Figure(name="shares", title="Attention's share", spec=spec_of(chart, 60 + 26 * rows), note=note)]


def _around(pick: Pick) -> tuple[float, float]:
    ends = [record[name] for record in pick.present for name in ("value", "low", "high") if record[name] is not None]
    low, high = min(0, *ends), max(1, *ends)
    return (low - 0.05 * (low < 0), high + 0.05 * (high > 1))


def _level(pick: Pick, metric: str) -> list[Figure]:
    chosen = _curve(pick.where("metric", metric).where("site", "resid", "resid_mid"))
    if not chosen.present:
        return []
    several = len(chosen.distinct("series")) > 1
    variant = "variant" if len(chosen.distinct("variant")) > 1 else None
    chart = lines(chosen, _values(chosen), "series" if several else variant, variant if several else None, x=_POSITION)
    title = f"{_title(metric)} along the stream"
    note = "Whole numbers: the stream entering a layer, the last one leaving the model's last layer."
    if metric == "lens_loss":
        note += " Lower is better."
    return [Figure(name=f"{metric}_levels", title=title, spec=spec_of(chart), note=note)]


def _changes(pick: Pick, metric: str, label: str) -> list[Figure]:
    """What each half adds, summed up along the network and layer by layer."""
    found = []
    for variant, name, title, note, draw in _CHANGES:
        chosen = _main_of(pick.matching("variant", lambda given, end=variant: given.endswith(end)))
        if chosen.present:
            spec = spec_of(draw(chosen, _values(chosen, ", change"), _half(chosen)))
            title = f"{_title(metric)}: {title}{label}"
            note = note.format(estimator=_estimator(chosen))
            found.append(Figure(name=file_name(f"{metric}_{name}", label), title=title, spec=spec, note=note))
    return found


def _half(pick: Pick) -> Field:
    # A parallel layer has one step for both; a second FFN counts as FFN.
    found = {_HALVES.get(element, "FFN") for element in pick.distinct("element")}
    order = tuple(name for name in _HALVES.values() if name in found)
    named = " : ".join(f"datum.element === '{name}' ? '{_HALVES[name]}'" for name in ("attn", "both"))
    return Field(name="half", formula=f"{named} : 'FFN'", uses=("element",), order=order)


def _curve(pick: Pick) -> Pick:
    return pick.matching("variant", lambda name: "/" not in name)


def _main_of(pick: Pick) -> Pick:
    variants = sorted(pick.distinct("variant"), key=lambda name: _rank(name.split("/")[0]))
    return pick.where("variant", *variants[:1])


def _rank(convention: str) -> int:
    return _MAIN.index(convention) if convention in _MAIN else len(_MAIN)


def _estimator(pick: Pick) -> str:
    return f"the “{pick.distinct('variant')[0].split('/')[0]}” convention"


def _values(pick: Pick, more: str = "") -> Values:
    record = pick.records[0]
    return Values(title=with_unit(record["metric"], record["unit"]) + more, from_zero=bool(more))


def _title(metric: str) -> str:
    return capital(metric_name(metric))
