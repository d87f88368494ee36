"""What a report reads: tables of rows, and the run record beside them."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transect.errors import InputError
from transect.results import Row, Table

Given = str | os.PathLike[str] | Table
_TRAINING = "training"
_DATE_KEYS = ("date", "started", "created", "time", "timestamp")


@dataclass(frozen=True)
class Source:
    """One table with the configuration and environment it was measured in, where these are known."""

    name: str
    table: Table
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What the run wants its reader to know."""
        given = [record.get("notes") or [] for record in (self.environment, self.config)]
        return [str(note) for notes in given for note in ([notes] if isinstance(notes, str) else notes)]

    @property
    def date(self) -> str | None:
        """When the run was made, or None when its record does not say."""
        found = (record.get(key) for record in (self.environment, self.config) for key in _DATE_KEYS)
        return next((str(date) for date in found if date), None)


def read_sources(given: Given | Iterable[Given]) -> list[Source]:
    """Read run folders and tables.

    Raises InputError when a folder has no rows, a record is not JSON, or there is no row at all.
    """
    several = [given] if isinstance(given, str | os.PathLike | Table) else list(given)
    sources = [_read(one, number) for number, one in enumerate(several, start=1)]
    times = Counter(source.name for source in sources)
    sources = [
        _renamed(source, one) if times[source.name] > 1 and not isinstance(one, Table) else source
        for source, one in zip(sources, several, strict=True)
    ]
    if not any(len(source.table) for source in sources):
        raise InputError("no rows to report; give the output folder of `transect measure` or a table with rows")
    return sources


def _read(one: Given, number: int) -> Source:
    if isinstance(one, Table):
        return Source(f"table {number}", one)
    path = Path(one)
    folder = path if path.is_dir() else path.parent
    config = _record(folder / "config.json")
    table = _so_far(path) if config.get("kind") == _TRAINING else Table.read(path)
    return Source(folder.resolve().name, table, config, _record(folder / "environment.json"))


def _so_far(path: Path) -> Table:
    """The rows of a training run, which may be at work: a last line that is not whole yet is left out."""
    lines = path / "rows.jsonl"
    if not lines.is_file() or (path / "rows.parquet").is_file():
        return Table.read(path)
    whole = lines.read_text(encoding="utf-8").rpartition("\n")[0]
    try:
        return Table(Row(**{"value": None, **json.loads(line)}) for line in whole.splitlines())
    except (TypeError, ValueError) as error:
        raise InputError(f"{lines} is not a table of rows: {str(error).splitlines()[0]}") from error


def _renamed(source: Source, path: str | os.PathLike[str]) -> Source:
    """A training run with the name of the folder above before its own, which another has too."""
    if source.config.get("kind") != _TRAINING:
        return source
    name = f"{Path(path).resolve().parent.name}/{source.name}"
    return replace(source, name=name, table=source.table.stamped(run=name))


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON: {str(error).splitlines()[0]}; mend or remove it") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a {type(record).__name__}, not an object with names; mend or remove it")
    return record
