"""transect: measure what each part of a Transformer does, build what follows, pre-train it and judge it."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what the lazy names below are, for type checkers and editors
    from transect import data as data
    from transect import probes as probes
    from transect import recipes as recipes
    from transect import tasks as tasks
    from transect.compare import compare as compare
    from transect.errors import InputError as InputError
    from transect.evaluate import evaluate as evaluate
    from transect.measure import measure as measure
    from transect.models import penalties as penalties
    from transect.models.budget import budget as budget
    from transect.models.match import match as match
    from transect.report import write_report as write_report
    from transect.results import Row as Row
    from transect.results import Table as Table
    from transect.view import edits as edits
    from transect.view.commit import Changes as Changes
    from transect.view.commit import Removal as Removal
    from transect.view.commit import commit as commit
    from transect.view.view import View as View

_NAMES = {
    "Changes": ("transect.view.commit", "Changes"),
    "InputError": ("transect.errors", "InputError"),
    "Removal": ("transect.view.commit", "Removal"),
    "Row": ("transect.results", "Row"),
    "Table": ("transect.results", "Table"),
    "View": ("transect.view.view", "View"),
    "budget": ("transect.models.budget", "budget"),
    "commit": ("transect.view.commit", "commit"),
    "compare": ("transect.compare", "compare"),
    "match": ("transect.models.match", "match"),
    "evaluate": ("transect.evaluate", "evaluate"),
    "measure": ("transect.measure", "measure"),
    "plan": ("transect.plan", "make"),
    "run": ("transect.measure", "run"),
    "write_report": ("transect.report", "write_report"),
    "data": ("transect.data", None),
    "edits": ("transect.view.edits", None),
    "penalties": ("transect.models.penalties", None),
    "probes": ("transect.probes", None),
    "recipes": ("transect.recipes", None),
    "tasks": ("transect.tasks", None),
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


class _Package(ModuleType):
    """Keeps a submodule from hiding the public function of its name: importing `transect.measure` sets it here."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _NAMES.get(name, ("", None))[1] is not None:
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
