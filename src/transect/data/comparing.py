"""Which train documents are near copies of evaluation documents: one pass over each, in several processes."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from transect.data.duplicates import Index
from transect.data.pool import in_order
from transect.data.rereading import Reader
from transect.data.scanning import OOD, TRAIN, VALID, Scan

_BATCH = 1 << 20  # characters
_FOLDER = "sequences"
Batch = list[tuple[int, str]]


class _Comparer:
    def __init__(self, folder: Path, share: float) -> None:
        self._index, self._share = Index.load(folder), share

    def __call__(self, batch: Batch) -> list[int]:
        return [number for number, text in batch if self._index.has_copy_of(text, self._share)]


def near_copies(
    read: Reader, found: Scan, share: float, workers: int, work: Path, advance: Callable[[int, int], None]
) -> np.ndarray:
    """[copies] int64 numbers of the train documents that are near copies, sorted; see `duplicates`."""
    index = Index.of(text for _, text in read(found.is_role(VALID, OOD)))
    if not len(index.sizes):
        return np.empty(0, dtype=np.int64)
    folder = work / _FOLDER
    index.save(folder)
    wanted = found.is_role(TRAIN)
    total = int(found.sizes[wanted].sum())
    results = in_order(partial(_Comparer, folder, share), _batches(read(wanted), found, total, advance), workers)
    return np.array([number for result in results for number in result], dtype=np.int64)


def _batches(
    documents: Iterator[tuple[int, str]], found: Scan, total: int, advance: Callable[[int, int], None]
) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for number, text in documents:
        batch.append((number, text))
        characters += len(text)
        advance(int(found.sizes[number]), total)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
