"""Figures of `jump`: how far each layer turns the stream."""

from transect.report.charts import Figure, bars, lines, spec_of
from transect.report.generic import metric_figures, pair_figures
from transect.report.pick import Pick
from transect.report.scales import Values
from transect.report.words import digits, metric_name

_TOKENS = {"all": "all tokens", "skip_first": "first token left out"}
_FOLLOWED = ("displacement", "jump_rate", "update_ratio", "stream_norm")
_UPDATE = "Length of what a layer adds, divided by the length of the stream."


def figures(pick: Pick) -> list[Figure]:
    """Displacement, jump rate, angular distance, norm of the stream and size of the update."""
    log = Values(title="stream norm, log scale", kind="log")
    distance = Values(title="angular distance")
    return [
        *_displacement(pick.where("metric", "displacement")),
        *_jump_rate(pick.where("metric", "jump_rate").main_variant()),
        *metric_figures(pick.where("metric", "stream_norm").main_variant(), "stream_norm", log),
        *pair_figures(pick, "angular_distance", distance, note="0: same direction, 0.5: orthogonal, 1: opposite."),
        *metric_figures(pick.where("metric", "update_ratio").main_variant(), "update_ratio", note=_UPDATE),
    ]


def key_numbers(pick: Pick) -> dict[str, str]:
    """The largest and mean displacement, and the jump into the last layer, of one model."""
    turned = pick.where("metric", "displacement").main_variant().present
    rates = pick.where("metric", "jump_rate").main_variant().present
    found = {}
    if turned:
        most = max(turned, key=lambda record: record["value"])
        found["largest displacement"] = f"{digits(most['value'])} (layer {most['layer']})"
        found["mean displacement"] = digits(sum(record["value"] for record in turned) / len(turned))
    if rates:
        last = max(rates, key=lambda record: record["layer"] or 0)
        found["jump rate, last layer"] = digits(last["value"]) + (" %" if last["unit"] in ("%", "percent") else "")
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """Displacement, jump rate, size of the update and norm of the stream."""
    found = {metric: pick.where("metric", metric).main_variant() for metric in _FOLLOWED}
    return {metric_name(metric): one for metric, one in found.items() if one.present}


def _displacement(pick: Pick) -> list[Figure]:
    values = Values(title="displacement", from_zero=True)
    several = len(pick.distinct("series")) > 1
    variant = "variant" if pick.distinct("variant") else None
    panels = _by_tokens(pick) if several else {"": pick}
    found = []
    for tokens, one in panels.items():
        if one.present:
            chart = lines(one, values, "series" if several or not variant else variant, variant)
            title = "Displacement per layer" + (f", {_TOKENS.get(tokens, tokens)}" if tokens else "")
            name = "displacement" + (f"_{tokens}" if tokens else "")
            dashed = any(name.startswith("post_norm") for name in one.distinct("variant"))
            note = "0: direction kept, 0.5: orthogonal, 1: reversed." + " Dashed: after the final norm." * dashed
            found.append(Figure(name=name, title=title, spec=spec_of(chart), note=note))
    return found


def _by_tokens(pick: Pick) -> dict[str, Pick]:
    variants = pick.distinct("variant")
    groups = dict.fromkeys(variant.partition("/")[2] for variant in variants)
    if len(groups) < 2:
        return {"": pick}
    of_group = {group: [name for name in variants if name.partition("/")[2] == group] for group in groups}
    return {group: pick.where("variant", *names) for group, names in of_group.items()}


def _jump_rate(pick: Pick) -> list[Figure]:
    if not pick.present:
        return []
    colour = "series" if len(pick.distinct("series")) > 1 else None
    spec = spec_of(bars(pick, Values(title="jump rate", from_zero=True), colour))
    note = "100 times all rises of the displacement from this layer to the last, added up."
    return [Figure(name="jump_rate", title="Jump rate by start layer", spec=spec, note=note)]
