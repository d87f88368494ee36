"""A model followed over training: its last moment for the ordinary figures, and figures over all its moments."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transect.report.cells import cells, layers_of
from transect.report.charts import Chart, Figure, lines, spec_of
from transect.report.generic import file_name
from transect.report.pick import Pick
from transect.report.scales import Field, spread_values
from transect.report.words import capital, with_unit
from transect.view.checkpoints import in_order

Followed = Callable[[Pick], dict[str, Pick]]
_FEW_LAYERS = 8
_APART = ("variant", "element", "domain", "task", "edit", "site", "split")
_UNEVEN = 8


@dataclass(frozen=True)
class Course:
    """A model measured at two or more training steps, or at several revisions where steps are not known."""

    subject: str
    field: Literal["step", "revision"]
    moments: tuple[Any, ...]


def courses(pick: Pick) -> list[Course]:
    """The models of the records that are followed over training."""
    found = []
    for subject in pick.distinct("subject"):
        own = [record for record in pick.present if record["subject"] == subject]
        steps = sorted({record["step"] for record in own} - {None})
        revisions = sorted({record["revision"] for record in own} - {None}, key=in_order)
        if len(steps) > 1:
            found.append(Course(subject, "step", tuple(steps)))
        elif len(revisions) > 1:
            found.append(Course(subject, "revision", tuple(revisions)))
    return found


def last_only(pick: Pick) -> tuple[Pick, str]:
    """The records without the earlier moments of a course of three or more, and a sentence that says so."""
    long = [course for course in courses(pick) if len(course.moments) > 2]
    if not long:
        return pick, ""
    kept = _without_moments(pick, {course.subject: (course, course.moments[:-1]) for course in long})
    if len({(course.field, course.moments[-1]) for course in long}) > 1:
        return kept, "The last moment of each model's training."
    course = long[0]
    number = f"{course.moments[-1]:,}" if course.field == "step" else course.moments[-1]
    return kept, f"{capital(course.field)} {number}, the last of {len(course.moments)}."


def ends_only(pick: Pick) -> Pick:
    """The records without the moments between the first and the last of each course."""
    return _without_moments(pick, {course.subject: (course, course.moments[1:-1]) for course in courses(pick)})


def figures(pick: Pick, followed: Followed) -> list[Figure]:
    """Lines or a map over the moments, for each thing that `followed` names, and each model where it has layers."""
    found = []
    known = courses(pick)
    for field in dict.fromkeys(course.field for course in known):
        alike = [course for course in known if course.field == field]
        own = pick.where("subject", *(course.subject for course in alike))
        for title, chosen in followed(own).items():
            if chosen.distinct("layer"):
                found += [_layered(chosen, title, course, several=len(known) > 1) for course in alike]
            else:
                found.append(_whole(chosen, title, alike))
    return [figure for figure in found if figure]


def _layered(pick: Pick, title: str, course: Course, several: bool) -> Figure | None:
    own = pick.where("subject", course.subject)
    if len(_seen(own, course.field)) < 2:
        return None
    values = spread_values(own.present, _title(own), from_zero=False)
    layers = layers_of(own)
    if len(layers.order or ()) <= _FEW_LAYERS:
        shade = Field(name="layer", title="layer", order=layers.order, ordered=True)
        chart: Chart = lines(own, values, shade, x=_axis(own, course.field))
        note = ""
    else:
        chart = cells(own, values, _moments(own, course.field), layers)
        note = "The columns are equally wide whatever lies between them."
    return _figure(title, course.field, f": {course.subject}" if several else "", spec_of(chart), note)


def _whole(pick: Pick, title: str, alike: list[Course]) -> Figure | None:
    field = alike[0].field
    if len(_seen(pick, field)) < 2:
        return None
    varying = [name for name in _APART if len(pick.distinct(name)) > 1]
    colour, dash = (varying[0] if varying else None), None
    if len(alike) > 1:
        colour, dash = "subject", colour
    values = spread_values(pick.present, _title(pick), from_zero=False)
    chart = lines(pick, values, colour, dash, x=_axis(pick, field))
    return _figure(title, field, "", spec_of(chart), "")


def _figure(what: str, field: str, label: str, spec: dict[str, Any], note: str) -> Figure:
    name, over = ("training", "over training") if field == "step" else ("revisions", "over revisions")
    title = f"{capital(what)} {over}{label}"
    return Figure(name=file_name(f"{name}_{what}", label), title=title, spec=spec, note=note)


def _title(pick: Pick) -> str:
    record = pick.records[0]
    return with_unit(record["metric"], record["unit"])


def _axis(pick: Pick, field: str) -> Field:
    if field == "revision":
        return _moments(pick, field)
    steps = _seen(pick, field)
    if len(steps) < 4 or steps[-1] <= _UNEVEN * max(1, steps[len(steps) // 2]):
        return Field(name="step", title="training step", format="~s")
    if steps[0] > 0:
        return Field(name="step", title="training step, log scale", log=True, format="~s")
    return Field(name="after", title="training step + 1, log scale", formula="datum.step + 1", log=True, format="~s")


def _moments(pick: Pick, field: str) -> Field:
    title = "training step" if field == "step" else None
    return Field(name=field, title=title, order=tuple(_seen(pick, field)))


def _seen(pick: Pick, field: str) -> list[Any]:
    found = {record[field] for record in pick.present} - {None}
    return sorted(found, key=None if field == "step" else in_order)


def _without_moments(pick: Pick, left_out: dict[str, tuple[Course, tuple[Any, ...]]]) -> Pick:
    def stays(record: dict[str, Any]) -> bool:
        course, moments = left_out.get(record["subject"], (None, ()))
        return course is None or record[course.field] not in moments

    series = [record["series"] for record in pick.records]
    dropped = {record["series"] for record in pick.records if not stays(record)}
    return pick.where("series", *dict.fromkeys(name for name in series if name not in dropped)) if dropped else pick
