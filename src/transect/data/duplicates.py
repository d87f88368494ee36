"""Near-duplicates: which training documents share word sequences with an evaluation document.

A document is the set G of its 13-word sequences, words being runs of letters and digits, in lower case; in scripts
that put no blanks between words every character is one. A training document t is a near copy of an evaluation
document e when |G(t) and G(e)| >= share * min(|G(t)|, |G(e)|): one of the two is found in the other by that share.
Documents of fewer than 13 words are compared by their whole text only.

Sequences stand as 64-bit hashes, so one in about 2^64 / |G(e)| agrees by chance. A sequence that stands in more than 64
evaluation documents counts for the first 64 of them, which bounds the time by a constant for each word; memory is
about 20 bytes for each word of evaluation text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from transect.data.hashing import splitmix64

WORDS = 13
_MOST = 64  # evaluation documents that one sequence counts for
_FACTOR = 0x9E3779B97F4A7C15  # odd, so no word is lost
_WORD = re.compile(r"[^\W_]+")
# Thai to Myanmar, Khmer, kana, Han and Hangul-free neighbours: scripts without blanks between words.
_NO_BLANKS = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD_OR_SIGN = re.compile(rf"[{_NO_BLANKS}]|[^\W_{_NO_BLANKS}]+")


def sequences(text: str) -> np.ndarray:
    """Sorted distinct uint64 hashes of the text's 13-word sequences; empty below 13 words. Linear but for the sort."""
    lower = text.lower()
    found = (_WORD if lower.isascii() else _WORD_OR_SIGN).findall(lower)
    count = len(found) - WORDS + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    words = splitmix64(np.fromiter((crc32(word.encode()) for word in found), dtype=np.uint64, count=len(found)))
    total = np.zeros(count, dtype=np.uint64)
    for place in range(WORDS):
        total = total * np.uint64(_FACTOR) + words[place : place + count]
    return np.unique(splitmix64(total))


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The sequences of all evaluation documents, and the documents each stands in."""

    hashes: np.ndarray  # [sequences] uint64, sorted, distinct
    first: np.ndarray  # [sequences + 1] int64: where each one's documents begin in `owners`
    owners: np.ndarray  # int32 numbers of documents
    sizes: np.ndarray  # [documents] int64: |G(e)|

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Index":
        """The index of evaluation documents; those under 13 words take no part."""
        sets = [found for found in map(sequences, texts) if len(found)]
        sizes = np.array([len(found) for found in sets], dtype=np.int64)
        every = np.concatenate([*sets, np.empty(0, dtype=np.uint64)])
        owner = np.repeat(np.arange(len(sets), dtype=np.int32), sizes)
        order = np.argsort(every, kind="stable")  # equal ones stay in the documents' order
        hashes, start, count = np.unique(every[order], return_index=True, return_counts=True)
        kept = np.minimum(count, _MOST)
        first = np.concatenate([[0], np.cumsum(kept)])
        taken = np.arange(first[-1]) + np.repeat(start - first[:-1], kept)
        return cls(hashes, first, owner[order][taken], sizes)

    def has_copy_of(self, text: str, share: float) -> bool:
        """Whether a text is a near copy of a document of the index."""
        own = sequences(text)
        if not len(own) or not len(self.hashes):
            return False
        place = np.minimum(np.searchsorted(self.hashes, own), len(self.hashes) - 1)
        place = place[self.hashes[place] == own]
        if not len(place):
            return False
        begin = self.first[place]
        counts = self.first[place + 1] - begin
        ends = np.cumsum(counts)
        owners = self.owners[np.arange(ends[-1]) + np.repeat(begin - (ends - counts), counts)]
        document, shared = np.unique(owners, return_counts=True)
        return bool((shared >= share * np.minimum(len(own), self.sizes[document])).any())

    def save(self, folder: Path) -> None:
        """Write the arrays into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.__slots__:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """The index in a folder; its arrays stay on disk, so that processes share them."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__slots__))
