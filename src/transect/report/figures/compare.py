"""Figures of `compare`: out- against in-distribution loss, values and differences at the match, loss against time."""

from typing import Any

import altair as alt

from transect.comparing.quantities import BITS, LOSS
from transect.report.charts import Figure, chart_of, ranges, spec_of
from transect.report.generic import file_name
from transect.report.pick import Pick
from transect.report.records import Record
from transect.report.scales import Field, Values
from transect.report.words import capital, digits, metric_name

_EQUAL_LOSS = "equal loss"
_ROW = 34
_CLOCK = ((7200, "hours", 3600), (120, "minutes", 60), (0, "seconds", 1))
_NAMES = ("task", "metric", "split", "domain", "element", "layer", "told")


def figures(pick: Pick) -> list[Figure]:
    """Nothing: all figures are over the whole comparison."""
    return []


def over_training(pick: Pick) -> list[Figure]:
    """The curves with the match, then at each alignment values, differences, and the loss against the time it took."""
    arms = _arms(pick)
    found = _curves(pick, arms)
    for alignment in _alignments(pick):
        own = pick.such(lambda record, name=alignment: _aligned(record) == name, f"{_ALIGNED} == '{alignment}'")
        found += [*_values(own, alignment), *_differences(own, alignment), *_against_time(own, arms, alignment)]
    return found


def key_numbers(pick: Pick) -> dict[str, str]:
    """Out-of-distribution loss at equal loss, its difference to the baseline, and what it took to get there."""
    found = {}
    loss = _headline_loss(pick.where("variant", _EQUAL_LOSS))
    for part, title in (("mean", "OOD loss at equal loss"), ("difference", "difference"), ("p", "p")):
        if own := loss.where("part", part).present:
            found[title] = digits(own[0]["value"])
    for metric, title in (("steps", "steps"), ("seconds", "seconds"), ("flops", "FLOPs"), ("parameters", "parameters")):
        if own := pick.where("metric", metric).where("part", "mean", "arm").present:
            found[title] = digits(own[0]["value"])
    return found


_ALIGNED = "(isValid(datum.variant) ? replace(datum.variant, /^.*, /, '') : '')"


def _aligned(record: Record) -> str:
    """What the arms are equal in: the last words of the variant."""
    return (record["variant"] or "").rpartition(", ")[2]


def _told(record: Record) -> str:
    return (record["variant"] or "").rpartition(", ")[0]


def _alignments(pick: Pick) -> list[str]:
    """Without the looser losses, which are in the rows."""
    known = dict.fromkeys(_aligned(record) for record in pick.where("part", "mean").present)
    return [name for name in known if not name.startswith(f"{_EQUAL_LOSS} +")]


def _headline_loss(pick: Pick) -> Pick:
    return pick.where("metric", LOSS).where("split", "ood").without("domain")


def _curves(pick: Pick, arm: Field) -> list[Figure]:
    """Thin lines of the runs, a thick one of an arm's mean, and a rule where all have the same loss."""
    own = pick.where("metric", LOSS).where("part", "curve")
    if {"valid", "ood"} - set(own.distinct("split")):
        return []
    base = chart_of(own).transform_pivot("split", value="value", groupby=["model", "run", "step"])
    base = base.transform_filter("isValid(datum.valid) && isValid(datum.ood)")
    scale = alt.Scale(zero=False, nice=False, padding=8)
    base = base.encode(
        x=alt.X("valid:Q", title="in-distribution loss, nats per token", scale=scale),
        y=alt.Y("ood:Q", title="out-of-distribution loss, nats per token", scale=alt.Scale(zero=False)),
        order="step:Q",
        color=arm.colour("stroke"),
    )
    runs = base.mark_line(strokeWidth=1, opacity=0.35).encode(detail="run:N")
    mean = base.transform_aggregate(valid="mean(valid)", ood="mean(ood)", groupby=["model", "step"])
    layers: list[Any] = [runs, mean.mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=24))]
    matched = pick.where("metric", "matched_loss").where("variant", _EQUAL_LOSS)
    note = ""
    if matched.present:
        rule = chart_of(matched).transform_aggregate(value="mean(value)")
        layers.append(rule.mark_rule(color="#888", strokeDash=[4, 3]).encode(x="value:Q"))
        note = "The dashed line is the loss at which the arms are compared; training goes from right to left."
    title = "Out-of-distribution against in-distribution loss"
    return [Figure(name="curves", title=title, spec=spec_of(alt.layer(*layers), 320), note=note)]


def _values(pick: Pick, alignment: str) -> list[Figure]:
    """Every headline quantity: its mean in each arm with the interval over seeds."""
    found = []
    for label, own in _headlines(pick.where("part", "mean")):
        if len(own.present) < 2:
            continue
        values = Values(title=_with_unit(label, own))
        arm = Field(name="model", order=tuple(own.distinct("model")))
        baseline = own.present[0]["value"]
        spec = spec_of(ranges(own, values, arm, None, baseline), _ROW * len(own.distinct("model")) + 20)
        note = f"95 % intervals over seeds; the grey line is {own.present[0]['model']}."
        name = file_name("values", f": {label}, {alignment}")
        found.append(Figure(name=name, title=f"{capital(label)} at {alignment}", spec=spec, note=note))
    return found


def _differences(pick: Pick, alignment: str) -> list[Figure]:
    """All quantities of a unit in one figure, each arm minus the baseline."""
    own = pick.where("part", "difference")
    if LOSS in own.distinct("metric"):  # bits per byte of the same text say the same
        own = own.where("metric", *(name for name in own.distinct("metric") if name != BITS))
    found = []
    for unit in own.distinct("unit"):
        same = own.where("unit", unit)
        if not same.present:
            continue
        values, quantity = Values(title=f"difference, {unit}" if unit != "1" else "difference"), _quantity(same)
        chart = ranges(same, values, quantity, "model", 0.0)
        arms, lines = len(same.distinct("model")), len(quantity.order or ())
        height = max(_ROW, 16 * arms) * lines + 20
        note = "95 % intervals over seeds. One that touches zero shows no difference."
        name = file_name("differences", f": {unit.replace('/', ' per ')}, {alignment}")
        title = f"Differences to the baseline at {alignment}"
        found.append(Figure(name=name, title=title, spec=spec_of(chart, height), note=note))
    return found


def _against_time(pick: Pick, arm: Field, alignment: str) -> list[Figure]:
    """Each run's out-of-distribution loss at the match over the time it took, with the arm's mean larger."""
    own = _headline_loss(pick).where("part", "seed")
    timed = own.such(lambda record: record["seconds"] is not None, "isValid(datum.seconds)")
    if not timed.present or "seconds" in alignment:
        return []
    most = max(record["seconds"] for record in timed.present)
    unit, size = next((unit, size) for least, unit, size in _CLOCK if most >= least)
    time = Field(name="time", title=f"{unit} of training", formula=f"datum.seconds / {size}", format="~g")
    values = Values(title="out-of-distribution loss, nats per token")
    base = chart_of(timed, time).transform_filter("isValid(datum.value)")
    base = base.encode(x=time.axis(), y=values.axis(), color=arm.colour("circle"))
    runs = base.mark_point(filled=True, size=36, opacity=0.5).encode(tooltip=["run:N", "value:Q", "time:Q"])
    mean = base.transform_aggregate(value="mean(value)", time="mean(time)", groupby=["model"])
    chart = alt.layer(runs, mean.mark_point(filled=True, size=150, opacity=1, shape="diamond"))
    note = "Small: runs; large: means of the arms. Better and faster is below and left."
    title = f"Out-of-distribution loss against time at {alignment}"
    return [Figure(name=file_name("time", f": {alignment}"), title=title, spec=spec_of(chart), note=note)]


def _arms(pick: Pick) -> Field:
    """All arms, the baseline last, so that the others have one colour also where it is not drawn."""
    compared = pick.where("part", "difference").distinct("model")
    return Field(name="model", order=tuple(dict.fromkeys([*compared, *pick.distinct("model")])))


def _headlines(pick: Pick) -> list[tuple[str, Pick]]:
    """The records of each headline quantity, by its name: losses of whole splits, scores of tasks."""
    keys = dict.fromkeys(
        (record["task"], record["metric"], record["split"], record["domain"], record["variant"])
        for record in pick.present
        if record["task"] is not None and record["layer"] is None and _is_headline(record)
    )
    found = []
    for task, metric, split, domain, variant in keys:
        own = pick.where("task", task).where("metric", metric).where("variant", variant)
        own = own.where("split", split) if split else own.without("split")
        own = own.where("domain", domain) if domain else own.without("domain")
        found.append((_name(own.records[0]), own.without("layer")))
    return found


def _is_headline(record: Record) -> bool:
    return record["task"] != "language_modelling" or (record["domain"] is None and record["metric"] == LOSS)


def _name(record: Record) -> str:
    if record["task"] == "language_modelling" and record["split"] in ("valid", "ood"):
        name = "out-of-distribution loss" if record["split"] == "ood" else "in-distribution loss"
        rest = [_told(record)]
    else:
        name, task = metric_name(record["metric"]), record["task"].replace("_", " ")
        rest = [task, record["domain"], record["split"], _told(record)]
    inside = ", ".join(word for word in rest if word)
    return f"{name} ({inside})" if inside else name


def _with_unit(label: str, pick: Pick) -> str:
    unit = pick.records[0]["unit"]
    return label if unit == "1" else f"{label}, {unit}"


def _quantity(pick: Pick) -> Field:
    """What tells the quantities apart, in one text; the whole of a split is `all`."""
    words = {name: _word(name) for name in _NAMES}
    texts = {name: [_text(name, record) for record in pick.records] for name in _NAMES}
    used = [name for name in _NAMES if name in ("metric", "split", "domain") or len(set(texts[name])) > 1]
    if set(texts["metric"]) == {"nats per token"}:
        used.remove("metric")
    lines = zip(*(texts[name] for name in used), strict=True)
    order = tuple(dict.fromkeys(" ".join(word for word in line if word) for line in lines))
    joined = " + ' ' + ".join(words[name] for name in used)
    formula = f"trim(replace({joined}, /\\s+/g, ' '))"
    return Field(name="quantity", formula=formula, uses=("task", "metric", "split", "domain", "layer"), order=order)


def _text(name: str, record: Record) -> str:
    if name == "told":
        return _told(record)
    if name == "domain" and record["domain"] is None:
        return "all" if record["split"] else ""
    value = record[name]
    return "" if value is None else f"layer {value}" if name == "layer" else str(value).replace("_", " ")


def _word(name: str) -> str:
    """The Vega expression that says the same as `_text`."""
    if name == "told":
        return "(indexof(datum.variant, ', ') < 0 ? '' : replace(datum.variant, /, [^,]*$/, ''))"
    if name == "domain":
        return "(isValid(datum.domain) ? replace(datum.domain, /_/g, ' ') : isValid(datum.split) ? 'all' : '')"
    text = "'layer ' + datum.layer" if name == "layer" else f"replace(datum.{name}, /_/g, ' ')"
    return f"(isValid(datum.{name}) ? {text} : '')"
