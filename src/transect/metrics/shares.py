"""Who raised the score: the increments of a quantity along the network, and the shares of attention and FFN."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OWNERS = ("attn", "ffn")


@dataclass(frozen=True, slots=True, eq=False)
class Shares:
    """Cumulative sums of the increments by owner [..., steps], the total and the shares [...]."""

    cumulative_mha: np.ndarray
    cumulative_ffn: np.ndarray
    total: np.ndarray
    share_mha: np.ndarray
    share_ffn: np.ndarray


def increments(levels: np.ndarray) -> np.ndarray:
    """What each sub-layer adds: levels [..., places] in the order of the network (h_0, a_1, h_1, ...) -> [..., steps].

    Signs are kept, so the sum is the last level less the first. Source: arXiv 2403.02436, our notes 3.5.
    """
    return np.diff(np.asarray(levels, np.float64), axis=-1)


def shares(levels: np.ndarray, owners: Sequence[str]) -> Shares:
    """share_FFN = sum of the FFN's increments / (last level - first level), and share_MHA likewise; they add up to 1.

    `levels` [..., places] as in `increments`, with any leading axes, such as draws of a bootstrap; `owners`, "attn" or
    "ffn" for each step, may name one more often or never: then its share is 0. Unit 1; above 1 or below 0 where the
    other lowers the score, and NaN where the total is 0, which has no shares. Raises ValueError unless there is one
    owner for each step. Source: arXiv 2403.02436, our notes 3.5; the start at h_0 and the negative increments are
    assumed.
    """
    levels = np.asarray(levels, np.float64)
    added = increments(levels)
    names = np.asarray(owners, dtype=object)
    if len(names) != added.shape[-1] or not added.shape[-1] or not set(owners) <= set(OWNERS):
        raise ValueError(f"shares: {added.shape[-1]} steps owned by {list(owners)}; give attn or ffn for each step")
    mha = np.where(names == "attn", added, 0.0).cumsum(-1)
    ffn = np.where(names == "ffn", added, 0.0).cumsum(-1)
    total = levels[..., -1] - levels[..., 0]
    divisor = np.where(total == 0, np.nan, total)
    return Shares(mha, ffn, total, mha[..., -1] / divisor, ffn[..., -1] / divisor)
