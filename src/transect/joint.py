"""The folder of several runs: a run folder for each, and beside these the rows of all with their common record."""

import json
from pathlib import Path
from typing import Any

from transect.errors import InputError
from transect.results import Table, make_folder, write_whole
from transect.series import Series

_ROWS = ("rows.jsonl", "rows.parquet")
_RECORDS = ("config.json", "environment.json")


def check_folder(folder: Path, series: Series, resume: bool) -> None:
    """Make the folder that is to hold a series.

    Raises InputError when it holds anything but the same runs, when it holds these and `resume` is not asked for, or
    when it cannot be written to.
    """
    known = {member.folder.split("/")[0] for member in series.members} | {*_ROWS, *_RECORDS}
    held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    strange = [name for name in held if name not in known and not name.endswith(".partial")]
    if not strange and (folder / "config.json").is_file() and "runs" not in _read(folder / "config.json"):
        strange = ["config.json of a single run"]
    if strange:
        raise InputError(f"{folder} holds {strange[0]}, which is none of these runs; give a new or empty folder")
    if held and not resume:
        raise InputError(f"{folder} already holds runs; give another folder, or --resume to go on with them")
    make_folder(folder)
    for left in folder.glob(".*.partial"):
        left.unlink(missing_ok=True)


def withdraw(folder: Path, series: Series) -> None:
    """Take back the folders that stayed empty because nothing could be measured."""
    made = {folder / member.folder.split("/")[0] for member in series.members}
    for empty in (*made, folder):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def write_joint(folder: Path, series: Series, table: Table) -> None:
    """Write the rows of all runs, and what their settings and environments have in common and apart."""
    table.write(folder)
    for name in _RECORDS:
        records = {member.folder: _read(folder / member.folder / name) for member in series.members}
        write_whole(folder / name, (json.dumps(_joined(records), indent=2) + "\n").encode())


def _joined(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What all records say once; what they say differently under `runs`, for each folder."""
    every = list(records.values())
    common = {key: value for key, value in every[0].items() if all(one.get(key) == value for one in every)}
    common["notes"] = list(dict.fromkeys(note for one in every for note in one.get("notes", [])))
    if "date" in every[0]:
        common["date"] = max(one["date"] for one in every)
        common["seconds"] = round(sum(one["seconds"] for one in every), 1)
    apart = {
        folder: {key: value for key, value in one.items() if key not in common or one[key] != common[key]}
        for folder, one in records.items()
    }
    return {**common, "runs": [{"folder": folder, **rest} for folder, rest in apart.items()]}


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged; give another folder") from error
    return record if isinstance(record, dict) else {}
