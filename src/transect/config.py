"""The base of every setting: frozen, checked, written as YAML, changed by `a.b=value`; a mistake is one line."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from transect.errors import InputError


class Config(BaseModel):
    """Settings that cannot be changed once made; an unknown key is refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @classmethod
    def parse(cls, given: Mapping[str, Any], root: str = "") -> Self:
        """The settings in a mapping; raises InputError with the field's path, the value and what is allowed."""
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise InputError(_line(cls, error.errors(), root)) from error

    def but(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again; raises InputError as `parse` does."""
        return self.parse(self.plain() | changes)

    def plain(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, numbers and words; `parse` gives the same settings back."""
        return self.model_dump(mode="json")

    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when any setting does; defaults written out or not do not matter."""
        text = json.dumps(self.plain(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The settings as YAML; read back, they are equal."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=110)


class _Reader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-5 is a number, as everyone means it to be."""


_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.nan$"),
    list("-+0123456789."),
)


def read_yaml(text: str, source: str) -> Any:
    """What a YAML or JSON text says; raises InputError with the line where it cannot be read."""
    try:
        return yaml.load(text, _Reader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"cannot read {source}{where}: {getattr(error, 'problem', error)}; it must be YAML") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; raises InputError when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    found = read_yaml(text, str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; it must hold settings, as in 'width: 128'")
    return found


def with_settings(given: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The mapping with `a.b=value` applied; values are YAML, so numbers, words and lists such as [1, 3].

    Raises InputError for a setting without `=` or below something that is not a mapping.
    """
    changed = json.loads(json.dumps(given))
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise InputError(f"--set {setting!r} does not fit; write path=value, as in model.width=256")
        *above, last = path.split(".")
        here: Any = changed
        for step in above:
            below = here.setdefault(step, {})
            if isinstance(below, str):  # the short form of a plug-in without options
                below = here[step] = {"kind": below}
            if not isinstance(below, dict):
                raise InputError(f"--set {setting!r}: {step!r} is {below!r} and has no settings below it")
            here = below
        value = read_yaml(text, f"--set {setting}")
        if last == "kind" and here.get("kind") != value:  # another plug-in does not have the options of this one
            here.clear()
        here[last] = value
    return changed


def misfit(where: str | Sequence[str | int], given: Any, why: str) -> PydanticCustomError:
    """An error of a validator that names a field below its own, the value and what is allowed."""
    path = where.split(".") if isinstance(where, str) else list(where)
    return PydanticCustomError("misfit", "{why}", {"why": why, "where": [p for p in path if p != ""], "given": given})


def inner_misfit(kind: type[BaseModel], error: ValidationError, above: str = "") -> PydanticCustomError:
    """A nested validation's first error, with its path kept, below the path `above`."""
    where, given, why = _said(kind, error.errors()[0])
    return misfit([*above.split("."), *where], given, why)


def _line(kind: type[BaseModel], errors: Sequence[ErrorDetails], root: str) -> str:
    where, given, why = _said(kind, errors[0])
    others = [_said(kind, error) for error in errors[1:]]  # the other branches of a union
    why = " or ".join(dict.fromkeys([why, *(reason for path, _, reason in others if path == where)]))
    path = ".".join(str(step) for step in ([root] if root else []) + where) or "settings"
    shown = "" if given is _ABSENT else f" is {_short(given)}:"
    return f"{path}{shown} {why}"


_ABSENT = object()


def _said(kind: type[BaseModel], error: ErrorDetails) -> tuple[list[str | int], Any, str]:
    """The path, the value (or `_ABSENT`) and the reason of one error."""
    where, given = _path(kind, error["loc"]), error["input"]
    context = error.get("ctx", {})
    if error["type"] == "misfit":
        return where + list(context["where"]), context["given"], context["why"]
    if error["type"] == "extra_forbidden":
        known = _fields_at(kind, where[:-1])
        close = difflib.get_close_matches(str(where[-1]), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else (f"; known are {', '.join(known)}" if known else "")
        return where, _ABSENT, f"is not a setting{hint}"
    if error["type"] == "missing":
        return where, _ABSENT, "is not given and has no default"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return where, given, message


def _path(kind: type[BaseModel], steps: Sequence[str | int]) -> list[str | int]:
    """The steps without the names of a union's branches, which pydantic puts between them."""
    kept: list[str | int] = []
    here: Any = kind
    for step in steps:
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(str(step))
            here = None if field is None else field.annotation
        elif isinstance(step, int) or get_origin(here) is dict:
            here = next(reversed(get_args(here)), None)
        else:
            continue
        kept.append(step)
    return kept


def _fields_at(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The fields of the settings at a path below `kind`; nothing where the path leads through a plug-in."""
    here: Any = kind
    for step in path:
        field = here.model_fields.get(str(step)) if isinstance(here, type) and issubclass(here, BaseModel) else None
        if field is None:
            return []
        here = field.annotation
    if isinstance(here, type) and issubclass(here, BaseModel):
        return list(here.model_fields)
    return []


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."
