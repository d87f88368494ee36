"""Items made of the speeches that come with the package, so that every kind of task runs without any download.

They are ours and no standard benchmark: they show that a task works, and order models that are trained small.
"""

import gzip
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from transect.data.order import Purpose, below, draws
from transect.errors import InputError

LATER = 1950  # the first year of the speeches that corpora of the built-in text keep apart
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_OPTIONS = 4
_NEAR = 12  # sentences that are next shorter, and next longer, of which wrong options are drawn
_TEST_SHARE = 4  # one speech in so many is for the test of a labelled set
_SHORTEST, _LONGEST = 40, 240  # characters of a sentence that is used
_ERAS = ((1870, "to 1869"), (1950, "1870 to 1949"), (10_000, "from 1950"))
Item = dict[str, object]


@cache
def speeches() -> tuple[tuple[int, str], ...]:
    """Year and text of every speech."""
    file = Path(__file__).parents[1] / "data" / "sotu.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        found = [json.loads(line) for line in handle]
    return tuple((int(record["title"][:4]), record["text"]) for record in found)


def records(name: str, split: str) -> list[Item]:
    """The records of a set made of the speeches; the same in every call. Raises InputError for an unknown name.

    Those without training examples are made of speeches from 1950 on for `test`, of earlier ones for `train`.
    """
    if name not in _MAKERS:
        raise InputError(f"unknown built-in set {name!r}; there are {', '.join(_MAKERS)}")
    return list(_MAKERS[name](split))


def _sentences(split: str) -> list[list[str]]:
    """The sentences of each speech of a split of the sets for likelihoods."""
    chosen = [text for year, text in speeches() if (year >= LATER) == (split == "test")]
    return [_SENTENCE.split(" ".join(text.split())) for text in chosen]


def _usable(sentence: str) -> bool:
    return _SHORTEST <= len(sentence) <= _LONGEST


def _draw(number: int, limit: int, what: int) -> int:
    return int(below(draws(what, Purpose.EVALUATION, np.array([number])), limit)[0])


def _continuation(split: str) -> Iterator[Item]:
    """Two sentences, and which of four comes next: three are from other speeches and of about the same length."""
    told = _sentences(split)
    pool = sorted({(len(s), s, n) for n, speech in enumerate(told) for s in speech if _usable(s)})
    count = 0
    for number, speech in enumerate(told):
        for at in range(0, len(speech) - 2, 3):
            first, second, right = speech[at : at + 3]
            if not (_usable(first) and _usable(second) and _usable(right)):
                continue
            near = bisect_left(pool, (len(right), right, number))
            window = pool[max(0, near - _NEAR) : near + _NEAR + 1]
            others = [text for _, text, owner in window if owner != number and text != right]
            if len(others) < _OPTIONS:
                continue
            key = draws(1, Purpose.EVALUATION, np.array([count]), np.arange(len(others)))
            wrong = [others[place] for place in np.argsort(key, kind="stable")[: _OPTIONS - 1]]
            gold = _draw(count, _OPTIONS, 2)
            yield {"context": f"{first} {second}", "options": [*wrong[:gold], right, *wrong[gold:]], "gold": gold}
            count += 1


def _word_order(split: str) -> Iterator[Item]:
    """A sentence, and the same with two neighbouring words exchanged."""
    count = 0
    for speech in _sentences(split):
        for sentence in speech:
            words = sentence.split()
            places = [
                i
                for i in range(1, len(words) - 2)
                if words[i].isalpha() and words[i + 1].isalpha() and words[i].islower() and words[i + 1].islower()
                if words[i] != words[i + 1]
            ]
            if not _usable(sentence) or not places:
                continue
            at = places[_draw(count, len(places), 3)]
            changed = [*words[:at], words[at + 1], words[at], *words[at + 2 :]]
            yield {"good": " ".join(words), "bad": " ".join(changed)}
            count += 1


def _last_word(split: str) -> Iterator[Item]:
    """A passage of four sentences cut behind a word that it has used before."""
    for speech in _sentences(split):
        for at in range(0, len(speech) - 3, 2):
            passage = " ".join(speech[at : at + 4]).split()
            known = {word.strip(".,;:!?") for word in passage[: len(passage) // 2]}
            for place in range(len(passage) - 1, len(passage) // 2, -1):
                word = passage[place].strip(".,;:!?")
                if len(word) >= 5 and word.isalpha() and word.islower() and word in known:
                    yield {"text": " ".join([*passage[:place], word])}
                    break


def _speeches_of(split: str) -> Iterator[tuple[int, int, list[str]]]:
    """Number, year and sentences of the speeches of a split of the labelled sets."""
    for number, (year, text) in enumerate(speeches()):
        if (number % _TEST_SHARE == 1) == (split == "test"):
            yield number, year, _SENTENCE.split(" ".join(text.split()))


def _era(split: str) -> Iterator[Item]:
    """Three sentences, and which of three eras they are from."""
    for number, year, sentences in _speeches_of(split):
        label = next(name for end, name in _ERAS if year < end)
        for at in range(0, len(sentences) - 2, 3):
            text = " ".join(sentences[at : at + 3])
            if 3 * _SHORTEST <= len(text) <= 3 * _LONGEST:
                yield {"text": text, "label": label, "group": str(number)}


def _next_sentence(split: str) -> Iterator[Item]:
    """Two sentences of a speech, and whether the second follows the first."""
    count = 0
    for number, _, sentences in _speeches_of(split):
        for at in range(0, len(sentences) - 1, 2):
            first, second = sentences[at : at + 2]
            follows = bool(count % 2)
            if not follows:
                away = 3 + _draw(count, max(len(sentences) - 6, 1), 4)
                second = sentences[(at + away) % len(sentences)]
            if _usable(first) and _usable(second):
                yield {
                    "text": first,
                    "second": second,
                    "label": "follows" if follows else "does not",
                    "group": str(number),
                }
                count += 1


_MAKERS = {
    "continuation": _continuation,
    "word_order": _word_order,
    "last_word": _last_word,
    "era": _era,
    "next_sentence": _next_sentence,
}
