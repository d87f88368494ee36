"""Probe options from the command line: `probe.option=value`, checked against the probe's fields."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import yaml
from pydantic import TypeAdapter, ValidationError

from transect import registry
from transect.errors import InputError
from transect.probes.base import Probe


def configured(names: Iterable[str], settings: Sequence[str]) -> list[Probe]:
    """The named probes with the settings applied; raises InputError for what does not fit, in one line."""
    classes = {name: registry.load("transect.probes", name, Probe) for name in names}
    values: dict[str, dict[str, object]] = {name: {} for name in classes}
    for setting in settings:
        path, equals, text = setting.partition("=")
        name, dot, option = path.rpartition(".")
        if not equals or not dot:
            raise InputError(f"--set {setting!r} does not fit; write probe.option=value, as in nonlinearity.ridge=0")
        if name not in classes:
            raise InputError(f"--set {setting!r}: probe {name!r} is not measured; measured are {', '.join(classes)}")
        _check_option(classes[name], name, option)
        values[name][option] = _parsed(text)
    return [_made(classes[name], name, given) for name, given in values.items()]


def made(name: str, given: Mapping[str, object]) -> Probe:
    """The probe with these options; raises InputError for an unknown probe or option, or a value that does not fit."""
    kind = registry.load("transect.probes", name, Probe)
    for option in given:
        _check_option(kind, name, option)
    return _made(kind, name, dict(given))


def _check_option(kind: type[Probe], name: str, option: str) -> None:
    known = [field.name for field in fields(kind)]
    if option not in known:
        close = difflib.get_close_matches(option, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"{name} has no option {option!r}; its options are {', '.join(known)}{hint}")


def _parsed(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"cannot read the value {text!r}; write a number, a word or a list such as [ffn, attn]"
        ) from error


def _made(kind: type[Probe], name: str, given: dict[str, object]) -> Probe:
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1]) or "options"
        raise InputError(f"{name}.{where}: {first['msg']}, given {first['input']!r}") from error
