"""Rows as TensorBoard events and, when asked for, in Weights & Biases."""

import importlib
import importlib.util
import math
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transect.errors import InputError
from transect.recipes.recipe import Recipe
from transect.results import Row, write_whole

EVENTS = "events"
_WORDS = ("probe", "split", "task", "domain", "metric", "part", "element", "site", "edit", "variant")


class Tracker:
    """Passes on the rows of one sitting of a run, which begins after `step`.

    TensorBoard reads the folder `events` of the run; curves of a run that was stopped go on where it was. `wandb` keeps
    the same numbers under the same names; raises InputError where it is asked for and does not start.
    """

    def __init__(self, folder: Path, recipe: Recipe, step: int, track: Sequence[str]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._wandb = _wandb_run(folder, recipe, step) if "wandb" in track else None
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if step else 0, flush_secs=10)

    def add(self, rows: Iterable[Row]) -> None:
        """Write the rows that have a value; others stand in the run's table with their reason."""
        of_step: dict[int, dict[str, float]] = {}
        for row in rows:
            if row.value is not None and row.step is not None and math.isfinite(row.value):
                of_step.setdefault(row.step, {})[tag(row)] = row.value
        for step, numbers in of_step.items():
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            if self._wandb is not None:
                self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Write what is not written yet."""
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def tag(row: Row) -> str:
    """What a row's curve is called: its words that are there, then its layers, as in train/loss/main."""
    words = [str(word) for name in _WORDS if (word := getattr(row, name)) is not None]
    if words[:2] == ["train", "train"]:
        words = words[1:]
    if row.layer is not None:
        words.append(f"layer_{row.layer:02d}")
    if row.layer_to is not None:
        words.append(f"to_{row.layer_to:02d}")
    return "/".join(word.replace(" ", "_") for word in words)


def check(track: Sequence[str]) -> None:
    """Raise InputError when what `train.track` asks for is not installed."""
    if "wandb" in track and importlib.util.find_spec("wandb") is None:
        raise InputError(
            'train.track asks for wandb, which is not installed; pip install "transect[track]", or leave it out'
        )


def _wandb_run(folder: Path, recipe: Recipe, step: int) -> Any:
    check(["wandb"])
    wandb = importlib.import_module("wandb")
    # Folders of several runs may have the same name, so the run keeps an id of its own.
    kept = folder / "wandb_id"
    if not (step and kept.is_file()):
        write_whole(kept, secrets.token_hex(8).encode())
    try:
        return wandb.init(
            project="transect",
            name=folder.resolve().name,
            id=kept.read_text(),
            dir=str(folder),
            config=recipe.plain(),
            resume="allow",
        )
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"wandb does not start: {reason}; mend that, or leave it out of train.track") from error
