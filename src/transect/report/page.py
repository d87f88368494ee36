"""One self-contained HTML page: what was measured, a section for each probe, every row, the run record."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from transect.errors import InputError
from transect.report.charts import Figure
from transect.report.figures import figures_of, key_rows_of
from transect.report.pick import Pick
from transect.report.records import TRAINING, Record, compact, section_of, to_records
from transect.report.sources import Given, Source, read_sources
from transect.report.stills import VEGA_LITE, file_stem, write_stills
from transect.report.texts import Text, text_of
from transect.results import make_folder, write_whole

_MOST_NAMED = 4
_ASSETS = Path(__file__).parent / "assets"
_FIRST = (
    "compare",
    TRAINING,
    "language_modelling",
    "options",
    "minimal_pairs",
    "cloze",
    "lm_eval",
    "fine_tuning",
    "linear_probe",
    "early_exit",
    "jump",
    "nonlinearity",
    "similarity",
    "contribution",
    "commutativity",
    "ablation",
    "routing",
)


@dataclass(frozen=True)
class Section:
    """One probe or task on the page."""

    probe: str
    text: Text
    figures: list[Figure]
    key_names: list[str]
    key_rows: list[tuple[str, list[str]]]
    missing: list[tuple[str, int]]


def write_report(given: Given | Iterable[Given], output: str | Path, title: str | None = None) -> list[Path]:
    """Write the page, and beside it `<stem>_figures/` with each figure as SVG and PNG; gives the paths, page first.

    Raises InputError when a folder has no rows, there is no row at all, or the output cannot be written.
    """
    output = Path(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder; give a file name such as {output / 'report.html'}")
    sources = read_sources(given)
    records = to_records(row for source in sources for row in source.table)
    sections = sections_of(records)
    folder = output.with_name(f"{output.stem}_figures")
    make_folder(output.parent)
    make_folder(folder)
    stills = [path for section in sections for path in write_stills(section.probe, section.figures, records, folder)]
    page = render(title or _title(records), sources, records, sections)
    write_whole(output, page.encode())
    return [output, *stills]


def sections_of(records: list[Record]) -> list[Section]:
    """A section for each probe or task that has rows, known ones first."""
    probes = {section_of(record) for record in records}
    return [_section(probe, records) for probe in sorted(probes, key=lambda name: (_rank(name), name))]


def render(title: str, sources: list[Source], records: list[Record], sections: list[Section]) -> str:
    """The page as text; everything it needs is inside."""
    template = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.j2")
    figures = [
        {"id": file_stem(section.probe, figure), "probe": section.probe, "reads": figure.reads, "spec": figure.spec}
        for section in sections
        for figure in section.figures
    ]
    return template.render(
        title=title,
        facts=_facts(sources, records, sections),
        notes=list(dict.fromkeys(note for source in sources for note in source.notes)),
        sections=sections,
        file_stem=file_stem,
        runs=[(source.name, _flat(source.config), _flat(source.environment)) for source in sources],
        rows=_json(compact(records)),
        figures=_json(figures),
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        bundle=Markup(_plotting_bundle()),
    )


def _section(probe: str, records: list[Record]) -> Section:
    own = tuple(record for record in records if section_of(record) == probe)
    pick = Pick(own, _filters(own[0]))
    numbers = key_rows_of(probe, pick)
    names = list(dict.fromkeys(name for found in numbers.values() for name in found))
    rows = [(series, [found.get(name, "–") for name in names]) for series, found in numbers.items() if found]
    missing = Counter(f"{record['metric']}: {record['reason']}" for record in own if record["value"] is None)
    return Section(probe, text_of(probe), figures_of(probe, pick), names, rows, missing.most_common())


def _filters(record: Record) -> tuple[dict[str, Any] | str, ...]:
    """What picks the records of this one's section."""
    if record["probe"]:
        return ({"field": "probe", "equal": record["probe"]},)
    return ("!isValid(datum.probe)", {"field": "task", "equal": record["task"]}) if record["task"] else ()


def _rank(probe: str) -> int:
    return _FIRST.index(probe) if probe in _FIRST else len(_FIRST)


def _title(records: list[Record]) -> str:
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    training = list(dict.fromkeys(record["subject"] for record in records if record["probe"] == TRAINING))
    if training:
        return f"Training: {', '.join(training) if len(training) <= 3 else f'{len(training)} runs'}"
    return f"What the layers do: {', '.join(subjects) if len(subjects) <= 3 else f'{len(subjects)} models'}"


def _facts(sources: list[Source], records: list[Record], sections: list[Section]) -> list[tuple[str, str]]:
    def of(name: str) -> str:
        found = list(dict.fromkeys(str(record[name]) for record in records if record[name] is not None))
        return ", ".join(found) if len(found) <= _MOST_NAMED else f"{found[0]} … {found[-1]}"

    def most(name: str) -> str:
        numbers = [record[name] for record in records if record[name] is not None]
        return f"{max(numbers):,}" if numbers else ""

    measured = sum(len(source.table) for source in sources)
    tokens = ("tokens", most("tokens")) if most("tokens") else ("tokens counted", most("n"))
    facts = [
        ("model", of("model")),
        ("revision", of("revision")),
        ("text", of("data")),
        tokens,
        ("documents", most("documents")),
        ("dtype", of("dtype")),
        ("date", ", ".join(dict.fromkeys(source.date for source in sources if source.date))),
        ("probes", ", ".join(section.probe for section in sections)),
        ("rows", f"{len(records):,}" + (f" of {measured:,}, long curves thinned" if measured > len(records) else "")),
    ]
    return [(name, value) for name, value in facts if value]


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return pairs


def _json(content: object) -> Markup:
    # "<" inside a script element could end it.
    return Markup(json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _plotting_bundle() -> str:
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script")
