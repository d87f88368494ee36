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
        )


def sample_tokens(dataset: Dataset, count: int, seed: int = 0) -> np.ndarray:
    """[min(count, tokens)] int64 indices into `dataset.ids` with the smallest hash of (seed, document, position).

    They come in the order of that hash, so neither the choice nor its order depends on the documents' order.
    """
    sizes = np.bincount(dataset.document, weights=dataset.lengths, minlength=dataset.num_documents).astype(np.int64)
    position = np.arange(dataset.num_tokens) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    document = np.repeat(dataset.document_hash, sizes)
    start = splitmix64(np.array([seed % 2**64], dtype=np.uint64))
    hashes = splitmix64(splitmix64(document ^ start) ^ position.astype(np.uint64))
    count = min(count, dataset.num_tokens)
    border = np.partition(hashes, count - 1)[count - 1]
    chosen = np.flatnonzero(hashes <= border)
    order = np.lexsort((position[chosen], document[chosen], hashes[chosen]))
    return chosen[order][:count]
