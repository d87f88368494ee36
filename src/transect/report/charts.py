"""Lines, bars, points and ranges; every chart reads the page's shared data by name."""

import math
from dataclasses import dataclass
from typing import Any

import altair as alt

from transect.report.pick import Pick
from transect.report.scales import LAYER, Field, Values, field_of

DATA_NAME = "rows"
Chart = alt.Chart | alt.LayerChart | alt.FacetChart
_FEW_LAYERS = 16
_FEW_BARS = 8
_MOST_BANDS = 6
_MOST_DOTS = 60
_PRESENT = "isValid(datum.value)"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: its file name, what stands above it, and a Vega-Lite specification without data.

    `reads` names the metrics it needs, where handing it all rows of its probe would be slow.
    """

    name: str
    title: str
    spec: dict[str, Any]
    note: str = ""
    reads: tuple[str, ...] = ()


def spec_of(chart: Chart, height: int = 260) -> dict[str, Any]:
    """The chart as a specification as wide as its container."""
    # The tests hold every figure to Vega-Lite's schema; doing it here would take most of the time of a chart.
    return bare(chart.properties(width="container", height=height).to_dict(validate=False))


def bare(spec: dict[str, Any]) -> dict[str, Any]:
    """A specification without what the page decides for all of them."""
    return {name: part for name, part in spec.items() if name not in ("config", "$schema")}


def lines(
    pick: Pick,
    values: Values,
    colour: str | Field | None = None,
    dash: str | Field | None = None,
    x: Field = LAYER,
) -> Chart:
    """Values over layers, or over `x`: a line for each colour and dash, with a band where an interval is known."""
    shade, stroke = (field_of(pick, name) if name else None for name in (colour, dash))
    used = [field for field in (x, shade, stroke) if field]
    base = chart_of(pick, *used).transform_filter(_PRESENT)
    across = x.cells(alt.X) if x.order else x.axis()
    base = base.encode(x=across, y=values.axis(), tooltip=tooltip(pick, *used))
    if values.kind == "log":
        base = base.transform_filter("datum.value > 0")
    if shade:
        told = len(shade.order or ()) > 1 or shade == stroke
        base = base.encode(color=shade.colour("stroke" if told else None))
    known = {name for field in used for name in (field.name, *field.uses)}
    apart = [name for name in ("variant", "site", "part", "split", "domain", "task") if name not in known]
    detail = [f"{name}:N" for name in apart if len(pick.distinct(name)) > 1]
    detail += [f"{stroke.name}:N"] if stroke else []
    base = base.encode(detail=detail) if detail else base
    size = 28 if len(pick.distinct("layer")) <= _FEW_LAYERS else 12
    clip = values.domain is not None
    several = math.prod(len(field.order or ()) for field in (shade, stroke) if field)
    # Points that would touch are there only to be pointed at.
    crowded = x is not LAYER and len(pick.present) > _MOST_DOTS * max(1, several)
    line = base.mark_line(clip=clip, strokeWidth=1.5 if crowded else 2)
    line = line.encode(strokeDash=stroke.dash(coloured_alike=shade == stroke)) if stroke else line
    points = base.mark_point(clip=clip, filled=True, size=size, opacity=0 if crowded else 1)
    if several > _MOST_BANDS or not any(record["low"] is not None for record in pick.present):
        return alt.layer(line, points)
    band = base.mark_area(opacity=0.18, clip=clip).encode(y=alt.Y("low:Q", title=values.title), y2="high:Q")
    return alt.layer(band.transform_filter("isValid(datum.low)"), line, points)


def bars(pick: Pick, values: Values, colour: str | Field | None = None, x: str | Field = "layer") -> Chart:
    """Values as bars with their intervals, side by side for each colour."""
    place = field_of(pick, x)
    layered = place.name == "layer"
    axis = alt.Axis(labelAngle=0 if layered else -35, labelOverlap=True, labelLimit=180)
    shade = field_of(pick, colour) if colour else None
    base = chart_of(pick, place, *([shade] if shade else [])).transform_filter(_PRESENT)
    sort = None if layered else list(place.order or ())
    base = base.encode(x=alt.X(f"{place.name}:O", title=place.title or place.name, axis=axis, sort=sort))
    base = base.encode(y=values.axis(), tooltip=tooltip(pick, place))
    # Full-width bars of a few values would look like a filled page.
    few = not shade and len(place.order or ()) <= _FEW_BARS
    bar = base.mark_bar(cornerRadiusEnd=2, size=36) if few else base.mark_bar(cornerRadiusEnd=2)
    error = base.mark_rule(color="#777", strokeWidth=1)
    if shade:
        offset = alt.XOffset(f"{shade.name}:N", sort=list(shade.order or ()))
        bar = bar.encode(color=shade.colour("square"), xOffset=offset)
        error = error.encode(xOffset=offset)
    if not any(record["low"] is not None for record in pick.present):
        return bar
    error = error.encode(y=alt.Y("low:Q", title=values.title), y2="high:Q")
    return alt.layer(bar, error.transform_filter("isValid(datum.low)"))


def points(pick: Pick, values: Values, x: Field, colour: Field) -> Chart:
    """Each value as a point over `x`."""
    base = chart_of(pick, x, colour).transform_filter(_PRESENT).mark_point(filled=True, size=34, opacity=0.75)
    return base.encode(x=x.axis(), y=values.axis(), color=colour.colour("circle"), tooltip=tooltip(pick, x, colour))


def ranges(pick: Pick, values: Values, y: Field, colour: str | None, middle: float) -> Chart:
    """Each value as a point with its interval, one line of the chart for each `y`; a grey rule marks `middle`."""
    shade = field_of(pick, colour) if colour else None
    base = chart_of(pick, y).transform_filter(_PRESENT)
    axis = alt.Axis(labelLimit=200, grid=True)
    base = base.encode(y=alt.Y(f"{y.name}:N", title=None, sort=list(y.order or ()), axis=axis), x=values.axis(alt.X))
    base = base.encode(tooltip=tooltip(pick, y))
    if shade and len(shade.order or ()) > 1:
        offset = alt.YOffset(f"{shade.name}:N", sort=list(shade.order or ()))
        base = base.encode(color=shade.colour("circle"), yOffset=offset)
    dots = base.mark_point(filled=True, size=70, opacity=1)
    rule = alt.Chart(alt.NamedData(DATA_NAME)).transform_aggregate(rows="count()").mark_rule(color="#888")
    rule = rule.encode(x=alt.XDatum(middle))
    if not any(record["low"] is not None for record in pick.present):
        return alt.layer(rule, dots)
    error = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=values.title), x2="high:Q")
    return alt.layer(rule, error.transform_filter("isValid(datum.low)"), dots)


def ranked(pick: Pick, values: Values, y: Field, most: int) -> Chart:
    """The highest values as bars, the highest on top."""
    base = chart_of(pick, y).transform_filter(_PRESENT)
    base = base.transform_window(rank="row_number()", sort=[alt.SortField("value", order="descending")])
    axis = alt.Axis(labelLimit=200, ticks=False)
    base = base.transform_filter(f"datum.rank <= {most}").mark_bar(cornerRadiusEnd=2)
    up = alt.Y(f"{y.name}:N", title=y.title, sort=alt.SortField("rank"), axis=axis)
    return base.encode(y=up, x=values.axis(alt.X), tooltip=tooltip(pick, y))


def chart_of(pick: Pick, *fields: Field) -> alt.Chart:
    """A chart of the picked rows with the fields that have to be worked out."""
    return picked(alt.Chart(alt.NamedData(DATA_NAME)), pick, *fields)


def picked(chart: Any, pick: Pick, *fields: Field) -> Any:
    """The chart of only the picked rows, with the fields that have to be worked out."""
    for one in pick.filters:
        chart = chart.transform_filter(one)
    formulas = {field.name: field.formula for field in fields if field.formula}
    return chart.transform_calculate(**formulas) if formulas else chart


def tooltip(pick: Pick, *fields: Field) -> list[alt.Tooltip]:
    """What a mark says when pointed at."""
    worked_out = [field.name for field in fields if field.formula]
    names = ("series", "layer", "layer_to", "element", "variant", "site", "part", "edit", "task")
    known = [name for name in names if pick.distinct(name)] + worked_out
    numbers = [name for name in ("value", "low", "high") if any(record[name] is not None for record in pick.records)]
    return [
        *(alt.Tooltip(f"{name}:N") for name in known),
        *(alt.Tooltip(f"{name}:Q", format=".4~g") for name in numbers),
    ]
