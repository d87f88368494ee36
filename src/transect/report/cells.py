"""Maps of coloured cells: pairs of layers, layers against heads, experts or training steps."""

from typing import Any

import altair as alt

from transect.report.charts import DATA_NAME, Chart, bare, chart_of, picked, tooltip
from transect.report.pick import Pick
from transect.report.scales import Field, Values

_FACETS_WIDTH = 540
_FACET_GAP = 16
_PRESENT = "isValid(datum.value)"


def layers_of(pick: Pick, title: str | None = "layer") -> Field:
    """The layers that occur in the rows, as the edge of a map."""
    found = {record[name] for record in pick.records for name in ("layer", "layer_to")} - {None}
    return Field(name="layer", title=title, order=tuple(sorted(found)))


def layer_pairs(pick: Pick, values: Values, mirrored: bool = False, titles: tuple[str, str] | None = None) -> Chart:
    """Values of pairs of layers as cells; `mirrored` draws each pair on both sides of the diagonal."""
    base = chart_of(pick).transform_filter(_PRESENT).mark_rect()
    base = base.encode(color=values.colour(), tooltip=tooltip(pick))
    corners = [("layer", "layer_to")] + [("layer_to", "layer")] * mirrored
    across, up = titles or (("layer", "layer") if mirrored else ("from layer", "to layer"))
    order = layers_of(pick).order

    def corner(x: str, y: str) -> alt.Chart:
        edges = Field(name=x, title=across, order=order), Field(name=y, title=up, order=order)
        return base.encode(x=edges[0].cells(alt.X), y=edges[1].cells(alt.Y, upwards=True))

    return alt.layer(*(corner(x, y) for x, y in corners))


def cells(pick: Pick, values: Values, x: Field, y: Field, numbers: bool = False) -> Chart:
    """Values as cells, `x` across and `y` down, with the number written in if asked, and absent values marked."""
    base = chart_of(pick, x, y).encode(x=x.cells(alt.X), y=y.cells(alt.Y))
    drawn = base.transform_filter(_PRESENT).encode(tooltip=tooltip(pick, x, y))
    layers: list[alt.Chart] = [drawn.mark_rect().encode(color=values.colour())]
    if numbers:
        number = "abs(datum.value) < 9.995 ? format(datum.value, '.2f') : format(datum.value, '.0e')"
        ink = alt.condition("abs(datum.value) > 0.7", alt.value("white"), alt.value("#222"))
        layers.append(
            drawn.transform_calculate(number=number).mark_text(fontSize=10).encode(text="number:N", color=ink)
        )
    if any(record["value"] is None for record in pick.records):
        absent = base.transform_filter(f"!{_PRESENT}").encode(tooltip=[f"{x.name}:O", f"{y.name}:O", "reason:N"])
        layers.append(absent.mark_text(text="×", fontSize=14, color="#888"))
    return alt.layer(*layers)


def pair_facets(pick: Pick, values: Values, edges: tuple[Field, Field], columns: int, mirrored: bool) -> dict[str, Any]:
    """A small map of pairs for each layer; `mirrored` draws each pair on both sides of the diagonal.

    The specification has a fixed width, because Vega-Lite cannot stretch small multiples.
    """
    side = _FACETS_WIDTH // columns - _FACET_GAP
    names = [f"layer {layer}" for layer in layers_of(pick).order or ()]
    name = Field(name="layer_name", formula="'layer ' + datum.layer")

    def corner(x: Field, y: Field) -> alt.Chart:
        scale = alt.Scale(domain=list(x.order or ()), paddingInner=0)
        across = alt.X(f"{x.name}:O", title=None, axis=None, scale=scale)
        up = alt.Y(f"{y.name}:O", title=None, axis=None, scale=scale)
        cell = alt.Chart().mark_rect().encode(x=across, y=up, color=values.colour(tall=side))
        return cell.encode(tooltip=tooltip(pick, *edges))

    corners = [corner(*edges)] + [corner(*edges[::-1])] * mirrored
    maps = alt.layer(*corners, data=alt.NamedData(DATA_NAME)).properties(width=side, height=side)
    facet = alt.Facet(f"{name.name}:N", sort=names, header=alt.Header(title=None, labelPadding=4))
    # The facets come of the rows of the whole chart, so these have to be picked there.
    chart = picked(maps.facet(facet=facet, columns=columns, spacing=_FACET_GAP), pick, *edges, name)
    return bare(chart.transform_filter(_PRESENT).to_dict(validate=False))
