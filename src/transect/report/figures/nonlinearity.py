"""Figures of `nonlinearity`: how well an affine map of a token's own input replaces each element."""

from typing import Any

from transect.report.cells import cells, layers_of
from transect.report.charts import Figure, lines, spec_of
from transect.report.generic import by_series, file_name
from transect.report.pick import Pick
from transect.report.records import Record
from transect.report.scales import Field, Values
from transect.report.words import capital, digits

_FAMILIES = {
    "FFN elements": ("ffn", "ffn_up", "ffn_residual", "ffn_sublayer"),
    "attention elements": ("attn", "attn_heads", "attn_proj", "attn_residual", "attn_sublayer"),
    "whole layer, activation and norms": ("layer", "activation", "attn_norm", "ffn_norm"),
}
_ORDER = [element for family in _FAMILIES.values() for element in family]
_SHORT = {"FFN elements": "ffn", "attention elements": "attn", "whole layer, activation and norms": "layer"}
_PLAIN = ("ffn", "attn")
_FOLLOWED = ("ffn", "attn", "layer")
_FITS = ("r2_heldout", "r2_insample", "r2_floor")
_COSINES = ("cosine_closed_form", "linearity", "constant_baseline", "cone_size")
_LOWEST = -0.5
_HIGHEST = 1.02  # a line at 1 stays whole
_MOST_NUMBERS = 12


def figures(pick: Pick) -> list[Figure]:
    """Held-out R² as cells and lines, then the in-sample value with its floor, then the cosines."""
    heldout = pick.where("metric", "r2_heldout")
    return [
        *(figure for label, one in by_series(heldout) for figure in _cells(one, label)),
        *(figure for title in _FAMILIES for label, one in by_series(heldout) for figure in _family(one, title, label)),
        *(figure for element in _PLAIN for label, one in by_series(pick) for figure in _fits(one, element, label)),
        *(figure for element in _PLAIN for label, one in by_series(pick) for figure in _cosines(one, element, label)),
    ]


def key_numbers(pick: Pick) -> dict[str, str]:
    """The mean held-out R² of FFN and attention of one model, and the least linear layer of each."""
    found = {}
    for element, name in (("ffn", "FFN"), ("attn", "attention")):
        scores = pick.where("metric", "r2_heldout").where("element", element).main_variant().present
        if scores:
            least = min(scores, key=lambda record: record["value"])
            found[f"{name}: mean R² held out"] = digits(sum(record["value"] for record in scores) / len(scores))
            found[f"{name}: least linear layer"] = f"layer {least['layer']} (R² {digits(least['value'])})"
    return found


def followed(pick: Pick) -> dict[str, Pick]:
    """Held-out R² of FFN, attention and whole layer."""
    heldout = pick.where("metric", "r2_heldout").main_variant()
    found = {f"R² held out, {name}": heldout.where("element", name) for name in _FOLLOWED}
    return {title: one for title, one in found.items() if one.present}


def _cells(pick: Pick, label: str) -> list[Figure]:
    if not pick.present:
        return []
    pick = pick.main_variant()
    elements = pick.distinct("element")
    order = [name for name in _ORDER if name in elements] + [name for name in elements if name not in _ORDER]
    numbers = len(pick.distinct("layer")) <= _MOST_NUMBERS
    values = Values(title="R² held out", domain=(-1, 1), scheme="blueorange")
    chart = cells(pick, values, layers_of(pick), Field(name="element", order=tuple(order)), numbers)
    note = "1: an affine map does the same. Colours stop at −1 and 1; a cross marks a missing value."
    spec = spec_of(chart, height=max(160, 26 * len(order)))
    return [_figure("r2_map", "R² held out, every element", label, spec, note)]


def _family(pick: Pick, title: str, label: str) -> list[Figure]:
    chosen = pick.where("element", *_FAMILIES[title])
    if not _on_axis(chosen):
        return []
    spec = spec_of(lines(chosen, _r2_values(chosen), "element"))
    note = _outside(chosen)
    return [_figure(f"r2_heldout_{_SHORT[title]}", f"R² held out, {title}", label, spec, note)]


def _fits(pick: Pick, element: str, label: str) -> list[Figure]:
    chosen = pick.where("metric", *_FITS).where("element", element)
    if len({record["metric"] for record in _on_axis(chosen)}) < 2:
        return []
    spec = spec_of(lines(chosen, _r2_values(chosen), "metric"))
    note = f"The floor is what unrelated data would score in sample. {_outside(chosen)}".strip()
    return [_figure(f"r2_fits_{element}", f"{_name(element)}: held out against in sample", label, spec, note)]


def _cosines(pick: Pick, element: str, label: str) -> list[Figure]:
    chosen = pick.where("metric", *_COSINES).where("element", element)
    if not chosen.present:
        return []
    spec = spec_of(lines(chosen, Values(title="cosine", from_zero=True), "metric"))
    note = "The constant baseline ignores its input: only what lies above it is linear skill."
    return [_figure(f"cosine_{element}", f"{_name(element)}: cosine against its baselines", label, spec, note)]


def _figure(name: str, title: str, label: str, spec: dict[str, Any], note: str) -> Figure:
    return Figure(name=file_name(name, label), title=capital(title) + label, spec=spec, note=note)


def _name(element: str) -> str:
    return {"ffn": "FFN", "attn": "attention"}[element]


def _r2_values(pick: Pick) -> Values:
    lowest = min(record["value"] for record in pick.present)
    return Values(title="R²", domain=(_LOWEST if lowest < 0 else 0, _HIGHEST))


def _on_axis(pick: Pick) -> list[Record]:
    return [record for record in pick.present if record["value"] >= _LOWEST]


def _outside(pick: Pick) -> str:
    below = [record for record in pick.present if record["value"] < _LOWEST]
    if not below:
        return ""
    least = min(below, key=lambda record: record["value"])
    where = f"{digits(least['value'])}, {least['element']} in layer {least['layer']}"
    return f"{len(below)} of {len(pick.present)} values lie below the axis; the lowest is {where}."
