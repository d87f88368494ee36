"""Suites: lists of tasks, as YAML files that come with the package or that a user writes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from transect import registry
from transect.config import read_mapping
from transect.errors import InputError
from transect.tasks.base import Task

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
TASKS = "transect.tasks"


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks in the order in which they are done; of a suite, data that are not at hand are passed over."""

    name: str
    description: str
    tasks: tuple[Task, ...]


def names() -> tuple[str, ...]:
    """The names of the suites that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def described() -> dict[str, str]:
    """Each of them with a sentence."""
    return {name: str(read_mapping(FOLDER / f"{name}.yaml")["description"]) for name in names()}


def load(given: str, settings: Sequence[str] = ()) -> Suite:
    """The suite of a name or a YAML file, with `task.option=value` applied to every task of that name.

    A file has `description` and `tasks`, a list of mappings: `task`, and options of that task by name. Raises
    InputError for an unknown name, task or option, and for values that do not fit.
    """
    if given.endswith(SUFFIXES):
        path = Path(given)
        if not path.is_file():
            raise InputError(f"no suite file {given}; give a YAML file or one of {', '.join(names())}")
    elif given in names():
        path = FOLDER / f"{given}.yaml"
    else:
        close = difflib.get_close_matches(given, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"unknown suite {given!r}; there are {', '.join(names())}, or give a YAML file{hint}")
    content = read_mapping(path)
    unknown = sorted(set(content) - {"description", "tasks"})
    listed = content.get("tasks")
    if unknown or not isinstance(listed, list) or not listed:
        raise InputError(
            f"{path.name}: a suite has a description and a list of tasks" + f", no {unknown[0]!r}" * bool(unknown)
        )
    made = []
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict) or not isinstance(entry.get("task"), str):
            raise InputError(f"{path.name}: tasks.{number} has no `task`; name one of {', '.join(_known())}")
        made.append((entry["task"], {name: value for name, value in entry.items() if name != "task"}))
    return Suite(path.stem, str(content.get("description", "")), configured(made, settings))


def single(entries: Sequence[str], settings: Sequence[str] = ()) -> tuple[Task, ...]:
    """The tasks of `TASK[:DATA]` words, with settings applied; raises InputError as `load` does."""
    split = (entry.partition(":") for entry in entries)
    return configured([(name, {"data": data} if data else {}) for name, _, data in split], settings)


def configured(entries: Sequence[tuple[str, Mapping[str, Any]]], settings: Sequence[str]) -> tuple[Task, ...]:
    """The tasks with their options and the settings that name them."""
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        name, dot, option = path.partition(".")
        if not equals or not dot:
            raise InputError(f"--set {setting!r} does not fit; write task.option=value, as in options.shots=5")
        if name not in {entry for entry, _ in entries}:
            done = ", ".join(dict.fromkeys(entry for entry, _ in entries))
            raise InputError(f"--set {setting!r}: task {name!r} is not among those to do: {done}")
        try:
            changes.setdefault(name, {})[option] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(
                f"cannot read the value {text!r} of --set {setting}; write a number, word or list"
            ) from error
    return tuple(make(name, {**options, **changes.get(name, {})}) for name, options in entries)


def make(name: str, options: Mapping[str, Any]) -> Task:
    """The task with these options; raises InputError for an unknown task or option, or a value that does not fit."""
    kind = registry.load(TASKS, name, Task)
    word = name.rpartition(":")[2]
    known = {field.name: field for field in fields(kind)}
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{word} has no option {option!r}; its options are {', '.join(known)}{hint}")
    for field in known.values():
        if field.default is MISSING and field.default_factory is MISSING and field.name not in options:
            raise InputError(
                f"{word} needs {field.name}; write {word}:DATA, `transect show {word}` tells which there are"
            )
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(own := first.get("ctx", {}).get("error"), InputError):
            raise own from error
        where = ".".join(str(part) for part in first["loc"][:1]) or "options"
        raise InputError(f"{word}.{where}: {first['msg']}, given {first['input']!r}") from error


def _known() -> tuple[str, ...]:
    return registry.available(TASKS)
