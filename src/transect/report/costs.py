"""What commutativity and ablation share: which metric is the cost, and what is told beside the figures."""

from transect.report.pick import Pick
from transect.report.records import Record
from transect.report.scales import Values, spread_values
from transect.report.words import digits, with_unit

_COSTS = ("loss_change", "kl", "state_change")


def by_cost(pick: Pick) -> list[Pick]:
    """The records of the cost: the change of the loss, else the KL divergence, else the turn of the last state.

    One pick for each of these that is some model's cost; mostly there is one.
    """
    series_of: dict[str, list[str]] = {}
    for series in pick.distinct("series"):
        known = {record["metric"] for record in pick.present if record["series"] == series}
        cost = next((metric for metric in _COSTS if metric in known), None)
        if cost:
            series_of.setdefault(cost, []).append(series)
    return [pick.where("metric", cost).where("series", *names) for cost, names in series_of.items()]


def cost_values(pick: Pick) -> Values:
    """The axis or colour of the picked costs, log-like when a few of them dwarf the others."""
    record = pick.records[0]
    return spread_values(pick.present, with_unit(record["metric"], record["unit"]))


def amount(record: Record) -> str:
    """A record's value with its unit."""
    return digits(record["value"]) + (f" {record['unit']}" if record["unit"] != "1" else "")


def mean_amount(records: list[Record]) -> str:
    """The mean of some records of one unit."""
    return amount({**records[0], "value": sum(record["value"] for record in records) / len(records)})


def run_numbers(pick: Pick) -> dict[str, str]:
    """The loss of the intact model, and how many layer evaluations were done and saved."""
    found = {}
    intact = pick.where("metric", "loss").where("variant", "intact").present
    if intact:
        found["loss, intact"] = amount(intact[0])
    for variant in ("done", "saved"):
        counted = pick.where("metric", "layer_evaluations").where("variant", variant).present
        if counted:
            found[f"layer evaluations {variant}"] = f"{sum(record['value'] for record in counted):,.0f}"
    return found
