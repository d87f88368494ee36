"""Rows as plain records with the name of their series, and as the compact block that a page embeds once."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transect.report.thinning import thinned
from transect.results import COLUMNS, Row

Record = dict[str, Any]
TRAINING = "train"
_TELLS_APART = ("revision", "step", "dtype", "data")
_MOMENTS = ("revision", "step")


def to_records(rows: Iterable[Row]) -> list[Record]:
    """One record a row, with the shortest names that tell the models apart; training runs have their own names.

    `series` tells model, revision, step and run apart; `subject` is the same without the moment of training. `thinned`
    says what was left out beside this row, or is None.
    """
    records = [{**asdict(row), "thinned": note} for row, note in thinned(list(rows))]
    training = {record["run"] for record in records if record["probe"] == TRAINING} - {None}
    short = _short_names({record["model"] for record in records if record["run"] not in training})
    alike: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        # The probes inside a run may read other text, and numbers of another type, than the training.
        own_run = record["run"] in training
        alike[(record["run"], section_of(record)) if own_run else (record["model"],)].append(record)
    for key, own in alike.items():
        name = key[0] if len(key) == 2 else short[key[0]]
        apart = _varying(own)
        for record in own:
            words = {column: _word(column, record[column]) for column in apart if record[column] is not None}
            record["series"] = " ".join([name, *words.values()])
            record["subject"] = " ".join([name, *(word for column, word in words.items() if column not in _MOMENTS)])
    return records


def section_of(record: Record) -> str:
    """Where a record stands on the page: its probe, else its task."""
    return record["probe"] or record["task"] or "other"


def compact(records: list[Record]) -> dict[str, Any]:
    """The records as names once, constant columns once, and lists of the rest; empty columns are left out."""
    own = ["series", "subject"] if any(record["series"] != record["subject"] for record in records) else ["series"]
    names = [name for name in (*COLUMNS, *own) if any(record[name] is not None for record in records)]
    constant = {name: records[0][name] for name in names if all(record[name] == records[0][name] for record in records)}
    columns = [name for name in names if name not in constant]
    return {
        "constant": constant,
        "columns": columns,
        "rows": [[record[name] for name in columns] for record in records],
    }


def _short_names(models: set[str | None]) -> dict[str | None, str]:
    last = {model: (model or "model").rstrip("/").split("/")[-1] for model in models}
    times = Counter(last.values())
    return {model: name if times[name] == 1 else str(model) for model, name in last.items()}


def _varying(own: list[Record]) -> list[str]:
    varying = [name for name in _TELLS_APART if len({record[name] for record in own} - {None}) > 1]
    if "step" in varying and "revision" in varying and _settled_by(own, "step", "revision"):
        varying.remove("revision")
    moments = [name for name in varying if name in _MOMENTS]
    if moments:
        # Two runs that were followed over the same steps are two subjects; a run for each step is not.
        followed = not _settled_by(own, "run", *moments) and not _settled_by(own, moments[0], "run")
        return [*varying, "run"] if followed else varying
    return varying or ["run"] * (len({record["run"] for record in own} - {None}) > 1)


def _settled_by(records: list[Record], field: str, *others: str) -> bool:
    found: dict[Any, set[tuple[Any, ...]]] = {}
    for record in records:
        found.setdefault(record[field], set()).add(tuple(record[name] for name in others))
    return all(len(values) == 1 for values in found.values())


def _word(name: str, value: object) -> str:
    return f"step {value}" if name == "step" else str(value)
