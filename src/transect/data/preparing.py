"""The commands `transect data prepare` and `transect data show`: a bar while it runs, a table of what there is."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from transect.data.card import NAME
from transect.data.corpus import Corpus
from transect.data.making import PrepareConfig, prepare
from transect.memory import readable

_SHOWN = 4096  # tokens of a sample's beginning that are read
_LISTED = 5  # unreadable files named


def prepare_text(output: Path, given: Mapping[str, Any], workers: int | None, skip_unreadable: bool) -> None:
    """Make a corpus of the settings that were given, those that are None being left at their defaults, and show it."""
    config = PrepareConfig.parse({name: value for name, value in given.items() if value is not None})
    there = (output / NAME).is_file()
    try:
        with _Bar() as bar:
            corpus = prepare(config, output, workers or os.cpu_count() or 1, skip_unreadable, bar.advance)
    except KeyboardInterrupt:
        typer.echo("transect: stopped; the same command goes on with it", err=True)
        raise SystemExit(130) from None
    console = Console()
    if there:
        _say(console, f"{output} is prepared with these settings already; nothing was done")
        return
    _sizes(corpus, console)
    _say(console, f"prepared {output}; look at its text with: transect data show {output}")


def show(path: Path, samples: int) -> None:
    """Print sizes by split and domain, what was left out, and the beginnings of some documents."""
    corpus = Corpus.open(path)
    console = Console()
    _sizes(corpus, console)
    tokenizer = corpus.tokenizer()
    for split in corpus.splits if samples else ():
        for domain in corpus.domains(split)[:samples]:
            part = corpus.part(split, domain)
            count = min(int(part.offsets[1]) - 1, _SHOWN)
            text = " ".join(str(tokenizer.decode(part.read(0, count).tolist())).split())
            line = Text(f"{split}/{domain}: {text}")
            line.truncate(2 * console.width, overflow="ellipsis")
            console.print(line)


def _sizes(corpus: Corpus, console: Console) -> None:
    card = corpus.card
    _say(console, f"{card.name}: vocabulary of {card.vocab_size:,}, {card.dtype}, fingerprint {corpus.fingerprint}")
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for title in ("split", "domain", "documents", "tokens", "text", "bytes/token"):
        grid.add_column(title, justify="left" if title in ("split", "domain") else "right", overflow="fold")
    for split in corpus.splits:
        for domain in corpus.domains(split):
            part = card.splits[split][domain]
            rate = part.bytes / (part.tokens - part.documents)
            grid.add_row(split, domain, f"{part.documents:,}", f"{part.tokens:,}", readable(part.bytes), f"{rate:.3f}")
    console.print(grid)
    removed = card.removed
    for count, what in (
        (removed.copies_of_evaluation, "train documents left out: copies of evaluation documents"),
        (removed.near_copies_of_evaluation, "train documents left out: near copies of evaluation documents"),
        (removed.repeats, "train documents left out: repeats of another train document"),
        (removed.empty, "documents left out: without a token"),
        (sum(part.unknown for domains in card.splits.values() for part in domains.values()), "unknown tokens"),
        (len(card.skipped), "files left out: unreadable"),
    ):
        if count:
            _say(console, f"{count:,} {what}")
    for reason in card.skipped[:_LISTED]:
        _say(console, f"  - {reason}")
    if len(card.skipped) > _LISTED:
        _say(console, f"  - and {len(card.skipped) - _LISTED:,} more, in {NAME}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{readable(task.completed)}" + (f", {readable(task.speed)}/s" if task.speed else ""))


class _Bar:
    """A bar for each phase, in bytes of text; shows nothing where the error stream is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:15}"),
            BarColumn(),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._phase = ""
        self._task = self._progress.add_task("", visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, phase: str, done: int, total: int) -> None:
        """Count bytes of a phase."""
        if phase != self._phase:
            self._phase = phase
            self._task = self._progress.add_task(phase, total=total or None)
        self._progress.update(self._task, advance=done)
