"""The few kinds of chart a report is made of; every one reads the page's shared data by name."""

from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from transect.report.pick import Pick

DATA_NAME = "rows"
Chart = alt.Chart | alt.LayerChart | alt.FacetChart
_DASHES = ([1, 0], [5, 3], [2, 2], [8, 3, 2, 3])
_LEGEND_LETTERS = 80
_FEW_LAYERS = 16
_FEW_BARS = 8


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: its file name, what stands above it, and a Vega-Lite specification without data."""

    name: str
    title: str
    spec: dict[str, Any]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Values:
    """How the values of a chart are shown: their name, the domain and the kind of scale."""

    title: str
    domain: tuple[float, float] | None = None
    kind: Literal["linear", "log"] = "linear"
    from_zero: bool = False
    scheme: str = "viridis"

    def axis(self) -> alt.Y:
        """The vertical axis."""
        if self.domain:
            scale = alt.Scale(domain=list(self.domain), nice=False)
        elif self.kind == "log":
            scale = alt.Scale(type="log", nice=False)
        else:
            scale = alt.Scale(zero=self.from_zero, nice=True)
        axis = alt.Axis(tickCount=6, grid=self.kind == "linear")
        return alt.Y("value:Q", title=self.title, scale=scale, axis=axis)

    def colour(self) -> alt.Color:
        """The colour of a cell."""
        legend = alt.Legend(title=None, gradientThickness=10, gradientLength={"expr": "height"})
        scale = alt.Scale(scheme=self.scheme, clamp=True, zero=False)  # pyright: ignore[reportArgumentType]
        if self.domain:
            scale["domain"] = list(self.domain)
        return alt.Color("value:Q", scale=scale, legend=legend)


def spec_of(chart: Chart, height: int = 260) -> dict[str, Any]:
    """The chart as a specification as wide as its container."""
    spec = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)
    spec.pop("$schema", None)
    return spec


def lines(pick: Pick, values: Values, colour: str | None = None, dash: str | None = None) -> Chart:
    """Values over layers: one line for each colour and dash, with a band where an interval is known."""
    base = _chart(pick).transform_filter("isValid(datum.value)")
    base = base.encode(x=_depth(), y=values.axis(), tooltip=_tooltip(pick))
    if values.kind == "log":
        base = base.transform_filter("datum.value > 0")
    if colour:
        base = base.encode(color=_series_colour(pick, colour, dash))
    apart = [name for name in ("variant", "site", "part", "split", "domain", "task") if name not in (colour, dash)]
    detail = [f"{name}:N" for name in apart if len(pick.distinct(name)) > 1]
    if dash:
        detail.append(f"{dash}:N")
    base = base.encode(detail=detail) if detail else base
    size = 28 if len(pick.distinct("layer")) <= _FEW_LAYERS else 12
    clip = values.domain is not None
    line = base.mark_line(clip=clip, strokeWidth=2)
    line = line.encode(strokeDash=_dash(pick, dash, same=colour == dash)) if dash else line
    points = base.mark_point(clip=clip, filled=True, size=size, opacity=1)
    if not any(record["low"] is not None for record in pick.present):
        return alt.layer(line, points)
    band = base.mark_area(opacity=0.18, clip=clip).encode(y=alt.Y("low:Q", title=values.title), y2="high:Q")
    return alt.layer(band.transform_filter("isValid(datum.low)"), line, points)


def bars(pick: Pick, values: Values, colour: str | None = None, x: str = "layer") -> Chart:
    """Values as bars, side by side for each colour."""
    axis = alt.Axis(labelAngle=0 if x == "layer" else -35, labelOverlap=True, labelLimit=180)
    chart = _chart(pick).transform_filter("isValid(datum.value)").mark_bar(cornerRadiusEnd=2)
    chart = chart.encode(x=alt.X(f"{x}:O", title=x, axis=axis), y=values.axis(), tooltip=_tooltip(pick))
    if not colour:
        # Full-width bars of a few values would look like a filled page.
        return chart.mark_bar(cornerRadiusEnd=2, size=36) if len(pick.distinct(x)) <= _FEW_BARS else chart
    legend = _legend(pick.distinct(colour), symbolType="square", symbolStrokeWidth=0)
    shade = alt.Color(f"{colour}:N", title=None, legend=legend, scale=_palette(pick, colour))
    return chart.encode(color=shade, xOffset=alt.XOffset(f"{colour}:N"))


def layer_pairs(pick: Pick, values: Values, mirrored: bool = False) -> Chart:
    """Values of pairs of layers as cells; `mirrored` draws each pair on both sides of the diagonal."""
    base = _chart(pick).transform_filter("isValid(datum.value)").mark_rect()
    base = base.encode(color=values.colour(), tooltip=_tooltip(pick))
    corners = [("layer", "layer_to")] + [("layer_to", "layer")] * mirrored
    titles = ("layer", "layer") if mirrored else ("from layer", "to layer")
    return alt.layer(*(base.encode(x=_across(x, titles[0], pick), y=_upwards(y, titles[1], pick)) for x, y in corners))


def layer_cells(pick: Pick, values: Values, y: str, order: list[str], numbers: bool) -> Chart:
    """Values as cells, layers across and `y` down, with the number written in and absent values marked."""
    axis = alt.Axis(labelLimit=160)
    base = _chart(pick).encode(x=_across("layer", "layer", pick), y=alt.Y(f"{y}:O", title=None, sort=order, axis=axis))
    cells = base.transform_filter("isValid(datum.value)").encode(tooltip=_tooltip(pick))
    layers: list[alt.Chart] = [cells.mark_rect().encode(color=values.colour())]
    if numbers:
        number = "abs(datum.value) < 9.995 ? format(datum.value, '.2f') : format(datum.value, '.0e')"
        ink = alt.condition("abs(datum.value) > 0.7", alt.value("white"), alt.value("#222"))
        layers.append(
            cells.transform_calculate(number=number).mark_text(fontSize=10).encode(text="number:N", color=ink)
        )
    if any(record["value"] is None for record in pick.records):
        absent = base.transform_filter("!isValid(datum.value)").encode(tooltip=["layer:O", f"{y}:N", "reason:N"])
        layers.append(absent.mark_text(text="×", fontSize=14, color="#888"))
    return alt.layer(*layers)


def _chart(pick: Pick) -> alt.Chart:
    chart = alt.Chart(alt.NamedData(DATA_NAME))
    for one in pick.filters:
        chart = chart.transform_filter(one)  # pyright: ignore[reportArgumentType]
    return chart


def _depth() -> alt.X:
    axis = alt.Axis(format="d", tickMinStep=1, grid=False)
    return alt.X("layer:Q", title="layer", axis=axis, scale=alt.Scale(nice=False, zero=False, padding=8))


def _across(field: str, title: str, pick: Pick) -> alt.X:
    layers, axis = _layers(pick)
    return alt.X(f"{field}:O", title=title, axis=axis, scale=alt.Scale(domain=layers, paddingInner=0))


def _upwards(field: str, title: str, pick: Pick) -> alt.Y:
    layers, axis = _layers(pick)
    return alt.Y(f"{field}:O", title=title, axis=axis, scale=alt.Scale(domain=layers[::-1], paddingInner=0))


def _layers(pick: Pick) -> tuple[list[int], alt.Axis]:
    layers = sorted({record[name] for record in pick.records for name in ("layer", "layer_to")} - {None})
    apart = max(1, round(len(layers) / _FEW_LAYERS))
    return layers, alt.Axis(labelAngle=0, values=layers[::apart], ticks=False, domain=False)


def _legend(names: list[Any], **look: Any) -> alt.Legend:
    columns = max(1, _LEGEND_LETTERS // (max(len(str(name)) for name in names) + 5))
    stroke = {"orient": "top", "symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolOpacity": 1, "symbolSize": 150}
    return alt.Legend(**{**stroke, "columns": columns, "labelLimit": 240, **look})


def _palette(pick: Pick, field: str) -> alt.Scale:
    names = pick.distinct(field)
    return alt.Scale(domain=names, scheme="tableau10" if len(names) <= 10 else "tableau20")


def _series_colour(pick: Pick, field: str, dash: str | None) -> alt.Color:
    names = pick.distinct(field)
    legend = _legend(names) if len(names) > 1 or field == dash else None
    return alt.Color(f"{field}:N", title=None, scale=_palette(pick, field), legend=legend)


def _dash(pick: Pick, field: str, same: bool) -> alt.StrokeDash:
    names = pick.distinct(field)
    post = [str(name).startswith("post_norm") for name in names]
    pattern = [_DASHES[post[i] if any(post) else i % len(_DASHES)] for i in range(len(names))]
    # A legend of its own stands below, in grey, so that long names do not push the colours out of the figure.
    apart = _legend(names, orient="bottom", symbolStrokeColor="#888") if len(names) > 1 else None
    legend = _legend(names) if same else apart
    return alt.StrokeDash(f"{field}:N", title=None, legend=legend, scale=alt.Scale(domain=names, range=pattern))


def _tooltip(pick: Pick) -> list[alt.Tooltip]:
    names = ("series", "layer", "layer_to", "element", "variant", "site", "part", "edit", "task")
    known = [name for name in names if pick.distinct(name)]
    numbers = [name for name in ("value", "low", "high") if any(record[name] is not None for record in pick.records)]
    return [
        *(alt.Tooltip(f"{name}:N") for name in known),
        *(alt.Tooltip(f"{name}:Q", format=".4~g") for name in numbers),
    ]
