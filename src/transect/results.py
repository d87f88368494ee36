"""Row and Table: one number with its unit, count, error and provenance; JSON Lines while running, Parquet after."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transect.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from transect.metrics.errors import Error


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One number, or one number's absence with the reason.

    `value` is None exactly when `reason` is given. `stderr`, `low` and `high` (95 %) are None when no error was
    estimated. `layer` and `layer_to` are 0-based. Raises ValueError for NaN, infinity, or both a value and a reason.
    """

    metric: str
    value: float | None
    unit: str
    study: str | None = None
    run: str | None = None
    model: str | None = None
    revision: str | None = None
    step: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    flops: float | None = None
    probe: str | None = None
    layer: int | None = None
    layer_to: int | None = None
    site: str | None = None
    element: str | None = None
    part: str | None = None
    domain: str | None = None
    task: str | None = None
    edit: str | None = None
    variant: str | None = None
    reason: str | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    documents: int | None = None
    split: str | None = None
    dtype: str | None = None
    seed: int | None = None
    data: str | None = None
    config: str | None = None
    code: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"row {self.metric!r}: give a value or the reason for its absence, not both or neither")
        for name in ("value", "stderr", "low", "high"):
            number = getattr(self, name)
            if number is not None and type(number) not in (float, int):  # a saved state holds plain numbers only
                raise ValueError(f"row {self.metric!r}: {name} is a {type(number).__name__}; give a float")
            if number is not None and not math.isfinite(number):
                raise ValueError(f"row {self.metric!r} layer {self.layer}: {name} is {number}; give None and a reason")

    def measured(self, value: float, error: "Error | None" = None) -> "Row":
        """The same row with a value and the error that was estimated for it, if any."""
        stderr, low, high = (None, None, None) if error is None else (error.stderr, error.low, error.high)
        return replace(self, value=value, reason=None, stderr=stderr, low=low, high=high)

    def missing(self, reason: str) -> "Row":
        """The same row without a value, for the reason given."""
        return replace(self, value=None, reason=reason, stderr=None, low=None, high=None)


COLUMNS: tuple[str, ...] = (
    "study", "run", "model", "revision", "step", "tokens", "seconds", "flops", "probe", "metric", "layer", "layer_to",
    "site", "element", "part", "domain", "task", "edit", "variant", "value", "reason", "unit", "stderr", "low", "high",
    "n", "documents", "split", "dtype", "seed", "data", "config", "code",
)  # fmt: skip
_INTEGERS = ("step", "tokens", "layer", "layer_to", "n", "documents", "seed")
_FLOATS = ("seconds", "flops", "value", "stderr", "low", "high")


class Table:
    """A list of rows that can be filtered, joined, written and read back."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows: list[Row] = list(rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: "Table") -> "Table":
        return Table([*self.rows, *other.rows])

    def where(self, keep: Callable[[Row], bool] | None = None, /, **equal: object) -> "Table":
        """The rows for which every named column equals the given value and `keep(row)` holds.

        Raises ValueError for a name that is not a column.
        """
        unknown = sorted(set(equal) - set(COLUMNS))
        if unknown:
            raise ValueError(f"unknown column {unknown[0]!r}; columns are {', '.join(COLUMNS)}")
        chosen = (row for row in self.rows if all(getattr(row, name) == value for name, value in equal.items()))
        return Table(row for row in chosen if keep is None or keep(row))

    def stamped(self, **columns: Any) -> "Table":
        """The same rows with the given columns set."""
        return Table(replace(row, **columns) for row in self.rows)

    def to_pandas(self) -> "pd.DataFrame":
        """A data frame with every column of `COLUMNS`; absent cells are missing, never 0."""
        import pandas as pd

        frame = pd.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))
        kinds = dict.fromkeys(COLUMNS, "string") | dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(_FLOATS, "Float64")
        return frame.astype(kinds)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write `rows.jsonl` and `rows.parquet` into the folder; each file appears whole or not at all."""
        folder = Path(folder)
        make_folder(folder)
        write_whole(folder / "rows.jsonl", "".join(to_line(row) for row in self.rows).encode())
        with whole_file(folder / "rows.parquet") as path:
            self.to_pandas().to_parquet(path, index=False)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write every column as CSV."""
        write_whole(Path(path), self.to_pandas().to_csv(index=False).encode())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Table":
        """Read a run folder, a `.jsonl` or a `.parquet` file written by `write`.

        Raises InputError when there are no rows at the path or a line is not a row.
        """
        path = Path(path)
        if path.is_dir():
            path = next((path / name for name in ("rows.parquet", "rows.jsonl") if (path / name).is_file()), path)
        if not path.is_file():
            raise InputError(f"no rows.jsonl or rows.parquet in {path}; give the output folder of `transect measure`")
        try:
            records = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
            return cls(Row(**record) for record in records)
        except (TypeError, ValueError, OSError) as error:
            raise InputError(f"{path} is not a table of rows: {str(error).splitlines()[0]}") from error


def to_line(row: Row) -> str:
    """One row as one line of JSON, absent columns left out."""
    record = asdict(row)
    return json.dumps({name: record[name] for name in COLUMNS if record[name] is not None}) + "\n"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    filled = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        filled.append({"value": None, **record})
    return filled


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def make_folder(folder: Path) -> None:
    """Create the folder; raises InputError when that is impossible or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; give another folder") from error


class whole_file:  # noqa: N801 - used as a verb in `with`
    """A path to write to that takes the final name only when the block ends without an exception."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all; raises InputError when the disk does not take it."""
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; make room or give another folder") from error


assert set(COLUMNS) == {field.name for field in fields(Row)}
