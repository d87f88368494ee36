"""Labelled examples of a data set, in training, held-out and test parts that share no text and no group."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from transect.data.hashing import keyed
from transect.errors import InputError
from transect.results import Row
from transect.tasks._documents import text_key
from transect.tasks._items import option_items
from transect.tasks._records import Record
from transect.tasks._sets import DataSet, data_set
from transect.tasks.base import Subject, Task
from transect.view.view import View

LENGTH = 128
SHORTEST = 8
"""Tokens that special ones around two texts leave room in."""


@dataclass(frozen=True, slots=True)
class Example:
    """texts: a text and what belongs to it, empty where nothing does; one such pair, or one for each option.

    label: the class, or the right option. Texts that differ in case and blanks alone have the same key.
    """

    texts: tuple[tuple[str, str], ...]
    label: str
    group: str | None

    @property
    def key(self) -> int:
        """A hash of the texts, 64 bits."""
        plain = "\0".join(" ".join(text.split()).casefold() for pair in self.texts for text in pair)
        return text_key(plain)


@dataclass(frozen=True, slots=True)
class Parts:
    """Examples that share neither texts nor groups; classes are those of training, empty where options are chosen from.

    left_out: how many training records were left out, by the reason.
    """

    training: list[Example]
    held_out: list[Example]
    test: list[Example]
    classes: tuple[str, ...]
    left_out: dict[str, int]

    @property
    def majority(self) -> str:
        """The label that training has most often; of several the first by name."""
        counts = Counter(example.label for example in self.training)
        return min(counts, key=lambda label: (-counts[label], label))


@dataclass(frozen=True, kw_only=True)
class LabelledTask(Task):
    """A task that learns from labelled examples of one split and is tested on another.

    training, test: names of splits. held_out: the share of training groups that only choose among settings, or the name
    of a split for that. limit_training, limit_test: so many records, drawn by a hash of their texts with classes in
    proportion; those held out count. length: most tokens of a text or pair, whose rest is cut
    off; by default 128, or what the model takes.
    """

    training: str = "train"
    test: str = "test"
    held_out: float | str = 0.1
    limit_training: int | None = None
    limit_test: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit_training", "limit_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{self.name}.{name} is {value}; give at least 1, or none for all records")
        if not isinstance(self.held_out, str) and not 0 < self.held_out < 1:
            raise InputError(f"{self.name}.held_out is {self.held_out}; it is above 0 and below 1, or a split's name")
        if self.test in (self.training, self.held_out) or self.training == self.held_out:
            raise InputError(
                f"{self.name}: training, held_out and test are different splits, not twice {self.training!r}"
            )

    def tokens(self, view: View) -> int:
        """The length, by default 128 or all that the model takes; raises InputError for one that it does not take."""
        limit = view.max_positions
        length = min(LENGTH, limit or LENGTH) if self.length is None else self.length
        if length < SHORTEST or (limit is not None and length > limit):
            most = "any number of" if limit is None else limit
            raise InputError(f"{self.name}.length is {length}; {view.name} takes {SHORTEST} to {most} tokens")
        return length

    def parts(self, subject: Subject) -> Parts:
        """The parts, in an order by hash, so that the order of records in their file does not matter.

        Training records are left out whose texts or group the test or the held-out part has too. Raises InputError for
        a split without usable records, one class alone, and a test class that training does not have.
        """
        source = _read_set(self.data)
        training = _examples(source, self.training, subject)
        whole_test = _examples(source, self.test, subject)
        training, left_out = _apart(training, whole_test, "test")
        training = _limited(training, self.limit_training, subject.seed)
        test = _limited(whole_test, self.limit_test, subject.seed)
        if isinstance(self.held_out, str):
            held_out = _limited(_examples(source, self.held_out, subject), None, subject.seed)
            held_out, more = _apart(held_out, whole_test, "test", "held-out")
            left_out |= more
        else:
            training, held_out = _split(training, self.held_out, subject.seed, source.name)
        training, more = _apart(training, held_out, "held-out")
        _refuse_empty(source.name, training=training, held_out=held_out, test=test)
        classes: tuple[str, ...] = ()
        if source.kind == "labelled":
            _check_labels(source.name, training, held_out, test)
            classes = tuple(sorted({example.label for example in (*training, *held_out)}))
        return Parts(training, held_out, test, classes, left_out | more)

    def left_out_rows(self, parts: Parts) -> Iterator[Row]:
        """A row for each reason for which training records were left out."""
        for reason, count in parts.left_out.items():
            yield Row(
                metric="left_out",
                value=float(count),
                unit="records",
                domain=self.label,
                split=self.training,
                part=reason,
                n=count,
            )


def _read_set(given: str) -> DataSet:
    try:
        return data_set(given, "labelled")
    except InputError as error:
        try:
            return data_set(given, "options")
        except InputError:
            raise error from None


def _examples(source: DataSet, split: str, subject: Subject) -> list[Example]:
    where = f"of split {split!r} of {source.name}"
    read = (
        _example(source, record, number, f"record {number} {where}")
        for number, record in enumerate(source.records(split, subject.folders))
    )
    found = [example for example in read if example is not None]
    if not found:
        raise InputError(f"there are no records {where}; give another split")
    return found


def _example(source: DataSet, record: Record, number: int, where: str) -> Example | None:
    made = source.read(record, number)
    if not made:
        return None
    group = None if made.get("group") is None else str(made["group"])
    if source.kind == "options":
        (item,) = option_items(source, [(number, record)])
        return Example(item.pairs, str(item.gold), group)
    text, second = made.get("text", ""), made.get("second")
    if not text.strip() or (second is not None and not second.strip()):
        raise InputError(f"{where} has an empty text; leave it out with the set's `keep`, or mend the record")
    return Example(((text, second or ""),), _class(made.get("label"), where), group)


def _class(label: Any, where: str) -> str:
    if label is None or (isinstance(label, str) and not label.strip()):
        raise InputError(f"{where} has no label; give a split that has labels")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, (str, int)):
        raise InputError(f"{where} has the label {label!r}; labels are words or whole numbers")
    return str(label)


def _apart(
    examples: list[Example], others: list[Example], what: str, of: str = "training"
) -> tuple[list[Example], dict[str, int]]:
    """Those that share no text and no group with the others, and how many do."""
    texts, groups = {other.key for other in others}, {other.group for other in others} - {None}
    same_text = [example.key in texts for example in examples]
    same_group = [example.group in groups for example in examples]
    kept = [e for e, text, group in zip(examples, same_text, same_group, strict=True) if not text and not group]
    count = sum(same_text)
    counted = {
        f"{of} text equal to a {what} text": count,
        f"{of} group of a {what} text": len(examples) - len(kept) - count,
    }
    return kept, {reason: number for reason, number in counted.items() if number}


def _limited(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """At most so many, in the order of a hash of their texts, each class as near to its share as can be."""
    ordered = _by_hash(examples, [example.key for example in examples], seed)
    if limit is None or limit >= len(ordered):
        return ordered
    sizes, met = Counter(example.label for example in ordered), Counter[str]()
    places = []
    for number, example in enumerate(ordered):
        places.append(((met[example.label] + 0.5) / sizes[example.label], number))
        met[example.label] += 1
    return [ordered[number] for number in sorted(number for _, number in sorted(places)[:limit])]


def _split(examples: list[Example], share: float, seed: int, name: str) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; those of a group, or of one text, stay together."""
    owners = [str(example.key) if example.group is None else f"group {example.group}" for example in examples]
    sizes = Counter(owners)
    wanted, taken, held = max(1, round(share * len(examples))), 0, set()
    for owner in _by_hash(list(sizes), map(text_key, sizes), seed):
        if taken >= wanted or len(held) == len(sizes) - 1:
            break
        held.add(owner)
        taken += sizes[owner]
    if not held:
        raise InputError(
            f"all training records of {name} are of one group, so none can be held out; give held_out a split"
        )
    kept = [example for example, owner in zip(examples, owners, strict=True) if owner not in held]
    return kept, [example for example, owner in zip(examples, owners, strict=True) if owner in held]


def _refuse_empty(name: str, **parts: list[Example]) -> None:
    for part, examples in parts.items():
        if not examples:
            raise InputError(
                f"no {part} record of {name} is left once shared texts and groups are out; give more records"
            )


def _check_labels(name: str, training: list[Example], held_out: list[Example], test: list[Example]) -> None:
    known = {example.label for example in training}
    if len(known) < 2:
        raise InputError(f"training records of {name} have one class alone, {min(known)!r}; at least two are needed")
    known |= {example.label for example in held_out}
    for example in test:
        if example.label not in known:
            raise InputError(
                f"the test label {example.label!r} of {name} is none of training's; give more training records"
            )


def _by_hash(items: list, hashes: Iterable[int], seed: int) -> list:
    keys = keyed(np.array(list(hashes), dtype=np.uint64), seed).tolist()
    return [item for _, _, item in sorted((key, repr(item), item) for key, item in zip(keys, items, strict=True))]
