"""The folder of a training run: its recipe, its settings, its rows so far."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transect.errors import InputError
from transect.recipes.recipe import Recipe
from transect.results import Row, Table, to_line, write_whole
from transect.runs import RunFolder

FREE = (
    "name",
    "description",
    "source",
    "data.path",
    "train.max_minutes",
    "train.target_loss",
    "train.track",
    "train.peak_flops",
    "train.checkpoints",
    "parallel",
)
"""Settings that a run may change when it goes on: none of them changes a loss beyond the order of sums."""


class TrainFolder:
    """config.json and recipe.yaml, environment.json, rows.jsonl (a line for each row as it is made), checkpoints/.

    When the run is done also rows.parquet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[Row] = []

    @classmethod
    def open(cls, path: str | os.PathLike[str], recipe: Recipe, data: str, resume: bool) -> "TrainFolder":
        """Make the folder of a new run, or take up that of a stopped one.

        `data` is the corpus' fingerprint. Raises InputError when there is a run already and `resume` was not asked for,
        when it had other settings or other data, or when the folder cannot be written to.
        """
        folder = cls(Path(path))
        if resume and not (folder.path / "config.json").is_file():
            raise InputError(f"{path} holds no run to resume; leave --resume out to start one there")
        if resume:
            _check_same(folder.path, recipe, data)
        else:
            RunFolder.open(path, {"kind": "training", "data": data, "recipe": recipe.plain()}, resume=False)
        return folder

    def keep(self, recipe: Recipe) -> None:
        """Write the recipe, as it is from now on."""
        write_whole(self.path / "recipe.yaml", recipe.to_yaml().encode())

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def rewind(self, step: int) -> None:
        """Keep the rows up to a step: what came after it is made again. A line cut short by a crash is dropped."""
        file = self.path / "rows.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        kept = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] <= step:
                kept.append(Row(**{"value": None, **record}))
        self._rows = kept
        write_whole(file, "".join(to_line(row) for row in kept).encode())

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; raises InputError when the disk does not take them."""
        rows = list(rows)
        try:
            with (self.path / "rows.jsonl").open("a", encoding="utf-8") as handle:
                handle.write("".join(to_line(row) for row in rows))
        except OSError as error:
            raise InputError(
                f"cannot write {self.path / 'rows.jsonl'}: {error.strerror}; make room and go on with --resume"
            ) from error
        self._rows += rows

    def table(self) -> Table:
        """All rows of the run."""
        return Table(self._rows)

    def finish(self, environment: dict) -> Table:
        """Write rows.parquet and the environment, and give all rows."""
        table = self.table()
        table.write(self.path)
        write_whole(self.path / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())
        return table


def _check_same(path: Path, recipe: Recipe, data: str) -> None:
    try:
        before = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind, old_data, old = before["kind"], before["data"], before["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'config.json'} is not that of a training run, so it cannot go on") from error
    if kind != "training":
        raise InputError(f"{path} is not the folder of a training run; give another folder")
    if old_data != data:
        raise InputError(
            f"{path} was trained on other data (fingerprint {old_data}, now {data}); resume with the same folder"
        )
    was, now = dict(_flat(old)), dict(_flat(recipe.plain()))
    free = (*FREE, "train.steps", "train.tokens") if _may_grow(recipe) else FREE
    for name in sorted({*was, *now}):
        if any(name == one or name.startswith(f"{one}.") for one in free):
            continue
        if was.get(name) != now.get(name):
            raise InputError(
                f"{path} was trained with {name} {was.get(name)!r}, now {now.get(name)!r}; resume with the same recipe"
            )


def _may_grow(recipe: Recipe) -> bool:
    """Whether the learning rate at a step is the same in a longer run."""
    schedule = recipe.train.schedule
    return schedule.kind == "constant" or schedule.horizon is not None


def _flat(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
