"""The command `watch`: curves of training runs in a terminal, while they run and after."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from transect.errors import InputError
from transect.train.display import span, thousands, worded
from transect.train.following import Following, Points
from transect.train.sketch import Curve, chart

_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue", "bright_cyan", "bright_yellow")
_MARKS = "abcdefgh"
_MOST_RUNS = len(_MARKS)
_NUMBERS = ("loss", "tokens_per_second", "mfu", "peak_memory")
_HEIGHT = 8
_GAP = 2
_LEAST_WIDTH = 38
_OLD = 60


def watch(paths: Sequence[Path], every: float, once: bool, console: Console) -> None:
    """Draw the runs every so many seconds until all are done, or once; where there is no terminal always once.

    Raises InputError for a folder that is not that of a training run, or more runs than can be told apart.
    """
    if len(paths) > _MOST_RUNS:
        raise InputError(f"{len(paths)} runs are too many to tell apart; give at most {_MOST_RUNS}")
    runs = [Following(path) for path in paths]
    if once or not console.is_interactive:
        console.print(picture(runs, console.width))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        keep_drawing(runs, lambda: live.update(picture(runs, console.width), refresh=True), lambda: time.sleep(every))


def keep_drawing(runs: Sequence[Following], draw: Callable[[], None], wait: Callable[[], None]) -> None:
    """Draw, wait, and again until all runs are done or Ctrl-C."""
    try:
        while True:
            done = all(run.done for run in runs)  # before they are read, so that nothing is missed
            draw()
            if done:
                return
            wait()
    except KeyboardInterrupt:
        return


def picture(runs: Sequence[Following], width: int) -> RenderableType:
    """Read what is new, and draw: a line for each run, then training loss, validation loss, learning rate and speed."""
    for run in runs:
        run.read()
    marks = _marks(len(runs))
    heads = [_head(run, mark, width) for run, mark in zip(runs, marks, strict=True)]
    columns = 2 if width >= 2 * _LEAST_WIDTH + _GAP else 1
    each = (width - _GAP * (columns - 1)) // columns
    panels = [
        _panel("training loss", _by_run(runs, marks, "loss"), each, "{:.4g}".format, cut=True),
        _panel("validation loss", _texts(runs, marks), each, "{:.4g}".format, cut=True),
        _panel("learning rate", _by_run(runs, marks, "learning_rate"), each, "{:.2g}".format),
        _panel("tokens/s", _by_run(runs, marks, "tokens_per_second"), each, thousands),
    ]
    grid = Grid.grid(padding=0)
    for column in range(columns):
        grid.add_column(width=each + _GAP * (column < columns - 1))
    for start in range(0, len(panels), columns):
        grid.add_row(*panels[start : start + columns])
    return Group(*heads, grid)


def _head(run: Following, mark: str, width: int) -> Text:
    shown = {name: run.last(name) for name in _NUMBERS}
    valid = run.valid()
    shown["valid"] = valid[-1][1] if valid else None
    words = worded(shown, int(run.last("skipped_steps") or 0), short=True)
    of = "" if run.steps is None else f"/{run.steps:,} {run.step / run.steps:.0%}"
    left, age = run.left(), run.age()
    if run.done:
        words["end"] = "done"
    elif left is not None:
        words["end"] = f"{span(left)} left"
    if not run.done and age is not None and age > _OLD:
        words["age"] = f"(last row {span(age)} ago)"
    line = [Text(f"{mark} {run.name}".strip(), style=f"bold {_COLOURS[_MARKS.index(mark)] if mark else ''}")]
    return _filled([*line, Text(f"step {run.step:,}{of}"), *map(Text, words.values())], width)


def _filled(words: Sequence[Text], width: int) -> Text:
    """The words in lines as full as they get, none of them broken."""
    text, used = Text(), 0
    for word in words:
        gap = "  " if used else ""
        if used and used + len(gap) + len(word) > width:
            gap, used = "\n", 0
        text.append(gap).append_text(word)
        used += len(gap.strip("\n")) + len(word)
    return text


def _marks(count: int) -> list[str]:
    return list(_MARKS[:count]) if count > 1 else [""] * count


def _by_run(runs: Sequence[Following], marks: Sequence[str], quantity: str) -> list[Curve]:
    """What there is of a quantity: of several runs all in a run's colour."""
    if len(runs) == 1:
        return _of_one(runs[0].curves.get(quantity, {}))
    looks = zip(runs, marks, _COLOURS, strict=False)
    return [
        Curve("", points, colour, mark)
        for run, mark, colour in looks
        for points in run.curves.get(quantity, {}).values()
    ]


def _texts(runs: Sequence[Following], marks: Sequence[str]) -> list[Curve]:
    """Of one run a curve for each domain; of several runs one for each, of all domains of `valid`."""
    if len(runs) == 1:
        return _of_one(runs[0].curves.get("text", {}))
    looks = zip(runs, marks, _COLOURS, strict=False)
    return [Curve("", run.valid(), colour, mark) for run, mark, colour in looks]


def _of_one(named: dict[str, Points]) -> list[Curve]:
    shown = list(named.items())[:_MOST_RUNS]
    looks = zip(shown, _marks(len(shown)), _COLOURS, strict=False)
    return [Curve(name, points, colour, mark) for (name, points), mark, colour in looks]


def _panel(
    title: str, curves: Sequence[Curve], width: int, write: Callable[[float], str], cut: bool = False
) -> RenderableType:
    lines: list[RenderableType] = [Text(title, style="bold"), *chart(curves, width, _HEIGHT, write, cut)]
    told = [
        Text(f"{curve.mark} {curve.name} {write(curve.points[-1][1])}", style=curve.colour)
        for curve in curves
        if curve.mark and curve.name
    ]
    return Group(*lines, _filled(told, width)) if told else Group(*lines)
