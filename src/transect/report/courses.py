"""What figures of training runs share: their axes, and who is told apart by colour."""

from dataclasses import replace

from transect.report import trajectory
from transect.report.charts import Figure, lines, spec_of
from transect.report.generic import file_name
from transect.report.pick import Pick
from transect.report.scales import Field, Values

_ALIKE = 1.01
_CLOCK = ((7200, "hours", 3600), (120, "minutes", 60), (0, "seconds", 1))


def several_runs(pick: Pick) -> bool:
    """Whether the records are of more than one run."""
    return len(pick.distinct("subject")) > 1


def by_run(pick: Pick, named: bool) -> list[tuple[str, Pick]]:
    """The records of each run, with what to add to a title where the page has several."""
    return [(f": {name}" * named, pick.where("subject", name)) for name in pick.distinct("subject")]


def axes(pick: Pick) -> list[Field]:
    """Training steps; of runs that differ in tokens, time or FLOPs of a step also these."""
    return [
        _axis(pick, "step"),
        *(_axis(pick, name) for name in ("tokens", "seconds", "flops") if _differs(pick, name)),
    ]


def loss_values(pick: Pick, title: str) -> Values:
    """A logarithmic axis where the beginning would flatten the rest, as it does in most runs."""
    sizes = [record["value"] for record in pick.present]
    steep = sizes and 0 < min(sizes) < max(sizes) / 2
    return Values(title=f"{title}, log scale", kind="log", format="~g") if steep else Values(title=title)


def curves(name: str, title: str, pick: Pick, values: Values, colour: str | Field | None, x: Field) -> Figure:
    """A figure of lines over `x`, which its title says unless that is the step."""
    over = "" if x.name == "step" else f" against {x.title}"
    spec = spec_of(lines(pick, values, colour, x=x))
    return Figure(
        name=name if x.name == "step" else f"{name}_{x.name}",
        title=title + over,
        spec=spec,
        note=left_out(pick),
        reads=tuple(pick.distinct("metric")),
    )


def run_curves(name: str, title: str, pick: Pick, values: Values, x: Field | None = None) -> list[Figure]:
    """One line for each run; nothing where there is no value."""
    if not pick.present:
        return []
    return [curves(name, title, pick, values, "subject" if several_runs(pick) else None, x or axes(pick)[0])]


def part_curves(figure: tuple[str, str], pick: Pick, values: Values, part: str, named: bool) -> list[Figure]:
    """A figure, of this name and title, for each run, with a line for each part."""
    name, title = figure
    return [
        curves(file_name(name, label), title + label, own, values, part, axes(own)[0])
        for label, own in by_run(pick, named)
        if own.present
    ]


def layered(title: str, pick: Pick, named: bool) -> list[Figure]:
    """Lines by layer over the steps, or a map of many layers, for each run."""
    found = []
    for label, own in by_run(pick, named):
        note, reads = left_out(own), tuple(own.distinct("metric"))
        for figure in trajectory.figures(own, lambda chosen: {title: chosen}):
            name, words = file_name(figure.name, label), f"{figure.note} {note}".strip()
            found.append(replace(figure, name=name, title=figure.title + label, note=words, reads=reads))
    return found


def left_out(pick: Pick) -> str:
    """What is said of rows that the page has no room for."""
    return " ".join(dict.fromkeys(record["thinned"] for record in pick.records if record["thinned"]))


def _axis(pick: Pick, name: str) -> Field:
    if name == "seconds":
        most = max((record["seconds"] or 0 for record in pick.records), default=0)
        unit, size = next((unit, size) for least, unit, size in _CLOCK if most >= least)
        return Field(name="time", title=f"{unit} of training", formula=f"datum.seconds / {size}", format="~g")
    titles = {"step": "training step", "tokens": "training tokens", "flops": "training FLOPs"}
    return Field(name=name, title=titles[name], format="~e" if name == "flops" else "~s")


def _differs(pick: Pick, name: str) -> bool:
    rates = []
    for subject in pick.distinct("subject"):
        own = [record for record in pick.records if record["subject"] == subject and record["step"]]
        last = max(own, key=lambda record: record["step"], default=None)
        if last is None or not last[name]:
            return False
        rates.append(last[name] / last["step"])
    return bool(rates) and max(rates) > _ALIKE * min(rates)
