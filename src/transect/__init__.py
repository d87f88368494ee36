"""transect: measure what each part of a Transformer does, build what follows, pre-train it and judge it."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transect import data, probes
    from transect.errors import InputError
    from transect.measure import measure
    from transect.report import write_report
    from transect.results import Row, Table
    from transect.view import edits
    from transect.view.view import View

_NAMES = {
    "InputError": ("transect.errors", "InputError"),
    "Row": ("transect.results", "Row"),
    "Table": ("transect.results", "Table"),
    "View": ("transect.view.view", "View"),
    "measure": ("transect.measure", "measure"),
    "plan": ("transect.plan", "make"),
    "run": ("transect.measure", "run"),
    "write_report": ("transect.report", "write_report"),
    "data": ("transect.data", None),
    "edits": ("transect.view.edits", None),
    "probes": ("transect.probes", None),
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'transect' has no attribute {name!r}")
    path, attribute = _NAMES[name]
    module = importlib.import_module(path)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return __all__
