"""Figures and key numbers of one probe each: the file `<probe>.py` here, or the generic ones."""

import importlib
import pkgutil
from dataclasses import replace
from types import ModuleType

from transect.report import generic, trajectory
from transect.report.charts import Figure
from transect.report.pick import Pick

KeyNumbers = dict[str, str]


def figures_of(probe: str, pick: Pick) -> list[Figure]:
    """The figures of a probe's records, from the probe's own file where there is one.

    A model followed over training is shown at the last moment, and over its moments in figures of their own: what the
    file's `over_training` draws, or what its `followed` names.
    """
    module = _named(probe)
    last, note = trajectory.last_only(pick)
    found = [replace(figure, note=f"{figure.note} {note}".strip()) for figure in module.figures(last)]
    if hasattr(module, "over_training"):
        return [*found, *module.over_training(pick)]
    followed = getattr(module, "followed", generic.followed)
    return [*found, *trajectory.figures(pick, followed)]


def key_rows_of(probe: str, pick: Pick) -> dict[str, KeyNumbers]:
    """The key numbers of each model, at the first and the last moment where it was followed over training.

    Of what is drawn over training anyhow there is one line for each run.
    """
    if hasattr(_named(probe), "over_training"):
        subjects = pick.distinct("subject")
        return {str(name): key_numbers_of(probe, pick.where("subject", name)) for name in subjects}
    ends = trajectory.ends_only(pick)
    return {str(one.records[0]["series"]): key_numbers_of(probe, one) for _, one in generic.by_series(ends)}


def key_numbers_of(probe: str, pick: Pick) -> KeyNumbers:
    """The few numbers a reader wants first, for the records of one model; empty for a probe without its own file."""
    module = _named(probe)
    return module.key_numbers(pick) if module is not generic else {}


def _own_files() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)}


def _named(probe: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{probe}") if probe in _own_files() else generic
