"""What a chart shows and how: the columns it reads, the scale of its values, colours, dashes and legends."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from transect.report.pick import Pick
from transect.report.records import Record

Symbol = Literal["stroke", "square", "circle"]
_DASHES = ([1, 0], [5, 3], [2, 2], [8, 3, 2, 3])
_LEGEND_LETTERS = 80
_MOST_LABELS = 16
_DWARFED = 10


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column of the rows, or one worked out from them by a Vega expression over the columns in `uses`.

    `order` makes it a list of names in that order; without it the field is a number on an axis. `ordered` colours by a
    gradient, for names that follow each other, such as layers.
    """

    name: str
    title: str | None = None
    formula: str | None = None
    uses: tuple[str, ...] = ()
    order: tuple[Any, ...] | None = None
    ordered: bool = False
    log: bool = False
    format: str = "d"

    def axis(self, channel: type[alt.X] | type[alt.Y] = alt.X) -> Any:
        """The axis of a number."""
        whole = {} if self.format.endswith(("e", "g")) else {"tickMinStep": 1}
        axis = alt.Axis(format=self.format, grid=False, **whole)  # pyright: ignore[reportArgumentType]
        kind = {"type": "log"} if self.log else {"zero": False, "padding": 8}
        return channel(f"{self.name}:Q", title=self.title, axis=axis, scale=alt.Scale(nice=False, **kind))  # pyright: ignore[reportArgumentType]

    def cells(self, channel: type[alt.X] | type[alt.Y], upwards: bool = False) -> Any:
        """The axis of a map of cells, with no more labels than fit."""
        order = list(self.order or ())
        apart = max(1, round(len(order) / _MOST_LABELS))
        look = alt.Axis(
            labelAngle=0, values=order[::apart], ticks=False, domain=False, labelLimit=160, labelOverlap=True
        )
        scale = alt.Scale(domain=order[::-1] if upwards else order, paddingInner=0)
        return channel(f"{self.name}:O", title=self.title, axis=look, scale=scale)

    def colour(self, symbol: Symbol | None) -> alt.Color:
        """The colour of a line, bar or point, with a legend of such symbols."""
        names = list(self.order or ())
        shown = legend_of(names, symbol, title=self.title) if symbol else None
        if self.ordered:
            scale = alt.Scale(domain=names, scheme="viridis")
            return alt.Color(f"{self.name}:O", title=self.title, scale=scale, legend=shown)
        scale = alt.Scale(domain=names, scheme="tableau10" if len(names) <= 10 else "tableau20")
        return alt.Color(f"{self.name}:N", title=self.title, scale=scale, legend=shown)

    def dash(self, coloured_alike: bool) -> alt.StrokeDash:
        """The dash of a line; after the final norm always the second one."""
        names = list(self.order or ())
        post = [str(name).startswith("post_norm") for name in names]
        pattern = [_DASHES[post[i] if any(post) else i % len(_DASHES)] for i in range(len(names))]
        # A legend of its own stands below, in grey, so that long names do not push the colours out of the figure.
        apart = legend_of(names, orient="bottom", symbolStrokeColor="#888") if len(names) > 1 else None
        legend = legend_of(names) if coloured_alike else apart
        scale = alt.Scale(domain=names, range=pattern)
        return alt.StrokeDash(f"{self.name}:N", title=None, legend=legend, scale=scale)


LAYER = Field(name="layer", title="layer")


def field_of(pick: Pick, field: "str | Field") -> Field:
    """A field as it is, or a column by its name with the values that the rows have."""
    return field if isinstance(field, Field) else Field(name=field, order=tuple(pick.distinct(field)))


@dataclass(frozen=True, kw_only=True)
class Values:
    """How the values of a chart are shown: their name, the domain and the kind of scale.

    `symlog` is linear within `constant` of zero and logarithmic beyond; it needs its `ticks`.
    """

    title: str
    domain: tuple[float, float] | None = None
    kind: Literal["linear", "log", "symlog"] = "linear"
    from_zero: bool = False
    scheme: str = "viridis"
    constant: float = 1
    ticks: tuple[float, ...] = ()
    format: str | None = None

    def axis(self, channel: type[alt.X] | type[alt.Y] = alt.Y) -> Any:
        """The axis of the values."""
        axis = alt.Axis(tickCount=6, grid=self.kind != "log", **({"format": self.format} if self.format else {}))  # pyright: ignore[reportArgumentType]
        if self.domain:
            scale = alt.Scale(domain=list(self.domain), nice=False)
        elif self.kind == "log":
            scale = alt.Scale(type="log", nice=False)
        elif self.kind == "symlog":
            scale = alt.Scale(type="symlog", constant=self.constant, nice=False, zero=self.from_zero)
            axis = alt.Axis(values=list(self.ticks), format="~g", grid=True)
        else:
            scale = alt.Scale(zero=self.from_zero, nice=True)
        return channel("value:Q", title=self.title, scale=scale, axis=axis)

    def colour(self, tall: int | None = None) -> alt.Color:
        """The colour of a cell, with a legend as tall as the chart or of the given height."""
        legend = alt.Legend(title=None, gradientThickness=10, gradientLength=tall or {"expr": "height"})
        scale = alt.Scale(scheme=self.scheme, clamp=True, zero=self.from_zero)  # pyright: ignore[reportArgumentType]
        if self.domain:
            scale["domain"] = list(self.domain)
        if self.kind == "symlog":
            scale["type"], scale["constant"] = "symlog", self.constant
            legend["values"], legend["format"] = list(self.ticks), "~g"
        return alt.Color("value:Q", scale=scale, legend=legend)


def spread_values(records: list[Record], title: str, from_zero: bool = True) -> Values:
    """A linear scale, or a log-like one when a few values dwarf the others."""
    sizes = sorted(abs(record["value"]) for record in records if record["value"])
    middle = sizes[len(sizes) // 2] if sizes else 0
    if not sizes or sizes[-1] <= _DWARFED * middle:
        return Values(title=title, from_zero=from_zero)
    constant = 10.0 ** round(math.log10(middle))
    lowest = min(record["value"] for record in records if record["value"] is not None)
    decades = math.log10(sizes[-1] / constant)
    steps = (1, 3) if decades < 3 else (1,)
    powers = range(max(0, math.floor(decades)) + 1)
    up = [float(f"{step * constant * 10**power:.0e}") for power in powers for step in steps]
    up = [tick for tick in up if tick <= sizes[-1]] or [constant]
    down = [-tick for tick in up if tick <= -lowest]
    ticks = (*sorted(down), 0.0, *up)
    name = f"{title}, log-like scale"
    return Values(title=name, kind="symlog", from_zero=from_zero, constant=constant, ticks=ticks)


def legend_of(names: list[Any], symbol: Symbol = "stroke", **look: Any) -> alt.Legend:
    """A legend above the chart, in as many columns as its names leave room for."""
    columns = max(1, _LEGEND_LETTERS // (max(len(str(name)) for name in names) + 5))
    size = {"symbolStrokeWidth": 2.5, "symbolSize": 150} if symbol == "stroke" else {"symbolStrokeWidth": 0}
    look = {"orient": "top", "columns": columns, "labelLimit": 240, "title": None, **look}
    return alt.Legend(**{"symbolType": symbol, "symbolOpacity": 1, **size, **look})
