"""Figures of `similarity`: how alike the states between layers are, and how many directions they use."""

from transect.report.charts import Figure
from transect.report.generic import metric_figures, pair_figures
from transect.report.pick import Pick
from transect.report.scales import Values
from transect.report.words import digits


def figures(pick: Pick) -> list[Figure]:
    """CKA between every two states, then effective rank, participation ratio and anisotropy of each."""
    same = Values(title="CKA", domain=(0, 1))
    return [
        *pair_figures(pick, "cka", same, mirrored=True, note="1: the same geometry up to rotation and scale."),
        *metric_figures(pick, "effective_rank", Values(title="effective rank", from_zero=True)),
        *metric_figures(pick, "participation_ratio", Values(title="participation ratio", from_zero=True)),
        *metric_figures(pick, "anisotropy", note="Mean cosine of two states: 0 spread out, 1 all in one direction."),
    ]


def key_numbers(pick: Pick) -> dict[str, str]:
    """The likeness of the first and last state, the lowest effective rank and the highest anisotropy of one model."""
    found = {}
    pairs = pick.where("metric", "cka").main_variant().present
    if pairs:
        ends = max(pairs, key=lambda record: (record["layer_to"] or 0) - (record["layer"] or 0))
        found["CKA, first and last state"] = digits(ends["value"])
    for metric, name, sign in (
        ("effective_rank", "lowest effective rank", -1),
        ("anisotropy", "highest anisotropy", 1),
    ):
        records = pick.where("metric", metric).main_variant().present
        if records:
            most = max(records, key=lambda record: sign * record["value"])
            found[name] = f"{digits(most['value'])} (layer {most['layer']})"
    return found
