"""Figures and key numbers of one probe each: the file `<probe>.py` here, or the generic ones."""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from transect.report import generic
from transect.report.charts import Figure
from transect.report.pick import Pick

KeyNumbers = dict[str, str]


def figures_of(probe: str, pick: Pick) -> list[Figure]:
    """The figures of a probe's records, from the probe's own file where there is one."""
    draw: Callable[[Pick], list[Figure]] = _named(probe).figures if probe in _own_files() else generic.figures
    return draw(pick)


def key_numbers_of(probe: str, pick: Pick) -> KeyNumbers:
    """The few numbers a reader wants first, for the records of one model; empty for a probe without its own file."""
    return _named(probe).key_numbers(pick) if probe in _own_files() else {}


def _own_files() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _named(probe: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{probe}")
