"""Judge a model: every task in turn, its rows kept as soon as it is done, so that a stopped run repeats none."""

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transect import runs, suites
from transect.data.corpus import Corpus
from transect.errors import InputError, NotAtHand, Unsuitable
from transect.recipes.recipe import Recipe
from transect.recipes.recipe import load as load_recipe
from transect.results import Row, Table
from transect.stopping import stoppable
from transect.suites import Suite
from transect.tasks.base import Subject, Task
from transect.view.checkpoints import step_of
from transect.view.view import View

Progress = Callable[[int, Task, int, int], None]
"""Called with the number of a task, the task, and what is done and to do of it."""
_SECONDS_BETWEEN = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """The training run that a model is from.

    run: its folder's name; corpus: where it is at hand; come: steps, tokens, seconds and FLOPs up to there.
    """

    run: str
    recipe: Recipe
    corpus: Corpus | None
    come: dict[str, Any]


def evaluate(
    view: View,
    tasks: str | Suite | Iterable[str | Task] = "base",
    *,
    folders: Iterable[str | os.PathLike[str]] = (),
    batch_size: int = 8,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Table:
    """Judge a view, edited or not, by a suite or by tasks (`kind:data` words or `Task` objects), and return the rows.

    A view loaded from a training run has that run's corpus as its in-distribution text. folders: where data given by
    name are looked for. With `output` a run folder is written, and `resume` goes on with the first task that is not
    finished. Rows do not depend on batch_size. Of a suite, data that are not at hand or do not fit into this model, and
    tasks that it cannot do, give one row without a value that says why; asked for by themselves they raise InputError,
    as does whatever else the user can mend, before anything is judged.
    """
    suite = suites.load(tasks) if isinstance(tasks, str) else tasks
    if not isinstance(suite, Suite):
        made = tuple(suites.single([one])[0] if isinstance(one, str) else one for one in suite)
        suite = Suite("", "", made)
    if not suite.tasks:
        raise InputError("no task is given; give a suite or at least one task")
    origin = None if view.path is None else origin_of(view.path)
    subject = Subject(
        view=view,
        corpus=None if origin is None else origin.corpus,
        recipe=None if origin is None else origin.recipe,
        folders=tuple(Path(folder) for folder in folders),
        batch_size=batch_size,
        seed=seed,
    )
    for folder in subject.folders:
        if not folder.is_dir():
            raise InputError(f"no data folder {folder}; give one that is there")
    judging = _Judging(subject, suite, origin)
    folder = None if output is None else runs.RunFolder.open(output, judging.config(), resume)
    if folder is not None and folder.finished():
        return Table.read(folder.path)
    try:
        judging.check()
        return judging.run(folder, progress)
    except InputError:
        if folder is not None:
            folder.withdraw()
        raise


def origin_of(path: str | os.PathLike[str]) -> Origin | None:
    """The training run that a checkpoint, by its path, belongs to; None for any other model."""
    path = Path(path)
    home = path.parent.parent
    if path.parent.name != "checkpoints" or not (home / "recipe.yaml").is_file():
        return None
    recipe = load_recipe(home / "recipe.yaml")
    corpus = None
    if recipe.data.path is not None:
        try:
            corpus = Corpus.open(recipe.data.path)
        except InputError:  # moved or gone: tasks that need it say so
            corpus = None
    return Origin(home.resolve().name, recipe, corpus, _come(path))


def _come(checkpoint: Path) -> dict[str, Any]:
    """How far the run had come at a checkpoint, by what it says."""
    try:
        record = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
        return {name: record["progress"][name] for name in ("step", "tokens", "seconds", "flops")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class _Judging:
    """A suite on its way over a subject."""

    def __init__(self, subject: Subject, suite: Suite, origin: Origin | None) -> None:
        self.subject, self.suite, self.origin = subject, suite, origin
        self.lenient = bool(suite.name)
        self.refused: dict[int, str] = {}

    def config(self) -> dict:
        """What the folder keeps of the settings."""
        view = self.subject.view
        return {
            "kind": "evaluation",
            "model": view.name,
            "revision": view.revision,
            "dtype": _dtype(view),
            "suite": self.suite.name,
            "tasks": [{"task": task.name, **_plain(task)} for task in self.suite.tasks],
            "corpus": None if self.subject.corpus is None else self.subject.corpus.fingerprint,
            "data": [str(folder) for folder in self.subject.folders],
            "seed": self.subject.seed,
            "notes": list(view.notes),
            "code": _code(),
        }

    def check(self) -> None:
        """Find what cannot be done before anything is."""
        for number, task in enumerate(self.suite.tasks):
            reason = task.refusal(self.subject.view)
            if reason is None:
                try:
                    task.check(self.subject)
                    continue
                except (NotAtHand, Unsuitable) as error:
                    if not self.lenient:
                        raise
                    reason = str(error)
            elif not self.lenient:
                raise InputError(f"{task.name}: {reason}")
            self.refused[number] = reason

    def run(self, folder: runs.RunFolder | None, progress: Progress | None) -> Table:
        """Do every task that is not done, and keep its rows."""
        started = time.monotonic()
        saved = None if folder is None else folder.load_state()
        rows = [] if saved is None else [Row(**row) for row in saved["rows"]]
        first = 0 if saved is None else saved["done"]
        before = 0.0 if saved is None else saved["seconds"]
        with stoppable() as stopped:
            for number in range(first, len(self.suite.tasks)):
                rows += self._rows(number, progress, stopped)
                if folder is not None:
                    spent = before + time.monotonic() - started
                    folder.write_rows(rows)
                    folder.save_state({"rows": [asdict(row) for row in rows], "done": number + 1, "seconds": spent})
                if stopped():
                    raise KeyboardInterrupt
        table = Table(rows)
        if folder is not None:
            spent = before + time.monotonic() - started
            folder.finish(table, runs.environment(self.subject.view.device, list(self.subject.view.notes), spent))
        return table

    def _rows(self, number: int, progress: Progress | None, stopped: Callable[[], bool]) -> list[Row]:
        task = self.suite.tasks[number]
        if number in self.refused:
            metric, unit = task.headline
            row = Row(metric=metric, value=None, unit=unit, reason=self.refused[number], domain=task.label)
            return [self._stamped(row, task)]
        last = 0.0

        def tick(done: int, total: int) -> None:
            nonlocal last
            if stopped():
                raise KeyboardInterrupt
            if progress is not None and (done >= total or time.monotonic() - last > _SECONDS_BETWEEN):
                last = time.monotonic()
                progress(number, task, done, total)

        return [self._stamped(row, task) for row in task.rows(replace(self.subject, tick=tick))]

    def _stamped(self, row: Row, task: Task) -> Row:
        view, origin = self.subject.view, self.origin
        come = {} if origin is None else origin.come
        return replace(
            row,
            run=None if origin is None else origin.run,
            model=view.name if origin is None else origin.recipe.name,
            revision=view.revision,
            step=come.get("step", step_of(view.revision)),
            tokens=come.get("tokens"),
            seconds=come.get("seconds"),
            flops=come.get("flops"),
            task=task.name,
            dtype=_dtype(view),
            seed=self.subject.seed if origin is None else origin.recipe.train.seed,
            data=row.data or task.data,
            config=runs.fingerprint({"task": task.name, **_plain(task)}),
            code=_code(),
        )


def _plain(task: Task) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(task).items()}


def _dtype(view: View) -> str:
    return str(view.dtype).removeprefix("torch.")


def _code() -> str:
    return f"transect {importlib.metadata.version('transect')}"
