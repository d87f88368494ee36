"""Data sets of tasks: a YAML file says where the records are and how a record becomes texts; users write their own."""

import difflib
import json
import re
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field

from transect.config import Config, read_mapping
from transect.errors import InputError
from transect.tasks import _builtin, _records
from transect.tasks._records import Record

FOLDER = Path(__file__).parent / "sets"
SUFFIXES = (".yaml", ".yml")
Kind = Literal["options", "minimal_pairs", "cloze", "labelled"]


def _cleaned(text: str) -> str:
    """HellaSwag's text without the marks of its source, as lm-evaluation-harness 0.4 has it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _bucket(record: Record, count: int) -> int:
    """A number from 0 to count - 1 that follows from the record alone."""
    text = json.dumps(record, sort_keys=True, default=str)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % count


_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_ENVIRONMENT.filters.update(cleaned=_cleaned, bucket=_bucket)


class Layout(Config):
    """How a record of one layout is read; every value is a Jinja template (`{{ name }}`) or an expression over
    its fields, `this` being the record; filters beside Jinja's own: `cleaned` (HellaSwag's text), `bucket(n)` (a hash).

    when: an expression that holds for records of this layout. keep: an expression; records for which it does not hold
    are left out. Options: context, a template, or contexts, an expression giving one for each option; options, an
    expression giving their texts; gold, the index of the right one, its label among `labels`, or its text. Minimal
    pairs: good and bad, templates. Cloze: text, a template whose last word is asked for. Labelled: text and, of pairs,
    second, templates; label, an expression; of choices: options and gold. group: an expression; records that share
    it are never split over training and test.
    """

    when: str = "true"
    keep: str = "true"
    context: str | None = None
    contexts: str | None = None
    options: str | None = None
    labels: str | None = None
    gold: str | None = None
    good: str | None = None
    bad: str | None = None
    text: str | None = None
    second: str | None = None
    label: str | None = None
    group: str | None = None


class DataSet(Config):
    """Where the records of a data set are, and how they are read.

    kind: which task reads it. files: file names or patterns by split, the first that is there counts; `builtin:NAME` is
    text made of what the package brings, `hf:NAME:CONFIG:SPLIT` a Hugging Face data set. several: each file that fits
    the pattern is a set of its own. splits: expressions; of a file that several splits share, the records of each.
    beside: files beside those of a split that hold a label a line, for records without `label`. columns: of tables
    without a head line. delimiter: between context and option. shot_delimiter: between examples. unconditional: what
    stands before an option whose own probability is wanted.
    """

    name: str
    description: str
    source: str
    licence: str = ""
    kind: Kind
    files: dict[str, list[str]]
    splits: dict[str, str] = Field(default_factory=dict)
    beside: dict[str, str] = Field(default_factory=dict)
    columns: list[str] = Field(default_factory=list)
    several: bool = False
    layouts: list[Layout] = Field(min_length=1)
    delimiter: str = " "
    shot_delimiter: str = "\n\n"
    unconditional: str = ""

    def records(self, split: str, folders: Sequence[Path]) -> list[Record]:
        """The records of a split; raises NotAtHand where its file is not there, InputError for an unknown split."""
        if split not in self.files:
            raise InputError(f"{self.name} has no split {split!r}; it has {', '.join(self.files)}")
        found = self._all(split, folders)
        if split not in self.splits:
            return found
        where = f"a record of {self.name}"
        return [record for record in found if _evaluate(self.splits[split], record, where)]

    def _all(self, split: str, folders: Sequence[Path]) -> list[Record]:
        patterns = self.files[split]
        if patterns[0].startswith("builtin:"):
            return _builtin.records(patterns[0].removeprefix("builtin:"), split)
        if patterns[0].startswith("hf:"):
            return _records.hugging_face(patterns[0])
        file = _records.found(patterns, folders, self.name)
        records = _records.read(file, self.columns)
        labels = file.with_name(self.beside[split]) if split in self.beside else None
        if labels is None or not labels.is_file() or not records or "label" in records[0]:
            return records
        lines = labels.read_text(encoding="utf-8").split()
        if len(lines) != len(records):
            raise InputError(
                f"{labels} has {len(lines)} labels for the {len(records)} records of {file}; give one each"
            )
        return [record | {"label": label} for record, label in zip(records, lines, strict=True)]

    def read(self, record: Record, number: int) -> dict[str, Any]:
        """The record by the first layout that fits: what each template and expression gives; empty if it is left out.

        Raises InputError naming the record and what is missing.
        """
        where = f"record {number} of {self.name}"
        layout = next((one for one in self.layouts if _holds(one.when, record)), None)
        if layout is None:
            raise InputError(f"{where} fits no layout of the set; it has the fields {', '.join(record)}")
        if not _evaluate(layout.keep, record, where):
            return {}
        made: dict[str, Any] = {}
        for name in ("context", "good", "bad", "text", "second"):
            template = getattr(layout, name)
            if template is not None:
                made[name] = _filled(template, record, where)
        for name in ("contexts", "options", "labels", "gold", "label", "group"):
            expression = getattr(layout, name)
            if expression is not None:
                made[name] = _evaluate(expression, record, where)
        return made


def data_set(given: str, kind: Kind) -> DataSet:
    """The data set of a shipped name or a YAML file; raises InputError for an unknown one, or one of another kind."""
    if given.endswith(SUFFIXES):
        path = Path(given)
        if not path.is_file():
            raise InputError(f"no data set file {given}; give a YAML file or a name: {', '.join(names())}")
        made = _parsed(path)
    else:
        if given not in names():
            close = difflib.get_close_matches(given, names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            known = ", ".join(name for name in names() if _parsed(_file(name)).kind == kind)
            raise InputError(f"unknown data set {given!r}{hint}; of {kind} there are {known}; or give a YAML file")
        made = _parsed(_file(given))
    if made.kind != kind:
        raise InputError(f"{given} is a set of {made.kind}, not of {kind}; give it to a task that reads such sets")
    return made


def names() -> tuple[str, ...]:
    """The names of the shipped data sets."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def described() -> dict[str, str]:
    """Each shipped data set with its kind and a sentence."""
    return {name: f"[{(one := _parsed(_file(name))).kind}] {one.description}" for name in names()}


def _file(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


@cache
def _parsed(path: Path) -> DataSet:
    return DataSet.parse({"name": path.stem} | read_mapping(path), root=str(path.name))


@cache
def _expression(text: str) -> Any:
    return _ENVIRONMENT.compile_expression(text, undefined_to_none=False)


@cache
def _template(text: str) -> Any:
    return _ENVIRONMENT.from_string(text)


def _holds(expression: str, record: Record) -> bool:
    try:
        return bool(_expression(expression)(record, this=record))
    except (TemplateError, TypeError, KeyError):
        return False


def _evaluate(expression: str, record: Record, where: str) -> Any:
    try:
        value = _expression(expression)(record, this=record)
        if isinstance(value, StrictUndefined):
            str(value)
        return value
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{where}: {expression!r} cannot be read: {error}; mend the record or the set's layout"
        ) from error


def _filled(template: str, record: Record, where: str) -> str:
    try:
        return _template(template).render(record, this=record)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{where}: {template!r} cannot be filled: {error}; mend the record or its layout") from error
