"""What the command `train` does, for a terminal."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from transect.data import PrepareConfig, prepare
from transect.errors import InputError
from transect.recipes.recipe import Recipe, load
from transect.train.display import Display
from transect.train.run import Outcome, length, train

BUILTIN = "builtin"
PATIENCE = 600
"""Seconds that a process waits for the first one to prepare the built-in text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of `train`."""

    recipe: str
    output: Path | None
    data: str | None
    settings: tuple[str, ...]
    max_minutes: float | None
    device: str
    resume: bool
    resume_from: int | None


def train_recipe(request: Request) -> Outcome:
    """Read the recipe, train it with a progress bar, and say where everything is."""
    recipe, output = _asked(request)
    steps = length(recipe, recipe.data.seq_len or recipe.model.max_positions)
    console = Console()
    with Display(steps, console) as display:
        outcome = train(
            recipe,
            output,
            resume=request.resume,
            resume_from=request.resume_from,
            device=request.device,
            audience=display,
        )
    if display.shows:
        _say_end(outcome, output, console)
    return outcome


def _asked(request: Request) -> tuple[Recipe, Path]:
    """The recipe with what the command line changes, and the run folder."""
    folder = Path(request.recipe)
    taken_up = (folder / "recipe.yaml").is_file()
    resume = request.resume or request.resume_from is not None
    if taken_up and not resume:
        raise InputError(f"{folder} holds a run; give --resume to go on with it, or a recipe and a new -o FOLDER")
    output = folder if taken_up and request.output is None else request.output
    if output is None:
        raise InputError("no folder for the run is given; give -o FOLDER")
    source = folder / "recipe.yaml" if taken_up else request.recipe
    changes: list[str] = []
    if request.data is not None:
        changes.append(f"data.path={request.data}")
    if request.max_minutes is not None:
        changes.append(f"train.max_minutes={request.max_minutes}")
    recipe = load(source, [*changes, *request.settings])
    if recipe.data.path == BUILTIN:
        recipe = _with_builtin(recipe, output)
    return recipe, output


def _with_builtin(recipe: Recipe, output: Path) -> Recipe:
    """The recipe with the text that comes with the package, prepared beside the run where it is not there yet."""
    kind = "bpe" if recipe.model.causal else "wordpiece"
    size = recipe.model.vocab_size
    folder = output.parent / f"{BUILTIN}-{kind}-{size}"
    config = PrepareConfig(sources=(BUILTIN,), tokenizer_kind=kind, vocab_size=size, valid_fraction=0.1)
    if os.environ.get("RANK", "0") == "0":
        prepare(config, folder)
    else:
        _wait_for(folder / "card.json")
    return recipe.but(data=recipe.data.but(path=str(folder)).plain())


def _wait_for(file: Path) -> None:
    """Wait until the first process of several has made a file."""
    for _ in range(PATIENCE):
        if file.is_file():
            return
        time.sleep(1)
    raise InputError(f"{file.parent} was not prepared within {PATIENCE} seconds; prepare it first")


def _say_end(outcome: Outcome, output: Path, console: Console) -> None:
    progress = outcome.progress
    why = {
        "steps": "all steps are done",
        "target_loss": "the target loss is reached",
        "max_minutes": "the time is up",
        "stopped": "stopped",
    }[outcome.reason]
    lines = [f"{why}: step {progress.step:,}, {progress.tokens:,} tokens"]
    if outcome.reason in ("stopped", "max_minutes"):
        lines.append(f"go on with: transect train {output} --resume")
    lines.append(f"rows, events and checkpoints are in {output}; `transect report {output} -o FILE` draws them")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
