"""Figures of `fine_tuning`: accuracy on each data set, beside that of the most frequent label."""

from transect.report.charts import Figure, bars, spec_of
from transect.report.pick import Pick
from transect.report.scales import Values
from transect.report.words import digits

_METRICS = {"accuracy": "Accuracy", "macro_f1": "Macro F1"}
_MEAN, _MAJORITY = "mean", "majority"


def figures(pick: Pick) -> list[Figure]:
    """The mean over trainings with its interval, data sets across, models side by side."""
    found = []
    for metric, title in _METRICS.items():
        own = pick.where("metric", metric).where("variant", _MEAN)
        if own.present:
            colour = "series" if len(own.distinct("series")) > 1 else None
            chart = bars(own, Values(title=title.lower(), from_zero=True), colour, x="domain")
            note = f"The most frequent label alone gives {_majority(pick, metric)}."
            found.append(Figure(name=metric, title=f"{title} after fine-tuning", spec=spec_of(chart), note=note))
    return found


def key_numbers(pick: Pick) -> dict[str, str]:
    """Accuracy of each data set, and what its most frequent label gives."""
    found = {}
    for record in pick.where("metric", "accuracy").where("variant", _MEAN, _MAJORITY).present:
        word = "" if record["variant"] == _MEAN else ", most frequent label"
        found[f"{record['domain']}{word}"] = digits(record["value"])
    return found


def _majority(pick: Pick, metric: str) -> str:
    known = pick.where("metric", metric).where("variant", _MAJORITY).present
    return ", ".join(dict.fromkeys(f"{digits(record['value'])} on {record['domain']}" for record in known))
