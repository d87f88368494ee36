"""Option scoring: which of several continuations a model finds likeliest, with and without examples before them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from transect.data.order import Purpose, draws
from transect.errors import InputError
from transect.results import Row
from transect.tasks._encoding import Reader
from transect.tasks._items import Item, accuracies, limited, option_items
from transect.tasks._scoring import Request
from transect.tasks._sets import data_set
from transect.tasks.base import Subject, Task

LENGTHS = ("", " per token", " per character")
_ORDERS = ("drawn", "first")


@dataclass(frozen=True, kw_only=True)
class Options(Task):
    """Accuracy of the option with the highest score, for each rule of scoring.

    Rules: `option`, log p(option | context), or `whole`, log p(context and option), from the second token of the item's
    own text on where nothing stands before it; each as it is, ` per token` (divided by its tokens) and ` per character`
    (by the option's, or the whole text's, characters); and, with `unconditional`, `option less unconditional`: less log
    p(option | what the set says stands before an option alone), before it is divided. `best` is the rule with the
    highest accuracy on these items, as the paper reports it: chosen on what it is judged on, so it is too high. Where
    contexts differ and the continuation is the same (Winograd), the option's log-probability is that of the
    continuation. With shots k, k examples of `shot_split` stand before each item, other than it, drawn anew for every
    item and draw by (seed, draw, item), or with order `first` the first k; accuracies are means over draws.
    gold_probability: softmax over the options' log-probabilities, of the right one.

    Range and unit: 0..1; `chance` is the mean of 1 / options. Errors are over items.
    Source: arXiv 2403.02436, few-shot (how its three choices combine is not said); `option` and `option per character`
    are acc and acc_norm of lm-evaluation-harness 0.4. Ties go to the first option, as there.
    Raises: InputError for an option longer than the model's context, missing or wrong right options.
    Cost: a forward pass over context and option for each option; with `unconditional` one over each option alone.
    """

    title: ClassVar[str] = "Choice among options, zero and k shots"
    source: ClassVar[str] = "arXiv 2403.02436, few-shot"

    split: str = "test"
    limit: int | None = None
    shots: int = 0
    draws: int = 1
    shot_split: str = "train"
    order: str = "drawn"
    unconditional: bool = True
    length: int | None = None

    def __post_init__(self) -> None:
        if self.shots < 0 or self.draws < 1 or (self.limit is not None and self.limit < 1):
            raise InputError("options: shots is 0 or more, draws and limit 1 or more")
        if self.order not in _ORDERS:
            raise InputError(f"options.order is {self.order!r}; allowed are {', '.join(_ORDERS)}")

    def check(self, subject: Subject) -> None:
        """The records are there, every one can be read, and every option fits the model."""
        chosen = data_set(self.data, "options")
        items = option_items(chosen, limited(chosen.records(self.split, subject.folders), self.limit))
        if self.shots and len(self._examples(subject)) <= self.shots:
            raise InputError(f"options.shots is {self.shots}; {self.data} has too few examples in {self.shot_split}")
        reader = Reader.of(subject, self.length)
        for item in items:
            for context, option in item.pairs:
                reader.pair(context, option)

    def rows(self, subject: Subject) -> Iterator[Row]:
        """Accuracy by rule, the best rule, the right option's probability, and chance."""
        chosen = data_set(self.data, "options")
        items = option_items(chosen, limited(chosen.records(self.split, subject.folders), self.limit))
        reader = Reader.of(subject, self.length)
        keys = np.array([item.key for item in items], dtype=np.uint64)
        right: dict[str, np.ndarray] = {}
        probability = np.zeros(len(items))
        draws_made = self.draws if self.shots else 1
        for draw in range(draws_made):
            shots = self._shots(subject, items, chosen.shot_delimiter, draw)
            scores = _scores(reader, items, shots, chosen.unconditional if self.unconditional else None, subject)
            for rule, of_items in scores.items():
                hits = [int(np.argmax(found)) == item.gold for found, item in zip(of_items, items, strict=True)]
                right[rule] = right.get(rule, 0) + np.array(hits, dtype=np.float64) / draws_made
            plain = zip(scores["option"], items, strict=True)
            probability += np.array([_softmax(found)[item.gold] for found, item in plain]) / draws_made
        how = f"{self.shots}-shot" + (f", {draws_made} draws" if draws_made > 1 else "")
        like = Row(metric="accuracy", value=0.0, unit="1", domain=self.label, split=self.split)
        best = max(right, key=lambda rule: right[rule].mean())
        named = {f"{how}: {rule}": hits for rule, hits in right.items()} | {f"{how}: best ({best})": right[best]}
        named["chance"] = np.array([1 / len(item.pairs) for item in items])
        yield from accuracies(named, keys, like)
        yield from accuracies({how: probability}, keys, like, "gold_probability")

    def _examples(self, subject: Subject) -> list[Item]:
        chosen = data_set(self.data, "options")
        return option_items(chosen, list(enumerate(chosen.records(self.shot_split, subject.folders))))

    def _shots(self, subject: Subject, items: list[Item], delimiter: str, draw: int) -> list[str]:
        """What stands before each item."""
        if not self.shots:
            return [""] * len(items)
        examples = self._examples(subject)
        texts = ["".join(example.pairs[example.gold]) for example in examples]
        alike: dict[tuple, set[int]] = {}
        for place, example in enumerate(examples):
            alike.setdefault(example.pairs, set()).add(place)
        places, made = np.arange(len(examples)), []
        for number, item in enumerate(items):
            order = places
            if self.order == "drawn":
                key = draws(subject.seed, Purpose.EVALUATION, np.array([draw]), np.array([number]), places)
                order = np.argsort(key, kind="stable")
            own = alike.get(item.pairs, set())
            chosen = [place for place in order[: self.shots + len(own)].tolist() if place not in own][: self.shots]
            made.append("".join(texts[place] + delimiter for place in chosen))
        return made


def _scores(
    reader: Reader, items: list[Item], shots: list[str], unconditional: str | None, subject: Subject
) -> dict[str, list[np.ndarray]]:
    """The options' scores of each item [options], by rule."""
    requests: list[Request] = []
    cuts, lengths = [], []
    for item, before in zip(items, shots, strict=True):
        for (context, option), shown in zip(item.pairs, item.options, strict=True):
            whole = reader.pair(before + context, option)
            own = _own_start(reader, before, context, whole)
            cuts.append(whole.first - own)
            lengths.append((len(shown), len(context) + len(option)))
            requests.append(Request(whole.ids, own, whole.last))
    alone = [] if unconditional is None else [reader.pair(unconditional, pair[1]) for i in items for pair in i.pairs]
    scored = reader.score([*requests, *alone], subject.tick)
    found: dict[str, list[np.ndarray]] = {}
    for kind in ("option", "whole", "option less unconditional") if alone else ("option", "whole"):
        values = np.empty((len(requests), len(LENGTHS)))
        for number, cut in enumerate(cuts):
            nats = scored[number].nats if kind == "whole" else scored[number].nats[cut:]
            total = nats.sum() - (scored[len(requests) + number].total if "less" in kind else 0.0)
            values[number] = total, total / len(nats), total / max(lengths[number][kind == "whole"], 1)
        for column, length in enumerate(LENGTHS):
            found[kind + length] = _by_item(values[:, column], items)
    return found


def _own_start(reader: Reader, before: str, context: str, whole: Request) -> int:
    """Where the item's own text begins to be asked for: behind the shots, or behind the first token."""
    own = len(reader.encode((before + context).rstrip())) if before + context else 0
    own -= len(reader.encode(before.rstrip())) if before else 0
    least = max(1, len(reader.prefix)) if reader.causal else len(reader.prefix)
    return min(whole.first, max(least, whole.first - own))


def _by_item(values: np.ndarray, items: list[Item]) -> list[np.ndarray]:
    ends = np.cumsum([len(item.pairs) for item in items])
    return np.split(values, ends[:-1])


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()
