"""Which token each position is asked for: the next one, or the original one where the input was masked."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from transect.data.batches import token_keys
from transect.data.dataset import Dataset
from transect.data.hashing import splitmix64
from transect.errors import InputError

KINDS = ("causal", "masked")
NONE = -1
"""The target of a position that is asked for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A language-modelling objective.

    causal: the target is the next token of the same sequence. masked: `rate` of the tokens are targets; of these 80 %
    are replaced by `mask_id`, 10 % by a random id, 10 % stay. Tokens that the tokenizer added are never targets.
    Source: arXiv 1810.04805 for the masked objective; difference: each position draws by a hash of (seed, document,
    position), so neither batches nor the order of documents matter.
    """

    kind: Literal["causal", "masked"]
    mask_id: int | None = None
    rate: float = 0.15

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"objective {self.kind!r} is unknown; allowed are {', '.join(KINDS)}")
        if self.kind == "masked" and self.mask_id is None:
            raise InputError("the masked objective needs the id of the mask token, mask_id")
        if not 0 < self.rate < 1:
            raise InputError(f"mask_rate is {self.rate}; it lies between 0 and 1")

    @property
    def changes_input(self) -> bool:
        """Whether the model must read other tokens than the text's."""
        return self.kind == "masked"


def with_targets(data: Dataset, objective: Objective, vocab_size: int, seed: int) -> Dataset:
    """The dataset with a target for each token, NONE where there is none, and masked inputs where asked for.

    Raises InputError when no token is a target.
    """
    masked = objective.kind == "masked"
    new = _masked(data, objective, vocab_size, seed) if masked else replace(data, target=_next(data))
    assert new.target is not None
    if not bool((new.target != NONE).any()):
        raise InputError(f"the text has no {objective.kind} target: its {data.num_tokens} tokens are too few")
    return new


def _next(data: Dataset) -> np.ndarray:
    target = np.full(data.num_tokens, NONE, dtype=np.int32)
    target[:-1] = np.where(data.special[1:], NONE, data.ids[1:])
    target[data.starts + data.lengths - 1] = NONE
    return target


def _masked(data: Dataset, objective: Objective, vocab_size: int, seed: int) -> Dataset:
    chosen_by = token_keys(data, seed)
    changed_by, drawn_by = splitmix64(chosen_by), splitmix64(splitmix64(chosen_by))
    chosen = (_share(chosen_by) < objective.rate) & ~data.special
    fate = _share(changed_by)
    assert objective.mask_id is not None
    ids = np.where(chosen & (fate < 0.8), objective.mask_id, data.ids)
    random = (drawn_by % np.uint64(vocab_size)).astype(np.int32)
    ids = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, ids).astype(np.int32)
    return replace(data, ids=ids, target=np.where(chosen, data.ids, NONE).astype(np.int32))


def _share(keys: np.ndarray) -> np.ndarray:
    """Hashes as numbers from 0 to 1."""
    return (keys >> np.uint64(11)).astype(np.float64) / 2.0**53
