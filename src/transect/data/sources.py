"""Where documents come from: files, folders, the text that comes with the package, and Hugging Face data sets."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transect.data.card import SPLITS
from transect.data.reading import files, label_of, records
from transect.errors import InputError
from transect.results import whole_file

_BOTH = "train+valid"
_ENDINGS = (".gz", ".txt", ".jsonl", ".json", ".parquet")
_SOTU = "sotu"
_SOTU_LATER = 1950  # the first year of the out-of-distribution speeches
Record = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a record."""

    text: str = "text"
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What is read, and can be unreadable, as one: a file or a data set.

    split None: train or valid, by the hash of each text. size: bytes or records where they are known; with the name,
    it tells whether the text is still the one that was read before.
    """

    name: str
    split: str | None
    domain: str
    size: int | None
    open: Callable[[], Iterator[Record]]

    def read(self) -> Iterator[tuple[str, str]]:
        """Each document's text and domain."""
        return ((text, self.domain if label is None else label) for text, label in self.open())


def units(sources: Sequence[str], columns: Columns, stream: bool, spool: Path) -> list[Unit]:
    """The units of `[SPLIT/DOMAIN=]PATH`, `builtin` and `hf:NAME[:CONFIG[:SPLIT]]` in the order given.

    A streamed data set is kept in the folder `spool` once it was read. Raises InputError for a source that is not
    there or not well written.
    """
    found: list[Unit] = []
    for number, source in enumerate(sources):
        split, domain, path = _parse(source)
        if path == "builtin":
            found += _builtin(source)
        elif path.startswith("hf:"):
            kept = spool / f"stream-{number}.jsonl.gz" if stream else None
            found.append(_hugging_face(path, split, domain, columns, kept))
        else:
            found += _on_disk(Path(path), split, domain, columns)
    _refuse_twice(found)
    return found


def _parse(source: str) -> tuple[str | None, str | None, str]:
    """Split, domain and path; a path that exists is a path, whatever signs it has."""
    head, equals, path = source.partition("=")
    if not equals or source.startswith("hf:") or Path(source).exists():
        return None, None, source
    split, slash, domain = head.partition("/")
    if split not in (*SPLITS, _BOTH) or (slash and not domain.strip()) or not path:
        raise InputError(
            f"source {source!r} does not fit; write SPLIT/DOMAIN=PATH with the split train, valid, ood or {_BOTH}, "
            "as in ood/law=law.jsonl"
        )
    return None if split == _BOTH else split, domain.strip() or None, path


def _on_disk(path: Path, split: str | None, domain: str | None, columns: Columns) -> list[Unit]:
    label = domain or _stem(path)

    def unit(file: Path) -> Unit:
        return Unit(str(file), split, label, _size(file), lambda: records(file, columns.text, columns.domain))

    return [unit(file) for file in files([path])]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; give another file") from error


def _stem(path: Path) -> str:
    name = path.resolve().name
    if path.is_file():
        while name.lower().endswith(_ENDINGS) and "." in name[1:]:
            name = name[: name.rindex(".")]
    return name or "text"


def _builtin(source: str) -> list[Unit]:
    if source != "builtin":
        raise InputError(f"source {source!r} does not fit; write `builtin` alone, its splits and domains are known")
    file = Path(__file__).with_name("sotu.jsonl.gz")

    def speeches(later: bool) -> Iterator[Record]:
        with gzip.open(file, "rt", encoding="utf-8") as handle:
            for line in handle:
                record = json.loads(line)
                if (int(record["title"][:4]) >= _SOTU_LATER) == later:
                    yield record["text"], None

    size = file.stat().st_size
    return [
        Unit("builtin, speeches before 1950", None, _SOTU, size, lambda: speeches(False)),
        Unit("builtin, speeches from 1950", "ood", f"{_SOTU}_{_SOTU_LATER}", size, lambda: speeches(True)),
    ]


def open_dataset(path: str) -> Any:
    """The rows of `hf:NAME[:CONFIG[:SPLIT]]`; raises InputError where they cannot be had."""
    return _load(path, _which(path), stream=False)


def _which(path: str) -> tuple[str, str, str]:
    name, config, part = [*path.removeprefix("hf:").split(":"), "", ""][:3]
    if not name or path.count(":") > 3:
        raise InputError(f"source {path!r} does not fit; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return name, config, part


def _hugging_face(path: str, split: str | None, domain: str | None, columns: Columns, kept: Path | None) -> Unit:
    name, config, part = _which(path)
    label = domain or Path(name).name
    if kept is not None:
        return Unit(path, split, label, None, lambda: _streamed(path, (name, config, part), columns, kept))
    data = _load(path, (name, config, part), stream=False)
    return Unit(path, split, label, data.num_rows, lambda: _rows(path, data, columns))


def _load(path: str, which: tuple[str, str, str], stream: bool) -> Any:
    try:
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f'{path} needs the package datasets; run pip install "transect[data]"') from error
    name, config, part = which
    part = part or "train"
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            found = load_from_disk(name)
            if isinstance(found, DatasetDict):
                found = found[part]
            return found if not stream or not isinstance(found, Dataset) else found.to_iterable_dataset()
        return load_dataset(name, config or None, split=part, streaming=stream)
    except Exception as error:  # the library raises its own, the network's and the file system's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot open {path}: {reason}; give hf:NAME[:CONFIG[:SPLIT]]") from error


def _rows(path: str, data: Any, columns: Columns) -> Iterator[Record]:
    rows = iter(data)
    for number in range(1 << 62):
        try:
            row = next(rows, None)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"cannot read record {number} of {path}: {reason}; run again to go on") from error
        if row is None:
            return
        text = row.get(columns.text)
        if not isinstance(text, str):
            raise InputError(
                f'record {number} of {path} has no "{columns.text}" string; give --text-column, one of {", ".join(row)}'
            )
        if text.strip():
            yield text, label_of(row, columns.domain, f"record {number} of {path}")


def _streamed(path: str, which: tuple[str, str, str], columns: Columns, kept: Path) -> Iterator[Record]:
    """The records from the network, the first time, and from then on those that were kept."""
    if kept.is_file():
        yield from records(kept, "text", "label" if columns.domain else None)
        return
    with whole_file(kept) as partial, gzip.open(partial, "wt", encoding="utf-8", compresslevel=1) as out:
        for text, label in _rows(path, _load(path, which, stream=True), columns):
            out.write(json.dumps({"text": text, "label": label}) + "\n")
            yield text, label


def _refuse_twice(found: list[Unit]) -> None:
    seen: dict[str, Unit] = {}
    for unit in found:
        other = seen.setdefault(unit.name, unit)
        if other is not unit:
            raise InputError(f"{unit.name} is given twice; leave one of the two out")
