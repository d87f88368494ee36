"""Documents one after another, cut into windows that do not ask where a document ends."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from transect.data.corpus import Part


class Stream:
    """The documents of some domains, domain after domain, as one ring of tokens.

    Every document is followed by its end token and, where `lead` is given, preceded by that token, which then belongs
    to it. Nothing is kept but where each domain begins: any window costs the reading of its own tokens.
    """

    def __init__(self, parts: Sequence[Part], lead: int | None) -> None:
        self._parts = [_Domain(part, lead) for part in parts if part.documents]
        self._begins = np.cumsum([0, *(part.tokens for part in self._parts)]).tolist()

    @property
    def tokens(self) -> int:
        """Tokens once around the ring, end tokens and leading ones included."""
        return self._begins[-1]

    def windows(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 and firsts bool [windows, length]: tokens from each start on, and where a document begins."""
        ids = np.empty((len(starts), length), dtype=np.int64)
        firsts = np.zeros((len(starts), length), dtype=bool)
        for row, start in enumerate(starts.tolist()):
            done, at = 0, start
            while done < length:
                domain = bisect_right(self._begins, at) - 1
                take = min(length - done, self._begins[domain + 1] - at)
                piece = slice(done, done + take)
                self._parts[domain].fill(at - self._begins[domain], ids[row, piece], firsts[row, piece])
                done, at = done + take, (at + take) % self.tokens
        return ids, firsts


def document_ids(firsts: np.ndarray) -> np.ndarray:
    """[windows, positions] int64: 0 for the document that a window begins in, 1 for the next one, and so on."""
    numbers = firsts.astype(np.int64)
    numbers[:, 0] = 0
    return np.cumsum(numbers, axis=1, out=numbers)


class _Domain:
    """One domain's part of the ring."""

    def __init__(self, part: Part, lead: int | None) -> None:
        self._part, self._lead, self._extra = part, lead, int(lead is not None)
        self._offsets = np.asarray(part.offsets)  # a plain view: looking up one number of a memory map is slow
        self.tokens = int(part.tokens) + self._extra * int(part.documents)

    def fill(self, start: int, ids: np.ndarray, firsts: np.ndarray) -> None:
        """Write the tokens from `start` on, and where documents begin."""
        count = len(ids)
        first = bisect_right(range(self._part.documents), start, key=self._begin) - 1
        following = np.arange(first + 1, min(first + 1 + count, self._part.documents))
        begins = self._offsets[following] + self._extra * following - start
        firsts[begins[: np.searchsorted(begins, count)]] = True
        into = start - self._begin(first)
        firsts[0] = into == 0
        if self._lead is None:
            ids[:] = self._part.read(start, count)
            return
        position = int(self._offsets[first]) + max(into - 1, 0)
        ids[~firsts] = self._part.read(position, count - int(firsts.sum()))
        ids[firsts] = self._lead

    def _begin(self, document: int) -> int:
        return int(self._offsets[document]) + self._extra * document
