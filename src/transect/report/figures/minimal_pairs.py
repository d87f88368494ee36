"""Figures of `minimal_pairs`: accuracy by set, and within a set of many kinds by kind."""

from transect.report.charts import Figure, bars, ranked, spec_of
from transect.report.generic import by_series, file_name
from transect.report.pick import Pick
from transect.report.scales import Field, Values
from transect.report.words import digits

_MOST = 70
_RULE = "whole"


def figures(pick: Pick) -> list[Figure]:
    """All sets side by side; of sets with kinds these, the best on top, for each model."""
    own = pick.where("metric", "accuracy").where("variant", _RULE)
    whole, kinds = own.without("part"), own.such(lambda record: record["part"] is not None, "isValid(datum.part)")
    found = []
    if whole.present:
        colour = "series" if len(whole.distinct("series")) > 1 else None
        chart = bars(whole, Values(title="accuracy", from_zero=True), colour, x="domain")
        found.append(Figure(name="accuracy", title="Accuracy", spec=spec_of(chart), note="Guessing gives 0.5."))
    for label, one in by_series(kinds):
        if one.present:
            names = Field(name="part", order=tuple(one.distinct("part")))
            chart = ranked(one, Values(title="accuracy", from_zero=True), names, _MOST)
            spec = spec_of(chart, height=14 * min(_MOST, len(one.present)) + 20)
            found.append(Figure(name=file_name("kinds", label), title=f"Accuracy by kind{label}", spec=spec))
    return found


def key_numbers(pick: Pick) -> dict[str, str]:
    """Accuracy of each set."""
    own = pick.where("metric", "accuracy").where("variant", _RULE).without("part")
    return {str(record["domain"]): digits(record["value"]) for record in own.present}
