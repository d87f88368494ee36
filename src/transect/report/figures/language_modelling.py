"""Figures of language modelling: nats per token and bits per byte of every text, last and over training."""

from transect.report.charts import Figure, bars, spec_of
from transect.report.courses import axes, curves, loss_values, several_runs
from transect.report.generic import file_name
from transect.report.pick import Pick
from transect.report.records import Record
from transect.report.scales import Field, Values
from transect.report.trajectory import courses
from transect.report.words import digits

_METRICS = {"nats_per_token": "Loss in nats per token", "bits_per_byte": "Bits per byte"}
_UNITS = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte"}
_SPLIT, _DOMAIN = (f"(isValid(datum.{name}) ? datum.{name} : '')" for name in ("split", "domain"))


def figures(pick: Pick) -> list[Figure]:
    """Each text as a bar with its interval, side by side for each run."""
    found = []
    for metric, title in _METRICS.items():
        own = pick.where("metric", metric)
        if len(own.present) > 1:
            colour = "series" if len(own.distinct("series")) > 1 else None
            values = Values(title=_UNITS[metric], from_zero=True)
            spec = spec_of(bars(own, values, colour, x=_text_field(own)))
            found.append(Figure(name=metric, title=f"{title} by text", spec=spec, reads=(metric,)))
    return found


def over_training(pick: Pick) -> list[Figure]:
    """Curves of a run by text; of several runs a figure for each text, also over tokens, time and FLOPs."""
    found = []
    for metric, title in _METRICS.items():
        own = pick.where("metric", metric)
        if not courses(own):
            continue
        values = loss_values(own, _UNITS[metric])
        if not several_runs(own):
            found.append(
                curves(f"training_{metric}", f"{title} over training", own, values, _text_field(own), axes(own)[0])
            )
            continue
        for text, one in _by_text(own):
            for x in axes(one) if metric == "nats_per_token" else axes(one)[:1]:
                name = file_name(f"training_{metric}", f": {text}")
                found.append(curves(name, f"{title}, {text}", one, values, "subject", x))
    return found


def key_numbers(pick: Pick) -> dict[str, str]:
    """The last value of each text."""
    found = {}
    for metric in _METRICS:
        for text, own in _by_text(pick.where("metric", metric)):
            if own.present:
                last = max(own.present, key=lambda record: record["step"] or 0)
                found[f"{text}: {_UNITS[metric]}"] = digits(last["value"])
    return found


def _text(record: Record) -> str:
    return " ".join(word for word in (record["split"], record["domain"]) if word)


def _text_field(pick: Pick) -> Field:
    order = tuple(dict.fromkeys(_text(record) for record in pick.records))
    return Field(name="text", formula=f"trim({_SPLIT} + ' ' + {_DOMAIN})", uses=("split", "domain"), order=order)


def _by_text(pick: Pick) -> list[tuple[str, Pick]]:
    texts = dict.fromkeys((record["split"], record["domain"]) for record in pick.records)
    found = []
    for split, domain in texts:
        own = pick.where("split", split) if split else pick.without("split")
        own = own.where("domain", domain) if domain else own.without("domain")
        found.append((_text(own.records[0]), own))
    return found
