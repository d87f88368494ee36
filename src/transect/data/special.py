"""The special tokens of a corpus, and whether a model can read its tokens at all."""

from dataclasses import dataclass

import numpy as np

from transect.data.corpus import Corpus
from transect.data.order import below
from transect.errors import InputError
from transect.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Special:
    """Ids below `vocab_size`: `end` follows every document, `start` comes before one, `mask` hides a token.

    pad fills short sequences; attention never sees it. Where the tokenizer has no start or no padding token, the end
    token takes its place.
    """

    end: int
    start: int
    pad: int
    mask: int | None
    vocab_size: int

    @classmethod
    def of(cls, corpus: Corpus, model: ModelConfig) -> "Special":
        """Raises InputError where the model cannot read the corpus: too few token ids, or no mask token to learn by."""
        card = corpus.card
        if card.vocab_size > model.vocab_size:
            raise InputError(
                f"model.vocab_size is {model.vocab_size}, but {corpus.path} has token ids up to {card.vocab_size - 1}; "
                f"set model.vocab_size to {card.vocab_size} or more"
            )
        if not model.causal and card.mask_id is None:
            raise InputError(
                f"{corpus.path} has no mask token, which a masked model needs; prepare the text with a tokenizer that "
                "has one, or set model.objective to causal"
            )
        start = card.end_id if model.causal or card.start_id is None else card.start_id
        pad = card.end_id if card.pad_id is None else card.pad_id
        return cls(card.end_id, start, pad, card.mask_id, card.vocab_size)

    @property
    def ids(self) -> list[int]:
        """All of them, once each, ascending."""
        return sorted({one for one in (self.end, self.start, self.pad, self.mask) if one is not None})

    def among(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens are special, bool in their shape."""
        found = np.zeros(tokens.shape, dtype=bool)
        for one in self.ids:
            found |= tokens == one
        return found

    def others(self, draw: np.ndarray) -> np.ndarray:
        """Draws as ids of tokens that are not special, each equally likely, int64."""
        found = below(draw, self.vocab_size - len(self.ids))
        for one in self.ids:  # ascending: each steps over one more
            found += found >= one
        return found
