"""Documents out of text files, gzip files, JSON Lines, Parquet and folders of them."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from transect.errors import InputError


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files of the paths in the order given; a folder stands for its visible files, sorted, with subfolders.

    Raises InputError for a path that does not exist and for a folder without files.
    """
    for path in paths:
        if path.is_file():
            yield path
        elif path.is_dir():
            found = sorted(inner for inner in path.rglob("*") if inner.is_file() and not _hidden(inner, path))
            if not found:
                raise InputError(f"folder {path} has no files; give text, .jsonl or .parquet files")
            yield from found
        else:
            raise InputError(f"no file or folder {path}; give text, .jsonl or .parquet files, or a folder of them")


def documents(file: Path) -> Iterator[str]:
    """The text of each document: the whole file, or each record's `text` that is not blank.

    Raises InputError when the file cannot be read, is not UTF-8, is blank, or a record has no text.
    """
    return (text for text, _ in records(file))


def records(file: Path, text: str = "text", label: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Each document with its label: columns `text` and `label` of its record; a text file is one without a label.

    Raises InputError as `documents` does, and when a record has no label where one is asked for.
    """
    name = file.name.lower()
    with _readable(file):
        if name.endswith(".parquet"):
            yield from _parquet(file, text, label)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _records(file, text, label)
        else:
            with _open(file) as handle:
                content = handle.read()
            if not content.strip():
                raise InputError(f"{file} is empty; give a file with text")
            yield content, None


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it ends early"
        raise InputError(f"cannot read {file}: {reason.splitlines()[0]}; give another file") from error


def _open(file: Path) -> TextIO:
    # utf-8-sig: a byte order mark is not text and would become a token.
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _records(file: Path, column: str, label: str | None) -> Iterator[tuple[str, str | None]]:
    with _open(file) as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"line {number} of {file} is not JSON; give one JSON record a line") from error
            text = record.get(column) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise InputError(
                    f'line {number} of {file} has no "{column}" string; give records {{"{column}": "..."}}'
                )
            if text.strip():
                yield text, label_of(record, label, f"line {number} of {file}")


def label_of(record: dict, label: str | None, where: str) -> str | None:
    """The record's label as text; raises InputError when it has none that is a word or a whole number."""
    if label is None:
        return None
    value = record.get(label)
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value).strip():
        raise InputError(f'{where} has no label in "{label}"; give every record one, or another --domain-column')
    return str(value).strip()


def _parquet(file: Path, column: str, label: str | None) -> Iterator[tuple[str, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise InputError(f"{file} is not a Parquet file; give another file") from error
    with table:
        for name, what in ((column, "text"), (label, "label")):
            if name is not None and name not in table.schema_arrow.names:
                raise InputError(f'{file} has no column "{name}"; rename the column of the {what}')
        columns = [column] if label is None else [column, label]
        for batch in table.iter_batches(columns=columns, batch_size=1024):
            for record in batch.to_pylist():
                text = record[column]
                if not isinstance(text, str):
                    raise InputError(f'{file} has a record without a "{column}" string; remove it')
                if text.strip():
                    yield text, label_of(record, label, f"a record of {file}")
