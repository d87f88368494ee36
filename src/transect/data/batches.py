"""Sequences as padded tensors, and samples of tokens that do not depend on the documents' order."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from transect.data.dataset import Dataset
from transect.data.hashing import splitmix64


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some sequences, padded on the right."""

    ids: torch.Tensor  # [batch, positions] int64
    mask: torch.Tensor  # [batch, positions] bool, True = real token
    special: torch.Tensor  # [batch, positions] bool
    sequence: torch.Tensor  # [batch] int64 index of the sequence in the dataset
    token: torch.Tensor  # [batch, positions] int64 index of each token in the dataset, that of the first in padding
    target: torch.Tensor | None = None  # [batch, positions] int64, -1 = none; of a dataset with targets


def batches(
    dataset: Dataset, sequences: np.ndarray, batch_size: int, pad_id: int = 0, full_width: bool = False
) -> Iterator[Batch]:
    """The given sequences in the given order, padded to the longest of the batch, or to seq_len with `full_width`."""
    for at in range(0, len(sequences), batch_size):
        chosen = np.asarray(sequences[at : at + batch_size], dtype=np.int64)
        starts, lengths = dataset.starts[chosen], dataset.lengths[chosen]
        place = np.arange(dataset.seq_len if full_width else lengths.max())
        mask = place < lengths[:, None]
        index = np.where(mask, starts[:, None] + place, 0)
        yield Batch(
            ids=torch.from_numpy(np.where(mask, dataset.ids[index].astype(np.int64), pad_id)),
            mask=torch.from_numpy(mask),
            special=torch.from_numpy(dataset.special[index] & mask),
            sequence=torch.from_numpy(chosen),
            token=torch.from_numpy(index),
            target=None if dataset.target is None else torch.from_numpy(_targets(dataset.target, index, mask)),
        )


def _targets(target: np.ndarray, index: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, target[index].astype(np.int64), -1)


def token_keys(dataset: Dataset, seed: int) -> np.ndarray:
    """[tokens] uint64 hash of (seed, document, position), which does not depend on the documents' order."""
    return _keys_and_places(dataset, seed)[0]


def _keys_and_places(dataset: Dataset, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sizes = np.bincount(dataset.document, weights=dataset.lengths, minlength=dataset.num_documents).astype(np.int64)
    position = np.arange(dataset.num_tokens) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    document = np.repeat(dataset.document_hash, sizes)
    start = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    return splitmix64(splitmix64(document ^ start) ^ position.astype(np.uint64)), document, position


def sample_tokens(dataset: Dataset, count: int, seed: int = 0, among: np.ndarray | None = None) -> np.ndarray:
    """[min(count, tokens)] int64 indices into `dataset.ids` with the smallest hash of (seed, document, position).

    They come in the order of that hash, so neither the choice nor its order depends on the documents' order. `among`
    [tokens] bool leaves only some tokens to choose from.
    """
    hashes, document, position = _keys_and_places(dataset, seed)
    open_to = np.arange(dataset.num_tokens) if among is None else np.flatnonzero(among)
    count = min(count, len(open_to))
    if not count:
        return open_to
    border = np.partition(hashes[open_to], count - 1)[count - 1]
    chosen = open_to[hashes[open_to] <= border]
    order = np.lexsort((position[chosen], document[chosen], hashes[chosen]))
    return chosen[order][:count]
