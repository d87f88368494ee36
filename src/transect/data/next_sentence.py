"""Pairs of texts: A and what follows it, or A and a piece of another document."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transect.data.corpus import Part
from transect.data.order import Purpose, below, draws
from transect.errors import InputError

SPECIAL_TOKENS = 3
"""[CLS] A [SEP] B [SEP]"""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts [tokens] int64, without special tokens; `other`: B is from another document."""

    first: np.ndarray
    second: np.ndarray
    other: bool


class Pairs:
    """Documents cut into pieces, and each piece into A and B.

    A document of n tokens has ceil(n / room) pieces of nearly equal length; where they have room to spare, the cuts
    between them move from epoch to epoch. A piece is cut in two anywhere. In every second one on average, B is then
    replaced by as many tokens from anywhere in another document, fewer where that is shorter; the tokens it had are not
    seen in that epoch. Documents of a single token have no pieces.
    Source: arXiv 1810.04805, section 3.1. Differences: cuts are between tokens, as a corpus knows no sentences; no
    sequence is shortened on purpose (BERT: 10 %). Cost: 8 bytes for each document.
    Raises InputError where fewer than two documents have two tokens.
    """

    def __init__(self, parts: Sequence[Part], room: int, seed: int, where: str) -> None:
        self._parts, self._room, self._seed = parts, room, seed
        self._begins = np.cumsum([0, *(part.documents for part in parts)])
        counts = [_pieces(np.diff(part.offsets) - 1, room) for part in parts]
        self._ends = np.cumsum(np.concatenate(counts)) if counts else np.zeros(0, dtype=np.int64)
        documents = sum(int(np.count_nonzero(count)) for count in counts)
        if documents < 2:
            raise InputError(
                f"{where} has {documents} documents of two tokens or more; data.next_sentence needs two, so that a "
                "text can come from another document; set it to false or prepare more text"
            )

    @property
    def count(self) -> int:
        """Pieces in an epoch."""
        return int(self._ends[-1])

    def make(self, pieces: np.ndarray, epochs: np.ndarray, samples: np.ndarray) -> list[Pair]:
        """The pairs that these samples of the run make of these pieces, in these epochs; all [pairs] int64."""
        chance = draws(self._seed, Purpose.PAIR, samples[:, None], np.arange(4))
        document, number, total = self._find(pieces)
        part, begin, length = self._texts(document)
        moved = draws(self._seed, Purpose.CUT, document, epochs)
        start, end = (self._cuts(place, total, length, moved) for place in (number, number + 1))
        middle = start + 1 + below(chance[:, 0], end - start - 1)
        other = (chance[:, 1] >> np.uint64(63)).astype(bool)
        # A piece of another document: those of this one are stepped over.
        found = below(chance[:, 2], self.count - total)
        found += np.where(found >= pieces - number, total, 0)
        far_part, far_begin, far_length = self._texts(self._find(found)[0])
        size = end - middle
        far_size = np.minimum(size, far_length)
        far_begin = far_begin + below(chance[:, 3], far_length - far_size + 1)
        second = np.where(
            other, np.stack([far_part, far_begin, far_size]), np.stack([part, begin + middle, size])
        ).T.tolist()
        first = np.stack([part, begin + start, middle - start], axis=1).tolist()
        rows = zip(first, second, other.tolist(), strict=True)
        return [Pair(self._read(*a), self._read(*b), far) for a, b, far in rows]

    def _read(self, part: int, begin: int, size: int) -> np.ndarray:
        return self._parts[part].read(begin, size)

    def _find(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The document of each piece, the piece's number in it, and how many it has."""
        document = np.searchsorted(self._ends, pieces, side="right")
        before = np.where(document > 0, self._ends[document - 1], 0)
        return document, pieces - before, self._ends[document] - before

    def _texts(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The part that each document is in, its first token there and its length without the end token."""
        part = np.searchsorted(self._begins, documents, side="right") - 1
        begin, end = np.empty_like(documents), np.empty_like(documents)
        for one in np.unique(part):
            here = part == one
            local = documents[here] - self._begins[one]
            begin[here], end[here] = self._parts[one].offsets[local], self._parts[one].offsets[local + 1]
        return part, begin, end - begin - 1

    def _cuts(self, place: np.ndarray, total: np.ndarray, length: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Where piece number `place` begins: no piece is longer than the room or shorter than two tokens."""
        even = place * length // total
        spare = np.maximum(np.minimum(self._room - -(-length // total), length // total - 2), 0)
        inner = (place > 0) & (place < total)
        return even + np.where(inner, below(moved, 2 * spare + 1) - spare, 0)


def _pieces(lengths: np.ndarray, room: int) -> np.ndarray:
    return np.where(lengths < 2, 0, -(-lengths // room))


def laid_out(
    pairs: Sequence[Pair], length: int, start: int, end: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, token types (0 for [CLS] A [SEP], 1 for B [SEP]) and 1 at real tokens, all [pairs, length] int64."""
    ids = np.full((len(pairs), length), pad, dtype=np.int64)
    types, real = np.zeros_like(ids), np.zeros_like(ids)
    for row, pair in enumerate(pairs):
        border = len(pair.first) + 2
        stop = border + len(pair.second) + 1
        ids[row, 0], ids[row, border - 1], ids[row, stop - 1] = start, end, end
        ids[row, 1 : border - 1] = pair.first
        ids[row, border : stop - 1] = pair.second
        types[row, border:stop] = 1
        real[row, :stop] = 1
    return ids, types, real
