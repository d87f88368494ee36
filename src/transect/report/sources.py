"""What a report reads: tables of rows, and the run record beside them."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transect.errors import InputError
from transect.results import Table

Given = str | os.PathLike[str] | Table
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
    if not any(len(source.table) for source in sources):
        raise InputError("no rows to report; give the output folder of `transect measure` or a table with rows")
    return sources


def _read(one: Given, number: int) -> Source:
    if isinstance(one, Table):
        return Source(f"table {number}", one)
    path = Path(one)
    folder = path if path.is_dir() else path.parent
    table = Table.read(path)
    return Source(folder.resolve().name, table, _record(folder / "config.json"), _record(folder / "environment.json"))


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
