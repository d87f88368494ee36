"""Figures of `options`: accuracy by data set, for the two usual rules, with what guessing gives."""

from transect.report.charts import Figure, bars, spec_of
from transect.report.generic import file_name
from transect.report.pick import Pick
from transect.report.scales import Values
from transect.report.words import digits

_RULES = {": option": "by log-probability", ": option per character": "by log-probability per character"}
_CHANCE = "chance"


def figures(pick: Pick) -> list[Figure]:
    """A figure for each rule and number of examples: data sets across, models side by side."""
    found = []
    for rule, words in _RULES.items():
        for variant in pick.matching("variant", lambda name, rule=rule: name.endswith(rule)).distinct("variant"):
            own = pick.where("metric", "accuracy").where("variant", variant)
            shots = variant.partition(":")[0]
            colour = "series" if len(own.distinct("series")) > 1 else None
            chart = bars(own, Values(title="accuracy", from_zero=True), colour, x="domain")
            note = f"Guessing gives {_guessing(pick)}."
            title = f"Accuracy {words}, {shots}"
            found.append(Figure(name=file_name("accuracy", variant), title=title, spec=spec_of(chart), note=note))
    return found


def key_numbers(pick: Pick) -> dict[str, str]:
    """Accuracy by log-probability of each data set, and the best rule's."""
    found = {}
    for record in pick.where("metric", "accuracy").present:
        shots, _, rule = (record["variant"] or "").partition(": ")
        if rule == "option" or rule.startswith("best"):
            found[f"{record['domain']}, {shots}, {'best rule' if rule != 'option' else rule}"] = digits(record["value"])
    return found


def _guessing(pick: Pick) -> str:
    chance = pick.where("variant", _CHANCE).present
    return ", ".join(dict.fromkeys(f"{digits(record['value'])} on {record['domain']}" for record in chance))
