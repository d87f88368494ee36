"""Cloze: whether a model completes a passage with the word that stood there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from transect.errors import InputError
from transect.results import Row
from transect.tasks._encoding import Reader
from transect.tasks._items import Item, accuracies, limited, mean_row
from transect.tasks._sets import data_set
from transect.tasks.base import Subject, Task


@dataclass(frozen=True, kw_only=True)
class Cloze(Task):
    """The last word of a passage, given all before it: how often it is guessed, and how likely it is.

    accuracy: every token of the word is the likeliest one. nats_per_word: mean of -log p(word | passage);
    perplexity = exp(nats_per_word). The word is what stands behind the last blank, with that blank before it.

    Range and unit: accuracy 0..1; nats/word; perplexity 1 and more. Errors are over passages.
    Source: Paperno et al., LAMBADA, arXiv 1606.06031; scored as `lambada_openai` of lm-evaluation-harness 0.4.
    Raises: InputError for a passage of one word, or a word longer than the model's context.
    Cost: one forward pass a passage; of a masked model one for each token of the word, which it knows the number of.
    """

    title: ClassVar[str] = "The last word of a passage"
    source: ClassVar[str] = "arXiv 1606.06031"

    split: str = "test"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"cloze.limit is {self.limit}; it is at least 1")

    def check(self, subject: Subject) -> None:
        """The passages are there, and their last words fit the model."""
        reader = Reader.of(subject)
        for item in self._items(subject):
            reader.pair(*item.pairs[0])

    def rows(self, subject: Subject) -> Iterator[Row]:
        """accuracy, nats_per_word and perplexity."""
        reader, items = Reader.of(subject), self._items(subject)
        scored = reader.score([reader.pair(*item.pairs[0]) for item in items], subject.tick)
        keys = np.array([item.key for item in items], dtype=np.uint64)
        nats = np.array([-one.total for one in scored])
        like = Row(metric="accuracy", value=0.0, unit="1", domain=self.label, split=self.split)
        yield from accuracies({"greedy": np.array([float(one.greedy) for one in scored])}, keys, like)
        for metric, unit, made in (("nats_per_word", "nats/word", lambda x: x), ("perplexity", "1", np.exp)):
            blank = Row(metric=metric, value=0.0, unit=unit, domain=self.label, split=self.split)
            yield mean_row(nats, keys, blank, made)

    def _items(self, subject: Subject) -> list[Item]:
        chosen = data_set(self.data, "cloze")
        items = []
        for number, record in limited(chosen.records(self.split, subject.folders), self.limit):
            made = chosen.read(record, number)
            if not made:
                continue
            before, blank, word = str(made["text"]).rstrip().rpartition(" ")
            if not blank or not before.strip():
                raise InputError(f"record {number} of {chosen.name} is one word; a passage has one before the last")
            items.append(Item(((before, f" {word}"),), 0, (word,)))
        if not items:
            raise InputError(f"{chosen.name} has no passages; give a file with some")
        return items
