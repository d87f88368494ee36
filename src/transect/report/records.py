"""Rows as plain records with the name of their series, and as the compact block that a page embeds once."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from transect.results import COLUMNS, Row

Record = dict[str, Any]
_TELLS_APART = ("revision", "step", "dtype", "data")


def to_records(rows: Iterable[Row]) -> list[Record]:
    """One record a row, with `series`: the shortest name that tells its model, revision or run from the others."""
    records = [asdict(row) for row in rows]
    short = _short_names({record["model"] for record in records})
    apart = {model: _varying(records, model) for model in short}
    for record in records:
        model = record["model"]
        extra = [_word(name, record[name]) for name in apart[model] if record[name] is not None]
        record["series"] = " ".join([short[model], *extra])
    return records


def compact(records: list[Record]) -> dict[str, Any]:
    """The records as names once, constant columns once, and lists of the rest; empty columns are left out."""
    names = [name for name in (*COLUMNS, "series") if any(record[name] is not None for record in records)]
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


def _varying(records: list[Record], model: str | None) -> list[str]:
    own = [record for record in records if record["model"] == model]
    distinct = {name: {record[name] for record in own} - {None} for name in (*_TELLS_APART, "run")}
    varying = [name for name in _TELLS_APART if len(distinct[name]) > 1]
    return varying or ["run"] * (len(distinct["run"]) > 1)


def _word(name: str, value: object) -> str:
    return f"step {value}" if name == "step" else str(value)
