"""lm-evaluation-harness, both ways: our views as its models, its results as our rows, our data sets as its tasks."""

import contextlib
import difflib
import functools
import importlib.util
import io
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transect.errors import InputError, NotAtHand
from transect.harness_export import export as export
from transect.metrics.errors import Error
from transect.results import Row
from transect.tasks.base import Tick, silent
from transect.view.view import View

if TYPE_CHECKING:
    from transect.harness_model import HarnessModel

RESAMPLES = 1000  # of errors that lm_eval finds by the bootstrap; its own default takes minutes on one core
UNITS = {"bits_per_byte": "bits/byte"}  # of all others 1


def model(view: View, batch_size: int = 8, length: int | None = None) -> "HarnessModel":
    """The view as a model object: `lm_eval.simple_evaluate(model=harness.model(view), tasks=[...])`.

    It answers with the view as it is when asked, also inside an edit; a masked model answers by pseudo-likelihood.
    batch_size changes no result. length: most tokens of an input, by default all that the model takes. Raises
    InputError where lm_eval is not installed, and for a view without tokenizer or head.
    """
    _require()
    from transect.harness_model import HarnessModel

    return HarnessModel(view, batch_size, length)


def run(
    view: View,
    names: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Tick | None = None,
) -> list[Row]:
    """Run lm_eval's tasks, groups or tags on a view and return its results as rows.

    A row has task `lm_eval`, lm_eval's name as domain, and shots, its metric and its filter as variant:
    `0-shot: acc_norm,none`; every `acc...` is an accuracy. low and high are the value -+ 1.96 stderr. include_path: a
    folder with tasks of one's own. limit: documents of a task, the first ones. num_fewshot does not change a task that
    says 0 itself. seed: of the examples and of sampled text (lm_eval's own default for examples is 1234). progress:
    called with requests done and requests in all, anew for each kind of request.

    Range and unit: those of lm_eval's metrics. Raises InputError for an unknown name, and for tasks that need images or
    run code that a model wrote; NotAtHand, naming the task, where its data cannot be had.
    Source: lm-evaluation-harness 0.4. Cost: reading the shipped tasks takes 20 seconds in each process.
    """
    _require()
    if not names:
        raise InputError("no lm_eval task is named; give one or more")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it is at least 1 document")
    with _quiet() as aloud, _seeded(seed):
        from lm_eval import evaluate

        from transect.harness_model import HarnessModel

        found = _loaded(names, include_path)
        for task in found["tasks"].values():
            if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot")):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=seed)
        heard = HarnessModel(view, batch_size, tick=silent if progress is None else aloud(progress))
        results: Any = evaluate(heard, found, limit=limit, log_samples=False, bootstrap_iters=RESAMPLES)
    return _rows(results)


def _require() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError('lm_eval is not installed; run pip install "transect[eval]"')


def _loaded(names: Sequence[str], include_path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """lm_eval's tasks and groups of these names."""
    manager = _manager(names, include_path)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; nearest are {', '.join(near)}" if near else ""
            raise InputError(f"unknown lm_eval task {name!r}{hint}; `lm-eval ls tasks` lists them")
    found: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in dict.fromkeys(names):
        try:
            made = manager.load([name])
        except Exception as error:  # a task is code of others, which may raise anything
            kind = NotAtHand if isinstance(error, OSError) else InputError
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            message = f"lm_eval task {name} cannot be set up: {why}; have its data at hand, or leave it out"
            raise kind(message) from error
        for one in made["tasks"].values():
            if getattr(one, "UNSAFE_CODE", False) or getattr(one, "MULTIMODAL", False):
                raise InputError(f"lm_eval task {name} runs code of the model, or needs images or sound; leave it out")
        found["tasks"] |= made["tasks"]
        found["groups"] |= made.get("groups", {})
    return found


def _manager(names: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    """An index of tasks in which the names are: the user's folder alone where that is enough, as the shipped ones take
    long to read."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return _shipped()
    if not Path(include_path).is_dir():
        raise InputError(f"no folder {include_path}; give one with lm_eval's task files")
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if all(_closed(name, own.task_index) for name in names):
        return own
    return TaskManager(include_path=str(include_path))


@functools.cache
def _shipped() -> Any:
    """The tasks that come with lm_eval, which do not change."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _closed(name: object, index: Mapping[str, Any]) -> bool:
    """Whether a task is in the index with all that its group names."""
    if not isinstance(name, str) or name not in index:
        return False
    config = index[name].cfg or {}
    children = config.get("task", []) if "group" in config else []
    return isinstance(children, list) and all(_closed(child, index) for child in children)


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Let nothing that lm_eval says reach our streams; gives a wrapper that lets a callback be heard all the same."""
    out, err, level = sys.stdout, sys.stderr, logging.root.manager.disable
    variable = "DISABLE_MULTIPROC"  # else lm_eval's bootstrap forks this process, threads and all
    before = os.environ.get(variable)

    def aloud(tick: Tick) -> Tick:
        def heard(done: int, total: int) -> None:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                tick(done, total)

        return heard

    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings(action="ignore"):
        try:
            logging.disable(logging.CRITICAL)
            os.environ[variable] = "1"
            yield aloud
        finally:
            logging.disable(level)
            os.environ.pop(variable)
            if before is not None:
                os.environ[variable] = before


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and torch's random numbers by the seed inside, and as they were after it."""
    import torch

    state = random.getstate()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)


def _rows(results: Mapping[str, Any]) -> list[Row]:
    """A row for each metric and filter of each task and group, in lm_eval's order."""
    rows = []
    for name, values in results["results"].items():
        config = results["configs"].get(name, {})
        shots = results["n-shot"].get(name)
        before = "" if shots is None else f"{shots}-shot: "
        counted = results["n-samples"].get(name, {})
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            count = counted.get("effective", values.get("sample_count", {}).get(key))
            row = Row(
                metric="accuracy" if metric.startswith("acc") else metric,
                value=None,
                reason="not measured",
                unit=UNITS.get(metric, "1"),
                task="lm_eval",
                domain=name,
                variant=f"{before}{key}",
                n=count,
                documents=count,
                split=config.get("test_split") or config.get("validation_split"),
            )
            rows.append(_measured(row, value, values.get(f"{metric}_stderr,{rule}")))
    return rows


def _measured(row: Row, value: object, stderr: object) -> Row:
    number, error = _number(value), _number(stderr)
    if number is None:
        return row.missing(f"lm_eval gives {str(value)[:40]}, no finite number")
    return row.measured(number, None if error is None else Error(error, number - 1.96 * error, number + 1.96 * error))


def _number(given: object) -> float | None:
    try:
        number = float(given)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
