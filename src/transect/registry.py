"""File name = public name: a plug-in is the one concrete class of its kind defined in a module of a package."""

import difflib
import importlib
import inspect
import pkgutil
from typing import TypeVar

from transect.errors import InputError

Plugin = TypeVar("Plugin")


def available(package: str) -> tuple[str, ...]:
    """Names of a package's modules, not imported; `base` and names with an underscore are not plug-ins."""
    path = importlib.import_module(package).__path__
    names = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in names if name != "base" and not name.startswith("_")))


def load(package: str, name: str, base: type[Plugin]) -> type[Plugin]:
    """The class called `name`: a module of the package, or `package.module:Class` from anywhere.

    Raises InputError for an unknown name, with the nearest known one, and TypeError when the module does not define
    exactly one concrete subclass of `base`.
    """
    if ":" in name:
        return _outside(name, base)
    known = available(package)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"unknown {_singular(package.rpartition('.')[2])} {name!r}; known are {', '.join(known)}{hint}"
        )
    module = importlib.import_module(f"{package}.{name}")
    found = [item for item in vars(module).values() if _is_plugin(item, base) and item.__module__ == module.__name__]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one concrete {base.__name__}, it defines {len(found)}")
    return found[0]


def _singular(package: str) -> str:
    return f"{package[:-3]}y" if package.endswith("ies") else package.removesuffix("s")


def _outside(name: str, base: type[Plugin]) -> type[Plugin]:
    path, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot load {name!r}: {error}; give package.module:Class") from error
    if not _is_plugin(found, base):
        raise InputError(f"{name!r} is not a concrete {base.__name__}; give a class derived from it")
    return found


def _is_plugin(item: object, base: type) -> bool:
    return isinstance(item, type) and issubclass(item, base) and not inspect.isabstract(item)
