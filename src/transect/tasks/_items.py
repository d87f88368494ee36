"""Items of likelihood tasks: pairs of context and continuation, with the right one; shots before them; accuracies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transect.data.order import Purpose, draws
from transect.errors import InputError
from transect.metrics.errors import bootstrap
from transect.results import Row
from transect.tasks._documents import text_key
from transect.tasks._records import Record
from transect.tasks._sets import DataSet
from transect.tasks.base import named


@dataclass(frozen=True, slots=True)
class Item:
    """One question: a context and a continuation for each option, which one is right, the options as they stand."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    options: tuple[str, ...]

    @property
    def key(self) -> int:
        """A hash of its text."""
        return text_key("\x1f".join(f"{context}\x1e{continuation}" for context, continuation in self.pairs))


def limited(records: list[Record], limit: int | None) -> list[tuple[int, Record]]:
    """The records with their numbers; of more than `limit` those with the smallest hash of their number."""
    numbered = list(enumerate(records))
    if limit is None or len(records) <= limit:
        return numbered
    keys = draws(0, Purpose.EVALUATION, np.arange(len(records)))
    kept = np.sort(np.argsort(keys, kind="stable")[:limit])
    return [numbered[number] for number in kept]


def option_items(chosen: DataSet, records: list[tuple[int, Record]]) -> list[Item]:
    """The items of a set of options; raises InputError for a record without a right option or with less than two."""
    items = []
    for number, record in records:
        made = chosen.read(record, number)
        if not made:
            continue
        where = f"record {number} of {chosen.name}"
        options = [str(one) for one in made.get("options") or ()]
        contexts = [str(one) for one in made["contexts"]] if "contexts" in made else [made.get("context", "")]
        if len(contexts) > 1 and len(options) == 1:
            options *= len(contexts)
        if len(contexts) == 1:
            contexts *= len(options)
        if len(options) < 2 or len(contexts) != len(options):
            raise InputError(
                f"{where} has {len(options)} options for {len(contexts)} contexts; give two or more of both"
            )
        if any(not option.strip() for option in options):
            raise InputError(f"{where} has an option without text; mend or remove it")
        gold = _gold(made.get("gold"), options, [str(one) for one in made.get("labels") or ()], where)
        spaced = [
            option if not context or context[-1:].isspace() else f"{chosen.delimiter}{option}"
            for context, option in zip(contexts, options, strict=True)
        ]
        items.append(Item(tuple(zip(contexts, spaced, strict=True)), gold, tuple(options)))
    if not items:
        raise InputError(f"{chosen.name} has no items; give a file with some")
    return items


def _gold(given: Any, options: Sequence[str], labels: Sequence[str], where: str) -> int:
    if isinstance(given, bool):
        given = int(given)
    if isinstance(given, int) and 0 <= given < len(options):
        return given
    for known in (labels, options):
        if isinstance(given, str) and given in known:
            return list(known).index(given)
    raise InputError(
        f"{where} has the right option {given!r}; it must be 0 to {len(options) - 1}, a label or an option"
    )


def accuracies(right: dict[str, np.ndarray], keys: np.ndarray, like: Row, metric: str = "accuracy") -> list[Row]:
    """A row for each rule: the mean over items of what is in `right` [items], with errors over items."""
    names = list(right)
    sums = np.column_stack([*right.values(), np.ones(len(keys))])
    values, errors = bootstrap(sums, keys, lambda totals: totals[:, :-1] / totals[:, -1:], seed=0)
    return [
        _of(like, metric, name, keys).measured(float(value), error)
        for name, value, error in zip(names, values, errors, strict=True)
    ]


def mean_row(values: np.ndarray, keys: np.ndarray, like: Row, made: Callable[[np.ndarray], np.ndarray]) -> Row:
    """`like` with a statistic of the mean of values [items], with errors over items."""
    sums = np.column_stack([values, np.ones(len(keys))])
    found, errors = bootstrap(sums, keys, lambda totals: made(totals[:, 0] / totals[:, 1])[:, None], seed=0)
    return _of(like, like.metric, like.variant, keys).measured(float(found[0]), errors[0])


def _of(like: Row, metric: str, variant: str | None, keys: np.ndarray) -> Row:
    data = named(str(like.domain), keys)
    return replace(like, metric=metric, variant=variant, n=len(keys), documents=len(keys), data=data)
