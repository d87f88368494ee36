"""Whether a checkpoint is what was written: `checkpoint.json` has size and checksum of every file, and of itself."""

import json
import os
import re
from collections.abc import Callable, Iterable
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from transect.errors import InputError

MANIFEST = "checkpoint.json"
FORMAT = 1
_STEP = re.compile(r"step-([0-9]{8,})")


class Damaged(InputError):
    """A file of a checkpoint is not what was written; the message names it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"checkpoint {path} {why}")


def digest(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its blake2b (256 bits, hexadecimal)."""
    with path.open("rb") as file:
        mark = file_digest(file, lambda: blake2b(digest_size=32))
        return {"size": file.tell(), "blake2b": mark.hexdigest()}


def write_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Write checkpoint.json through to the disk, with a checksum of its own. Raises OSError."""
    record = {"format": FORMAT, **record}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**record, "blake2b": _mark(record)}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What checkpoint.json says; raises Damaged where it is missing, cut or edited."""
    path = folder / MANIFEST
    if not path.is_file():
        raise Damaged(path, "is missing")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        mark = record.pop("blake2b")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(path, "is damaged: it cannot be read") from error
    if mark != _mark(record):
        raise Damaged(path, "is damaged: it is not what was written")
    if record["format"] != FORMAT:
        raise InputError(
            f"{path} has format {record['format']}, this version reads {FORMAT}; use the one that wrote it"
        )
    return record


def check_files(folder: Path, record: dict[str, Any], names: Iterable[str]) -> None:
    """Raise Damaged for the first of the named files that is not what was written. Cost: reads them whole."""
    for name in names:
        path, written = folder / name, record["files"][name]
        if not path.is_file():
            raise Damaged(path, "is missing")
        size = path.stat().st_size
        if size != written["size"]:
            raise Damaged(path, f"is damaged: it has {size} bytes, {written['size']} were written")
        if digest(path) != written:
            raise Damaged(path, "is damaged: its content is not what was written")


def check_strangers(folder: Path, record: dict[str, Any]) -> None:
    """Raise Damaged for a file of tensors that was put in later; it would be read with the others."""
    for path in sorted(folder.glob("state/*/*.safetensors")):
        if path.relative_to(folder).as_posix() not in record["files"]:
            raise Damaged(path, "is not of this checkpoint: remove it")


def check(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """What checkpoint.json says, once it and the wanted files are known to be what was written; raises Damaged."""
    record = read_manifest(folder)
    check_strangers(folder, record)
    check_files(folder, record, sorted(filter(wanted, record["files"])))
    return record


def whole_before(folder: Path) -> Path | None:
    """The nearest undamaged checkpoint of the same run with a lower step; None where there is none. Reads them."""
    own = _STEP.fullmatch(folder.name)
    if own is None:
        return None
    beside = {int(found[1]): path for path in folder.parent.iterdir() if (found := _STEP.fullmatch(path.name))}
    for step in sorted((step for step in beside if step < int(own[1])), reverse=True):
        try:
            check(beside[step])
        except InputError:
            continue
        return beside[step]
    return None


def _mark(record: dict[str, Any]) -> str:
    return blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()
