"""What a person sees while a run trains: one line kept up to date, or plain lines where there is no terminal."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from transect.train.progress import Progress

_GAP = 2
_LEAST_BAR = 8
_KEPT_LONGEST = ("step", "loss", "left", "valid", "tokens_per_second", "mfu", "skipped", "peak_memory")
_FORMS: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.3f}".format,
    "valid": "valid {:.3f}".format,
    "tokens_per_second": "{:,.0f} tokens/s".format,
    "mfu": "mfu {:.1%}".format,
    "peak_memory": lambda value: f"{value / 2**30:.1f} GiB",
}
_SHORT = _FORMS | {"tokens_per_second": lambda value: f"{thousands(value)} tok/s", "mfu": "mfu {:.0%}".format}


class Display:
    """An audience for a terminal. `shows` is False, and nothing is said, in a process of `torchrun` but the first."""

    def __init__(self, steps: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.shows = os.environ.get("RANK", "0") == "0"
        self._steps, self._console, self._clock = steps, console, clock
        self._pace = Pace(steps)
        self._line = _Line(steps)
        live = self.shows and console.is_interactive
        self._live = Live(self._line, console=console, auto_refresh=False) if live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line, above the one that is kept up to date."""
        if self.shows:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, progress: Progress, shown: dict[str, float | None]) -> None:
        """Show the numbers of a step; those that are not known are left out."""
        if not self.shows:
            return
        if self._live is None:
            self.say("  ".join([f"step {progress.step}/{self._steps}", *worded(shown, progress.skipped).values()]))
            return
        words = worded(shown, progress.skipped, short=True)
        left = self._pace.left(progress.step, self._clock())
        self._line.tell(progress.step, words | ({} if left is None else {"left": f"{span(left)} left"}))
        self._live.refresh()


class Pace:
    """Seconds that a run of `steps` will still take, by what its steps took since the first that was seen."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._first: tuple[int, float] | None = None

    def left(self, step: int, now: float) -> float | None:
        """After so many steps, at so many seconds of a clock; None at the first that is seen."""
        if self._first is None:
            self._first = step, now
        began, then = self._first
        return None if step <= began else max(0, self.steps - step) * (now - then) / (step - began)


def worded(shown: dict[str, float | None], skipped: int = 0, short: bool = False) -> dict[str, str]:
    """The numbers of a step in words, by name; without those that are None. `short`: with fewer digits of speed."""
    forms = _SHORT if short else _FORMS
    words = {name: form(value) for name, form in forms.items() if (value := shown.get(name)) is not None}
    return words | ({"skipped": f"{skipped:,} skipped"} if skipped else {})


def thousands(value: float) -> str:
    """Three digits: 123, 12.3k, 123k, 1.23M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def span(seconds: float) -> str:
    """Hours, minutes and seconds, and days where there are any."""
    return str(timedelta(seconds=round(seconds)))


class _Line:
    """Step, numbers and a bar in one line: where they do not fit, the least wanted ones are left out."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._words = {"step": f"0/{steps:,}"}

    def tell(self, step: int, words: dict[str, str]) -> None:
        self._step = step
        self._words = {"step": f"{step:,}/{self._steps:,} {step / self._steps:.0%}", **words}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        kept: set[str] = set()
        for name in _KEPT_LONGEST:
            needed = len(self._words.get(name, "")) + _GAP * bool(kept)
            if name in self._words and needed <= room:
                kept.add(name)
                room -= needed
        cells: list[RenderableType] = [Text(word, no_wrap=True) for name, word in self._words.items() if name in kept]
        if room >= _LEAST_BAR + _GAP:
            cells.insert(1, ProgressBar(self._steps, self._step, width=room - _GAP))
        line = Grid.grid(padding=(0, _GAP, 0, 0))
        line.add_row(*cells)
        yield line
