"""Figures of `train`: what training runs say of themselves, over their steps; several runs in one figure by name."""

import re
import statistics
from datetime import timedelta

from transect.report.cells import cells
from transect.report.charts import Figure, spec_of
from transect.report.courses import axes, by_run, layered, left_out, loss_values, part_curves, run_curves, several_runs
from transect.report.generic import file_name
from transect.report.pick import Pick
from transect.report.scales import Field, Values, spread_values
from transect.report.words import capital, digits, metric_name

_BLOCK_USE = ("entropy", "dead_fraction", "largest_load", "drop_fraction")
_WIDE = 30
_ROW = 14


def figures(pick: Pick) -> list[Figure]:
    """Nothing: a single moment of a run is in the key numbers."""
    return []


def over_training(pick: Pick) -> list[Figure]:
    """Loss and its parts, gradient, learning rate, stream norms, speed and memory, then the use of blocks."""
    gradient = pick.where("metric", "gradient_norm")
    named = several_runs(pick)
    return [
        *_losses(pick.where("metric", "loss"), named),
        *_gradient(gradient.without("part")),
        *_gradient_map(gradient.such(lambda record: record["part"] is not None, "isValid(datum.part)"), named),
        *_rates(pick.where("metric", "learning_rate"), named),
        *_skipped(pick.where("metric", "skipped_steps")),
        *layered("stream norm", pick.where("metric", "stream_norm"), named),
        *_speed(pick),
        *(figure for metric in _BLOCK_USE for figure in _block_use(pick.where("metric", metric), named)),
    ]


def key_numbers(pick: Pick) -> dict[str, str]:
    """How long the run was, its last loss, its usual speed, and the worst use of blocks at its last logged step."""
    last = max(pick.records, key=lambda record: record["step"] or 0)
    found = {"steps": f"{last['step']:,}" if last["step"] is not None else ""}
    if last["tokens"] is not None:
        found["tokens"] = digits(last["tokens"])
    if last["seconds"] is not None:
        found["time"] = str(timedelta(seconds=round(last["seconds"])))
    if last["flops"]:
        found["FLOPs"] = digits(last["flops"])
    found |= _last_numbers(pick)
    return {name: value for name, value in found.items() if value}


def _last_numbers(pick: Pick) -> dict[str, str]:
    def values(metric: str) -> list[float]:
        return [record["value"] for record in pick.where("metric", metric).present]

    found = {}
    loss = pick.where("metric", "loss").where("part", "main").present
    if loss:
        found["last training loss"] = digits(max(loss, key=lambda record: record["step"] or 0)["value"])
    if speed := values("tokens_per_second"):
        found["tokens/s, median"] = digits(statistics.median(speed))
    if use := values("mfu"):
        found["MFU, median"] = f"{statistics.median(use):.1%}"
    if memory := values("peak_memory"):
        found["peak memory"] = f"{max(memory) / 2**30:.2f} GiB"
    if skipped := values("skipped_steps"):
        found["skipped steps"] = f"{max(skipped):,.0f}"
    for metric in ("dead_fraction", "drop_fraction"):
        records = pick.where("metric", metric).present
        last = max((record["step"] for record in records), default=None)
        if records:
            worst = max(record["value"] for record in records if record["step"] == last)
            found[f"last {metric_name(metric)}, worst layer"] = digits(worst)
    return found


def _losses(pick: Pick, named: bool) -> list[Figure]:
    penalties = [name for name in pick.distinct("part") if name not in ("main", "total")]
    main, total = pick.where("part", "main"), pick.where("part", "total")
    values = loss_values(main, "nats")
    if named:
        found = [figure for x in axes(main) for figure in run_curves("loss", "Training loss", main, values, x)]
        if penalties:
            found += run_curves("loss_total", "Training loss with all its parts", total, values)
    else:
        shown = pick.where("part", "main", *(["total"] if penalties else []))
        found = part_curves(("loss", "Training loss"), shown, values, "part", named)
    own = pick.where("part", *penalties)
    return found + part_curves(("loss_parts", "Other parts of the loss"), own, _spread(own, "nats"), "part", named)


def _spread(pick: Pick, title: str) -> Values:
    sizes = [record["value"] for record in pick.present]
    wide = sizes and min(sizes) > 0 and max(sizes) > _WIDE * min(sizes)
    return Values(title=f"{title}, log scale", kind="log") if wide else Values(title=title)


def _gradient(pick: Pick) -> list[Figure]:
    if not any(record["value"] > 0 for record in pick.present):
        return []
    values = Values(title="gradient norm, log scale", kind="log")
    return run_curves("gradient_norm", "Norm of the gradient before clipping", pick, values)


def _gradient_map(pick: Pick, named: bool) -> list[Figure]:
    found = []
    for label, own in by_run(pick, named):
        if not own.present:
            continue
        parts = tuple(sorted(own.distinct("part"), key=_depth))
        steps = tuple(sorted(own.distinct("step")))
        values = spread_values(own.present, "gradient norm")
        step = Field(name="step", title="training step", order=steps)
        spec = spec_of(cells(own, values, step, Field(name="part", order=parts)), max(120, _ROW * len(parts)))
        note = f"L2 norm before clipping; colours: {values.title}. {left_out(own)}".strip()
        title = f"Norm of the gradient by part{label}"
        name = file_name("gradient_parts", label)
        found.append(Figure(name=name, title=title, spec=spec, note=note, reads=("gradient_norm",)))
    return found


def _depth(part: str) -> tuple[int, int, str]:
    """Embeddings, layers, then what comes after them."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", part)
    if layer:
        return 1, int(layer[1]), layer[2]
    return (0 if "embedding" in part else 2), 0, part


def _rates(pick: Pick, named: bool) -> list[Figure]:
    values = Values(title="learning rate", from_zero=True, format="~g")
    if len(pick.distinct("part")) > 1:
        return part_curves(("learning_rate", "Learning rate"), pick, values, "part", named)
    return run_curves("learning_rate", "Learning rate", pick, values)


def _skipped(pick: Pick) -> list[Figure]:
    """Nothing where no step was, which the key numbers tell."""
    if not any(record["value"] for record in pick.present):
        return []
    values = Values(title="steps", from_zero=True)
    return run_curves("skipped_steps", "Steps skipped so far, as their loss or gradient was not finite", pick, values)


def _speed(pick: Pick) -> list[Figure]:
    shown = {
        "tokens_per_second": ("Speed", Values(title="tokens/s", from_zero=True, format="~s")),
        "mfu": ("Use of the devices", Values(title="MFU", from_zero=True, format="~%")),
        "peak_memory": ("Peak memory", Values(title="bytes", from_zero=True, format="~s")),
    }
    return [
        figure
        for metric, (title, values) in shown.items()
        for figure in run_curves(metric, title, pick.where("metric", metric), values)
    ]


def _block_use(pick: Pick, named: bool) -> list[Figure]:
    """By element; nothing where all values are 0, which the key numbers tell."""
    if not any(record["value"] for record in pick.present):
        return []
    elements = pick.distinct("element")
    name = capital(metric_name(pick.records[0]["metric"]))
    return [
        figure
        for element in elements
        for figure in layered(name + f" of {element}" * (len(elements) > 1), pick.where("element", element), named)
    ]
