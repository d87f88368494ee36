"""Documents by number: later passes read the text again and see that it is still the same."""

from collections.abc import Iterator, Sequence

import numpy as np

from transect.data.scanning import Scan, text_hash, texts_of
from transect.data.sources import Unit
from transect.errors import InputError


class Changed(InputError):
    """A unit is not what it was at the first reading."""


class Reader:
    """Reads the scanned units again; documents have the numbers of the scan."""

    def __init__(self, units: Sequence[Unit], found: Scan, normalised: bool) -> None:
        self._units, self._found, self._normalised = units, found, normalised

    def __call__(self, wanted: np.ndarray) -> Iterator[tuple[int, str]]:
        """Number and text of the documents [documents] bool asks for, in order, out of as few units as possible.

        Raises Changed when one of them has another text than at the first reading.
        """
        number = 0
        for unit, count in zip(self._units, self._found.counts, strict=True):
            if wanted[number : number + count].any():
                yield from self._of_unit(unit, wanted, range(number, number + count))
            number += count

    def _of_unit(self, unit: Unit, wanted: np.ndarray, numbers: range) -> Iterator[tuple[int, str]]:
        at = numbers.start
        for number, (text, _) in zip(numbers, texts_of(unit, self._normalised), strict=False):
            if wanted[number]:
                if text_hash(text.encode()) != self._found.hashes[number]:
                    break
                yield number, text
            at = number + 1
        if at < numbers.stop:
            raise Changed(f"{unit.name} changed while it was read, at document {at - numbers.start}; run again")
