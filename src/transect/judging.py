"""What the command `evaluate` does, for a terminal."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from transect import scoreboard, suites
from transect.commands import Speaker, quiet_load
from transect.errors import InputError
from transect.evaluate import Origin, evaluate, origin_of
from transect.joint import check_folder, withdraw, write_joint
from transect.results import Table
from transect.runs import RunFolder, environment, fingerprint
from transect.series import Member, series_of
from transect.suites import Suite
from transect.tasks.base import Task
from transect.view.view import View

DEFAULT = "base"
MATERIAL = Path("material")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line of `evaluate`."""

    models: tuple[str, ...]
    suite: str | None
    tasks: tuple[str, ...]
    options: tuple[str, ...]
    harness: tuple[str, ...]
    include_path: Path | None
    limit: int | None
    shots: int | None
    folders: tuple[Path, ...]
    batch_size: int
    dtype: str
    device: str
    revisions: tuple[str, ...]
    seed: int
    output: Path | None
    resume: bool
    trust_remote_code: bool


def evaluate_all(request: Request) -> Table:
    """Judge every model and checkpoint asked for, print the numbers, and keep the rows.

    Of a training run they are kept in its own folder, below `evaluations`, unless --output says otherwise.
    """
    suite = _suite(request)
    if request.resume and request.output is None and not all(_is_run(model) for model in request.models):
        raise InputError("--resume needs --output, the folder of the stopped evaluation")
    series = series_of(request.models, request.revisions)
    series.check(request.trust_remote_code)
    if series.joint and request.output is not None:
        check_folder(request.output, series, request.resume)
    speaker, tables = Speaker(Console()), []
    for number, member in enumerate(series.members, 1):
        if series.joint:
            speaker.head(f"{number} of {len(series.members)}  {member}")
        try:
            tables.append(_judge(request, member, suite, series.joint, speaker))
        except InputError as error:
            if series.joint and request.output is not None:
                withdraw(request.output, series)
            raise InputError(
                f"{number} of {len(series.members)}, {member}: {error}" if series.joint else str(error)
            ) from error
    table = Table(row for one in tables for row in one)
    scoreboard.print_scores(table, speaker.console)
    if series.joint and request.output is not None:
        write_joint(request.output, series, table)
        speaker.say(f"rows of all {len(series.members)} are in {request.output}")
    return table


def _suite(request: Request) -> Suite:
    if request.suite is not None and request.tasks:
        raise InputError("both --suite and --task were given; give one of them")
    if request.harness and (request.suite is not None or request.tasks):
        raise InputError("--lm-eval goes without --suite and --task; judge by them in a command of its own")
    if not request.harness and request.include_path is not None:
        raise InputError("--include-path is for --lm-eval; leave it out")
    if not request.harness and (request.limit is not None or request.shots is not None):
        raise InputError("--limit and --shots are for --lm-eval; of our tasks say --set options.limit=100")
    if request.harness:
        return Suite("", "", ())
    if request.tasks:
        return Suite("", "", suites.single(request.tasks, request.options))
    return suites.load(request.suite or DEFAULT, request.options)


def _judge(request: Request, member: Member, suite: Suite, joint: bool, speaker: Speaker) -> Table:
    view = quiet_load(member.source, member.revision, request.dtype, request.device, request.trust_remote_code)
    view.name = member.model
    origin = None if view.path is None else origin_of(view.path)
    if request.harness:
        return _harness(request, member, joint, view, origin, speaker)
    output, resume = _output(request, member, suite, joint, origin)
    if output is not None and RunFolder(output).finished() and resume:
        speaker.say(f"{output} is finished; its rows are read")
    with _Bar(len(suite.tasks)) as bar:
        table = evaluate(
            view,
            suite,
            folders=_folders(request),
            batch_size=request.batch_size,
            seed=request.seed,
            output=output,
            resume=resume,
            progress=bar.advance,
        )
    for reason in dict.fromkeys(f"{row.task} {row.domain}: {row.reason}" for row in table if row.reason):
        speaker.say(f"note    passed over, {reason}")
    if output is not None:
        speaker.say(f"rows and run record are in {output}")
    return table


def _harness(
    request: Request, member: Member, joint: bool, view: View, origin: Origin | None, speaker: Speaker
) -> Table:
    from transect import harness

    folder = None
    if request.output is not None:
        config = {"kind": "lm_eval", "model": view.name, "tasks": list(request.harness), "seed": request.seed}
        path = request.output / member.folder if joint else request.output
        folder = RunFolder.open(path, config | {"limit": request.limit, "shots": request.shots}, False)
    started = time.monotonic()
    try:
        rows = harness.run(
            view,
            request.harness,
            include_path=request.include_path,
            limit=request.limit,
            num_fewshot=request.shots,
            batch_size=request.batch_size,
            seed=request.seed,
        )
    except InputError:
        if folder is not None:
            folder.withdraw()
        raise
    stamp = {"model": view.name, "revision": view.revision}
    if origin is not None:
        stamp |= {"model": origin.recipe.name, "run": origin.run}
    table = Table(rows).stamped(**stamp)
    if folder is not None:
        folder.finish(table, environment(view.device, list(view.notes), time.monotonic() - started))
        speaker.say(f"rows and run record are in {folder.path}")
    return table


def _output(
    request: Request, member: Member, suite: Suite, joint: bool, origin: Origin | None
) -> tuple[Path | None, bool]:
    """The folder for the rows, and whether to go on with what is in it; a run's own is always gone on with."""
    if request.output is not None:
        return (request.output / member.folder if joint else request.output), request.resume
    if origin is None or not _is_run(member.where.home):
        return None, False
    settings = [{"task": task.name, **asdict(task)} for task in suite.tasks]
    known = [settings, [str(folder) for folder in _folders(request)], request.seed, request.dtype]
    name = f"{suite.name or 'tasks'}-{fingerprint(known)[:8]}"
    return Path(member.where.home) / "evaluations" / name / str(member.label or "last"), True


def _is_run(path: str) -> bool:
    return (Path(path) / "recipe.yaml").is_file()


def _folders(request: Request) -> tuple[Path, ...]:
    """The folders of --data, and after them `material`, where `transect fetch` puts things."""
    return (*request.folders, MATERIAL) if MATERIAL.is_dir() else request.folders


class _Bar:
    """A line for the task at work, on the error stream; nothing where that is no terminal."""

    def __init__(self, count: int) -> None:
        console = Console(stderr=True)
        self._count = count
        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
        self._number = -1

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, number: int, task: Task, done: int, total: int) -> None:
        """Show how far a task is."""
        words = f"{number + 1} of {self._count} {task.name} {task.label}"
        if number != self._number:
            self._number = number
            self._progress.reset(self._task)
        self._progress.update(self._task, description=f"{words[:44]:44}", completed=done, total=total)


__all__ = ["Request", "evaluate_all"]
