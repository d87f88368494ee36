"""Records of a task's data: JSON Lines, JSON, CSV, TSV, Parquet, Hugging Face data sets; where a name is looked for."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transect.errors import InputError, NotAtHand

Record = dict[str, Any]
_CSV_FIELD = 1 << 24


def located(patterns: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """The file that a list of names or patterns means: a path as it stands, else the first found below the folders.

    Patterns are tried in order; of several files that fit, the first by name. None where there is none.
    """
    for pattern in patterns:
        if Path(pattern).is_file():
            return Path(pattern)
        for folder in folders:
            inside = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
            name = pattern.rsplit("/", 1)[-1]
            fitting = [p for p in inside if fnmatch(p.name, name) and fnmatch(str(p), f"*{pattern.removeprefix('./')}")]
            if fitting:
                return fitting[0]
    return None


def found(patterns: Sequence[str], folders: Sequence[Path], what: str) -> Path:
    """As `located`; raises NotAtHand where there is no such file."""
    path = located(patterns, folders)
    if path is None:
        where = ", ".join(map(str, folders)) or "no --data folder"
        raise NotAtHand(f"{what} is not at hand: no {' or '.join(patterns)} in {where}; give --data FOLDER that has it")
    return path


def read(path: Path, columns: Sequence[str] = ()) -> list[Record]:
    """All records of a file; raises InputError, with the line where there is one, for what is none.

    columns: names of those of a table, where its file has no head line.
    """
    name = path.name.lower().removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        text = _text(path)
        if name.endswith(".jsonl"):
            return list(_lines(text, path))
        if name.endswith(".json"):
            return _whole(json.loads(text), path)
        if name.endswith((".csv", ".tsv")):
            return _table(text, "," if name.endswith(".csv") else "\t", columns)
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}; give another file") from error
    raise InputError(f"{path} is no .jsonl, .json, .csv, .tsv or .parquet file, as records have to be")


def hugging_face(source: str) -> list[Record]:
    """The records of `hf:NAME[:CONFIG[:SPLIT]]`, also of a folder that `save_to_disk` wrote."""
    from transect.data.sources import open_dataset

    return [dict(row) for row in open_dataset(source)]


def _text(path: Path) -> str:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as handle:
        return handle.read()


def _lines(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {path} is not JSON; give one JSON record a line") from error
        if not isinstance(record, dict):
            raise InputError(f"line {number} of {path} is no record with names; give one JSON object a line")
        yield record


def _whole(content: Any, path: Path) -> list[Record]:
    """A list of records, BIG-bench's `examples`, or CLINC150's splits of [text, label], each with its split."""
    if isinstance(content, dict) and isinstance(content.get("examples"), list):
        content = content["examples"]
    if isinstance(content, dict) and content and all(isinstance(rows, list) for rows in content.values()):
        named = [(split, row) for split, rows in content.items() for row in rows]
        content = [
            row | {"split": split} if isinstance(row, dict) else {"text": row[0], "label": row[1], "split": split}
            for split, row in named
            if isinstance(row, dict) or (isinstance(row, list) and len(row) == 2)
        ]
        if len(content) != len(named):
            raise InputError(f"{path} has entries that are neither records nor [text, label]")
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise InputError(f"{path} holds no list of records; give one, or JSON Lines")
    return content


def _table(text: str, delimiter: str, columns: Sequence[str]) -> list[Record]:
    before = csv.field_size_limit(_CSV_FIELD)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # GLUE's files have lone quotes
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), columns or None, delimiter=delimiter, quoting=quoting)
        records = [{str(k): v for k, v in row.items()} for row in rows]
    finally:
        csv.field_size_limit(before)
    for number, record in enumerate(records if columns else [], start=1):
        if len(record) != len(columns) or None in record.values():
            raise ValueError(
                f"record {number} has not the {len(columns)} columns {', '.join(columns)} without a head line"
            )
    return records
