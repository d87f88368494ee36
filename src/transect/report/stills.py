"""Each figure as an SVG and a PNG file, without a browser."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import altair as alt
import vl_convert

from transect.report.charts import DATA_NAME, Figure
from transect.report.records import Record, section_of
from transect.results import write_whole

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
_WIDTH = 620
_NOTE_LETTERS = 100
_CONFIG = {"background": "white", "font": "sans-serif", "view": {"stroke": None}, "padding": 12}


def file_stem(probe: str, figure: Figure) -> str:
    """The name of a figure's files, safe in every file system and as an HTML id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{probe}_{figure.name}").strip("._")


def write_stills(probe: str, figures: Iterable[Figure], records: list[Record], folder: Path) -> list[Path]:
    """Write each figure as `<probe>_<name>.svg` and `.png` and give the paths."""
    own = [_filled(record) for record in records if section_of(record) == probe]
    paths = []
    for figure in figures:
        svg = vl_convert.vegalite_to_svg(with_data(figure, own), vl_version=VEGA_LITE)
        for suffix, content in ((".svg", svg.encode()), (".png", vl_convert.svg_to_png(svg, scale=2))):
            path = folder / (file_stem(probe, figure) + suffix)
            write_whole(path, content)
            paths.append(path)
    return paths


def _filled(record: Record) -> Record:
    return {name: value for name, value in record.items() if value is not None}


def with_data(figure: Figure, records: list[Record]) -> dict[str, object]:
    title = {"text": figure.title, "anchor": "start", "fontSize": 14, "offset": 12}
    if figure.note:
        title |= {"subtitle": textwrap.wrap(figure.note, _NOTE_LETTERS), "subtitleColor": "#555"}
    # Only a chart that fills its container needs a width; small multiples have their own.
    width = {"width": _WIDTH} if "width" in figure.spec else {}
    return {
        **figure.spec,
        **width,
        "title": title,
        "config": _CONFIG,
        "datasets": {DATA_NAME: [record for record in records if not figure.reads or record["metric"] in figure.reads]},
    }
