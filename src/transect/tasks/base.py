"""Task: an evaluation of one model on one data set; which options it has, which rows come out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from transect.data.corpus import Corpus
from transect.recipes.recipe import Recipe
from transect.results import Row
from transect.view.view import View

Tick = Callable[[int, int], None]
"""Called with what is done and what there is to do in all, in the task's own unit; raises KeyboardInterrupt to stop."""


def silent(done: int, total: int) -> None:
    """A tick that nobody hears."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What is judged: a view, edited or not, and what it is judged with.

    corpus and recipe: of the training run that the model is from, where it is from one. folders: where data that are
    given by name are looked for. batch_size: so many times 128 tokens go through the model in a pass; changes no row.
    seed: of draws.
    """

    view: View
    corpus: Corpus | None = None
    recipe: Recipe | None = None
    folders: tuple[Path, ...] = ()
    batch_size: int = 8
    seed: int = 0
    tick: Tick = field(default=silent)

    @property
    def tokenizer(self) -> Any:
        """The view's tokenizer; tasks that need one refuse a view without it."""
        return self.view.tokenizer


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """An evaluation; its fields are its options, and a subclass is one file of this package.

    data: what is read: a name, a file, or a source that the task's own description lists. Nothing is kept on the task.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    headline: ClassVar[tuple[str, str]] = ("accuracy", "1")  # metric and unit of the row that says why there is none
    needs_tokenizer: ClassVar[bool] = True
    needs_head: ClassVar[bool] = True

    data: str

    @property
    def name(self) -> str:
        """The task's public name: its file's name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def label(self) -> str:
        """What rows and messages call the data."""
        return data_label(self.data)

    def refusal(self, view: View) -> str | None:
        """Why this model cannot be judged by it; None when it can."""
        if self.needs_tokenizer and view.tokenizer is None:
            return f"{view.name} has no tokenizer, and {self.name} reads text; load it with one"
        if self.needs_head and not view.has_head:
            return f"{view.name} has no head, so {self.name} has no probabilities to read"
        return None

    @abstractmethod
    def check(self, subject: Subject) -> None:
        """Raise InputError now for whatever would fail later: data that are not there, cannot be read or do not fit.

        Raises `NotAtHand` for data that are only missing.
        """

    @abstractmethod
    def rows(self, subject: Subject) -> Iterator[Row]:
        """The rows, with metric, unit, value, errors, n, domain, split and variant; provenance is added outside."""


def data_label(data: str) -> str:
    """The last word of a source, without folders, endings and the kind of source before a colon."""
    name = data.rsplit("/", 1)[-1].rpartition(":")[2]
    for ending in (".gz", ".jsonl", ".json", ".parquet", ".yaml", ".yml", ".txt", ".csv", ".tsv"):
        name = name.removesuffix(ending)
    return name or data


def named(data: str, keys: np.ndarray) -> str:
    """What rows call the items or documents judged: their source, and 16 digits that follow from the keys of all."""
    digest = blake2b(np.sort(keys.astype("<u8")).tobytes(), digest_size=8).hexdigest()
    return f"{data} [{digest}]"
