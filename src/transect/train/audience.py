"""Whoever looks on while a run trains: a terminal, a test, nobody."""

from typing import Protocol

from transect.train.progress import Progress


class Audience(Protocol):
    """Told what happens, by the first process."""

    def say(self, line: str) -> None:
        """A line for a person."""

    def step(self, progress: Progress, shown: dict[str, float | None]) -> None:
        """The numbers of a step that was just done: loss, valid, tokens_per_second, mfu, ...; None where unknown."""


class Silent:
    """Nobody."""

    def say(self, line: str) -> None: ...

    def step(self, progress: Progress, shown: dict[str, float | None]) -> None: ...
