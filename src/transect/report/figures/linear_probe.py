"""Figures of `linear_probe`: accuracy of a linear classifier on the states after each layer."""

from transect.report.charts import Figure, lines, spec_of
from transect.report.generic import by_domain, file_name
from transect.report.pick import Pick
from transect.report.scales import LAYER, Values
from transect.report.words import digits

_METRICS = {"accuracy": "Accuracy", "macro_f1": "Macro F1"}


def figures(pick: Pick) -> list[Figure]:
    """A figure for each data set: layers across, a line for each model."""
    found = []
    for metric, title in _METRICS.items():
        layered = pick.where("metric", metric).such(lambda record: record["layer"] is not None, "isValid(datum.layer)")
        for domain, own in by_domain(layered):
            if own.present:
                colour = "series" if len(own.distinct("series")) > 1 else None
                one_line = Pick(tuple({**record, "part": None} for record in own.records), own.filters)
                spec = spec_of(lines(one_line, Values(title=title.lower()), colour, x=LAYER))
                note = f"The most frequent label alone gives {_majority(pick, metric, domain)}."
                name = file_name(metric, f": {domain}")
                found.append(Figure(name=name, title=f"{title} by layer, {domain}", spec=spec, note=note))
    return found


def key_numbers(pick: Pick) -> dict[str, str]:
    """The highest accuracy of each data set, with its layer, and what the most frequent label gives."""
    found = {}
    for domain, own in by_domain(pick.where("metric", "accuracy")):
        layered = [record for record in own.present if record["layer"] is not None]
        if layered:
            best = max(layered, key=lambda record: record["value"])
            found[f"{domain}: best layer"] = f"{digits(best['value'])} ({best['layer']})"
            found[f"{domain}: most frequent label"] = _majority(pick, "accuracy", domain)
    return found


def _majority(pick: Pick, metric: str, domain: str) -> str:
    own = pick.where("metric", metric).where("variant", "majority").where("domain", domain)
    return next((digits(record["value"]) for record in own.present), "–")
