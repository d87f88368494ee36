"""Masked language modelling: which tokens are asked for, and what stands in their place."""

import numpy as np

from transect.data.hashing import splitmix64
from transect.data.special import Special
from transect.models.loss import IGNORED


def wanted(available: np.ndarray, rate: float) -> np.ndarray:
    """How many of so many tokens are asked for: the rate's share, rounded, and at least one where there is any."""
    return np.minimum(np.maximum(np.rint(rate * available).astype(np.int64), 1), available)


def masked(
    ids: np.ndarray, asked: np.ndarray, draws: np.ndarray, special: Special, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and labels [sequences, positions]: a share of each sequence's tokens is hidden and asked for.

    Of the positions that may be `asked`, those with the smallest draws are chosen, `wanted` of each sequence. Of these
    80 % become the mask token, 10 % another token and 10 % stay. asked: bool; draws: uint64, independent and uniform;
    both [sequences, positions]. Labels are the original ids, -100 where nothing is asked.
    Source: arXiv 1810.04805, Appendix A.1. Differences: the number is counted over text tokens, without the special
    ones around them (at 128 positions and 15 % both give 19, within the paper's limit of 20); another token is drawn
    from those that are not special, BERT draws from the whole vocabulary.
    """
    assert special.mask is not None
    ranked = np.where(asked, draws, np.uint64(2**64 - 1))
    count = wanted(asked.sum(1), rate)
    last = np.sort(ranked, axis=1)[np.arange(len(ids)), np.maximum(count, 1) - 1]
    chosen = asked & (ranked <= last[:, None])
    rows, places = chosen.nonzero()
    originals = ids[rows, places]
    fate = splitmix64(draws[rows, places])
    share = (fate >> np.uint64(11)).astype(np.float64) / 2.0**53
    shown = np.where(share < 0.8, special.mask, np.where(share < 0.9, special.others(splitmix64(fate)), originals))
    inputs, labels = ids.copy(), np.full(ids.shape, IGNORED, dtype=np.int64)
    inputs[rows, places] = shown
    labels[rows, places] = originals
    return inputs, labels
