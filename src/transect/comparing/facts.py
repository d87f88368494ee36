"""What is true of an arm or a run whatever it is compared at: parameters, memory, whether its rate had decayed."""

from collections.abc import Iterable
from dataclasses import replace

from transect.comparing.arms import Arm
from transect.comparing.reading import Run
from transect.data.samples import sequence_length
from transect.errors import InputError
from transect.models.budget import budget
from transect.recipes.recipe import Recipe
from transect.results import Row
from transect.train.run import length
from transect.train.schedule import factor


def of_arm(arm: Arm) -> Iterable[Row]:
    """Rows of its parameters, those that one token uses, and the most memory that any of its runs took."""
    blank = Row(probe="compare", model=arm.name, metric="parameters", unit="parameters", value=0.0, part="arm")
    names = ("parameters", "active_parameters")
    try:
        counted = budget(Recipe.parse(next(iter(arm.runs.values())).recipe).model, context=0)
        for name, count in zip(names, (counted.parameters, counted.active_parameters), strict=True):
            yield replace(blank, metric=name).measured(float(count))
    except InputError as error:
        for name in names:
            yield replace(blank, metric=name).missing(f"its recipe cannot be built here: {error}")
    taken = [run.peak_memory for run in arm.runs.values() if run.peak_memory is not None]
    memory = replace(blank, metric="peak_memory", unit="bytes")
    yield memory.measured(max(taken)) if taken else memory.missing("its runs did not log their memory")


def rate_factor(run: Run, step: float) -> float | None:
    """What the schedule multiplies the learning rate with at a step, 0 .. 1; None where the recipe does not say.

    During the warm-up 1, as nothing has decayed then.
    """
    try:
        recipe = Recipe.parse(run.recipe)
        steps = length(recipe, sequence_length(recipe.data, recipe.model))
        schedule = recipe.train.schedule
        return 1.0 if step < schedule.warmup else factor(schedule, int(step), steps)
    except InputError:
        return None
