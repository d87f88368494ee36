"""Texts into token ids: a word is given to the tokenizer once, where words cannot change each other's tokens."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from transect.data.shards import Encoded

# Blanks and what follows them up to the next blank. \x1c to \x1f are blanks to Python and none to the tokenizers.
_UNIT = re.compile(r"\s*[\S\x1c-\x1f]+|\s+")
_PIECE = 1 << 22  # characters given to a tokenizer at once
_KNOWN = 1 << 19  # words remembered
_LONGEST = 1 << 23  # their tokens
Item = tuple[str, str, str]
"""Split, domain and text of a document."""


@dataclass(frozen=True, slots=True)
class Result:
    """A batch encoded, by split and domain, and the documents left out because they have no token."""

    parts: dict[tuple[str, str], Encoded]
    empty: int


class Encoder:
    """Encodes batches of documents, without special tokens but for the end token behind each.

    Names of special tokens in a text are text. Where the tokenizer cuts at blanks as GPT-2's or BERT's does, each word
    with the blanks before it is encoded once and looked up from then on; else a document of over 4,194,304 characters
    is encoded in pieces cut before a blank.
    """

    def __init__(self, rules: str, end_id: int, unknown_id: int | None, dtype: str) -> None:
        """`rules` is the content of a tokenizer.json."""
        self._raw = Tokenizer.from_str(rules)
        self._raw.encode_special_tokens = True
        self._raw.no_truncation()
        self._raw.no_padding()
        self._by_word = _cuts_at_blanks(json.loads(rules))
        self._end, self._unknown, self._dtype = end_id, unknown_id, np.dtype(dtype)
        self._forget()

    def __call__(self, items: Sequence[Item]) -> Result:
        """Encode one batch; within each split and domain documents keep their order."""
        ids, lengths = self._words(items) if self._by_word else self._whole(items)
        starts = np.cumsum(lengths) - lengths
        members: dict[tuple[str, str], list[int]] = {}
        for number, (split, domain, _) in enumerate(items):
            if lengths[number]:
                members.setdefault((split, domain), []).append(number)
        parts = {}
        for key, numbers in members.items():
            chosen = np.array(numbers)
            sizes = np.array([len(items[number][2].encode()) for number in numbers], dtype=np.int64)
            text = ids[_ranges(starts[chosen], lengths[chosen])]
            unknown = 0 if self._unknown is None else int(np.count_nonzero(text == self._unknown))
            closed = np.insert(text, np.cumsum(lengths[chosen]), self._end).astype(self._dtype)
            parts[key] = Encoded(closed, lengths[chosen] + 1, sizes, unknown)
        return Result(parts, int(np.count_nonzero(lengths == 0)))

    def _words(self, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
        if len(self._number) > _KNOWN or len(self._ids) > _LONGEST:
            self._forget()
        rows = [_UNIT.findall(text) for _, _, text in items]
        words = [word for row in rows for word in row]
        fresh = [word for word in dict.fromkeys(words) if word not in self._number]
        if fresh:
            self._learn(fresh)
        place = np.fromiter(map(self._number.__getitem__, words), dtype=np.int64, count=len(words))
        lengths = self._lengths[place]
        ids = self._ids[_ranges(self._starts[place], lengths)]
        total = np.concatenate([[0], np.cumsum(lengths)])
        ends = np.cumsum([len(row) for row in rows])
        return ids, np.diff(total[np.concatenate([[0], ends])])

    def _learn(self, words: list[str]) -> None:
        found = [encoding.ids for encoding in self._raw.encode_batch_fast(words, add_special_tokens=False)]
        first = len(self._number)
        self._number.update((word, first + place) for place, word in enumerate(words))
        lengths = np.array([len(ids) for ids in found], dtype=np.int64)
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, *(np.array(ids, dtype=np.int64) for ids in found)])

    def _forget(self) -> None:
        self._number: dict[str, int] = {}
        self._ids = self._starts = self._lengths = np.empty(0, dtype=np.int64)

    def _whole(self, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
        rows = [_pieces(text) for _, _, text in items]
        pieces = [piece for row in rows for piece in row]
        found = [encoding.ids for encoding in self._raw.encode_batch_fast(pieces, add_special_tokens=False)]
        total = np.cumsum([0, *map(len, found)])
        ends = np.cumsum([0, *map(len, rows)])
        ids = np.concatenate([np.array(row, dtype=np.int64) for row in found])
        return ids, np.diff(total[ends])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1 ... of every range, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def _pieces(text: str) -> list[str]:
    """The text cut before blanks into pieces of about _PIECE characters."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        cut = next((at for at in range(start + _PIECE, start, -1) if text[at].isspace() > text[at - 1].isspace()), 0)
        cut = cut or start + _PIECE
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _cuts_at_blanks(rules: dict[str, Any]) -> bool:
    """Whether no token can hold a blank behind another sign, nor depend on what stands across such a place."""
    if any(not token["special"] for token in rules.get("added_tokens", [])) or rules["model"].get("dropout"):
        return False
    cutter, normaliser = rules["pre_tokenizer"] or {}, rules["normalizer"] or {}
    gpt2 = cutter.get("type") == "ByteLevel" and cutter["use_regex"] and not cutter["add_prefix_space"]
    bert = cutter.get("type") == "BertPreTokenizer" and normaliser.get("type") in (None, "BertNormalizer")
    signs = not cutter and rules["model"]["type"] == "BPE" and not rules["model"]["merges"]
    return bert or ((gpt2 or signs) and not normaliser)
