"""Minimal pairs: whether a model finds the acceptable one of two sentences likelier."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from transect.errors import InputError
from transect.results import Row
from transect.tasks import _records
from transect.tasks._encoding import Reader
from transect.tasks._items import Item, accuracies, limited
from transect.tasks._sets import DataSet, data_set
from transect.tasks.base import Subject, Task, named

_LENGTHS = ("whole", "whole per token")


@dataclass(frozen=True, kw_only=True)
class MinimalPairs(Task):
    """Share of pairs of which the acceptable sentence has the higher log-probability.

    Rules: `whole`, the sum over all tokens, each sentence behind the start token; `whole per token`, divided by their
    number. A masked model's is the pseudo-log-likelihood, each token hidden alone. A set of several files has a row for
    each (`part`), and one of all: the mean over files.

    Range and unit: 0..1, chance 0.5. Errors are over pairs; of several files over the pairs of all, files kept apart.
    Source: Warstadt et al., BLiMP, arXiv 1912.00582, section 4; masked models arXiv 1910.14659. Ties count for neither.
    Raises: InputError for a sentence longer than the model's context, or pairs whose sentences are equal.
    Cost: two forward passes a pair; of a masked model one for each token.
    """

    title: ClassVar[str] = "The acceptable one of two sentences"
    source: ClassVar[str] = "arXiv 1912.00582"

    split: str = "test"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"minimal_pairs.limit is {self.limit}; it is at least 1")

    def check(self, subject: Subject) -> None:
        """The pairs are there and fit the model."""
        reader = Reader.of(subject)
        for _, items in self._files(subject):
            for item in items:
                for context, sentence in item.pairs:
                    reader.pair(context, sentence)

    def rows(self, subject: Subject) -> Iterator[Row]:
        """Accuracy of each file by rule, and of all files."""
        reader, files = Reader.of(subject), list(self._files(subject))
        items = [item for _, own in files for item in own]
        requests = [reader.pair(*pair) for item in items for pair in item.pairs]
        scored = reader.score(requests, subject.tick)
        total = np.array([one.total for one in scored]).reshape(-1, 2)
        counts = np.array([len(one.nats) for one in scored]).reshape(-1, 2)
        right = {
            name: (scores[:, 0] > scores[:, 1]).astype(np.float64)
            for name, scores in zip(_LENGTHS, (total, total / counts), strict=True)
        }
        keys = np.array([item.key for item in items], dtype=np.uint64)
        like = Row(metric="accuracy", value=0.0, unit="1", domain=self.label, split=self.split)
        start, made = 0, []
        for name, own in files:
            some = slice(start, start + len(own))
            start += len(own)
            made.append(accuracies({rule: hits[some] for rule, hits in right.items()}, keys[some], like))
            if len(files) > 1:
                yield from (replace(row, part=name) for row in made[-1])
        yield from made[0] if len(files) == 1 else _over_files(made, named(self.label, keys))

    def _files(self, subject: Subject) -> Iterator[tuple[str, list[Item]]]:
        chosen = data_set(self.data, "minimal_pairs")
        if not chosen.several:
            yield self.label, self._items(chosen, limited(chosen.records(self.split, subject.folders), self.limit))
            return
        patterns = chosen.files[self.split]
        first = _records.found(patterns, subject.folders, chosen.name)
        for file in sorted(path for path in first.parent.iterdir() if _fits(path, patterns)):
            yield file.name.split(".")[0], self._items(chosen, limited(_records.read(file), self.limit))

    def _items(self, chosen: DataSet, records: list) -> list[Item]:
        items = []
        for number, record in records:
            made = chosen.read(record, number)
            if not made:
                continue
            if made.get("good") == made.get("bad") or not made.get("good") or not made.get("bad"):
                raise InputError(f"record {number} of {chosen.name} has no two different sentences; mend or remove it")
            items.append(Item((("", made["good"]), ("", made["bad"])), 0, (made["good"], made["bad"])))
        if not items:
            raise InputError(f"{chosen.name} has no pairs; give a file with some")
        return items


def _fits(path: Path, patterns: list[str]) -> bool:
    return any(path.match(pattern.rsplit("/", 1)[-1]) for pattern in patterns)


def _over_files(made: list[list[Row]], data: str) -> Iterator[Row]:
    """The mean over files of each rule; its error from those of the files, which share no pair."""
    for rows in zip(*made, strict=True):
        value = sum(row.value or 0.0 for row in rows) / len(rows)
        errors = [row.stderr for row in rows if row.stderr is not None]
        whole = replace(rows[0], value=value, n=sum(row.n or 0 for row in rows), stderr=None, low=None, high=None)
        whole = replace(whole, documents=whole.n, data=data)
        if len(errors) == len(rows):
            error = float(np.sqrt(np.square(errors).sum())) / len(rows)
            whole = replace(whole, stderr=error, low=value - 1.96 * error, high=value + 1.96 * error)
        yield whole
