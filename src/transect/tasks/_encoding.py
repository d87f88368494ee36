"""Texts as requests: what stands before them, where they are cut, which of their tokens are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transect.data.text import wrappers
from transect.errors import InputError, Unsuitable
from transect.tasks._scoring import Request, Scored, score_causal, score_masked
from transect.tasks.base import Subject, Tick, silent

DEFAULT_LENGTH = 1024


@dataclass(frozen=True, eq=False)
class Reader:
    """A subject's tokenizer and model as a scorer of texts.

    A causal model reads what its tokenizer puts before a text, and is asked for a continuation token by token; where
    nothing stands before it, its start token does (bos, else eos). A masked model reads the whole text in its special
    tokens, with each token asked for hidden alone. length: most tokens of an input; the beginning of a longer context
    is cut off, never a token asked for.
    """

    subject: Subject
    length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    start: int | None
    mask: int | None

    @classmethod
    def of(cls, subject: Subject, length: int | None = None) -> "Reader":
        """Raises InputError for a length the model does not take, and a masked model without a known mask token."""
        view, tokenizer = subject.view, subject.tokenizer
        limit = view.max_positions
        if length is not None and (length < 2 or (limit is not None and length > limit)):
            raise InputError(f"length is {length}; {view.name} takes 2 to {limit} tokens")
        prefix, suffix = wrappers(tokenizer)
        mask = None
        if not view.causal:
            mask = tokenizer.mask_token_id
            if mask is None:
                raise InputError(f"{view.name} sees both sides, but its tokenizer names no mask token; it has to")
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        start = next((one for one in ids if one is not None), None)
        default = DEFAULT_LENGTH if limit is None else min(limit, DEFAULT_LENGTH)
        suffix = [] if view.causal else suffix
        return cls(subject, length or default, tuple(prefix), tuple(suffix), start, mask)

    @property
    def causal(self) -> bool:
        """Whether tokens are asked for from what stands before them alone."""
        return self.subject.view.causal

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return encoded(self.subject.tokenizer, text)

    def pair(self, context: str, continuation: str) -> Request:
        """The request for a continuation of a context, which may be empty.

        Blanks at the end of the context go to the continuation, and both are encoded together, so that tokens are those
        of the whole text: the rule of lm-evaluation-harness 0.4 (`_encode_pair`). Raises InputError for a continuation
        without tokens, Unsuitable for one longer than the model's input.
        """
        kept = context.rstrip()
        whole, before = self.encode(context + continuation), self.encode(kept) if kept else []
        return self.request(before, whole[len(before) :], continuation)

    def request(self, before: Sequence[int], asked: Sequence[int], shown: str = "") -> Request:
        """The request for ids behind other ids, with the beginning of these cut off where both are too long.

        Raises as `pair`.
        """
        if not asked:
            raise InputError(f"{_short(shown)} has no token of its own behind its context; give a longer one")
        lead = list(self.prefix)
        if self.causal and not before and not lead:
            if self.start is None:
                raise InputError("the tokenizer has no start or end token to stand before a text; give it one")
            lead = [self.start]
        room = self.length + 1 if self.causal else self.length - len(lead) - len(self.suffix)
        most = room - 1 if self.causal else room
        if len(asked) > most:
            raise Unsuitable(
                f"{_short(shown)} has {len(asked)} tokens, more than the {most} that {self.subject.view.name} takes "
                "at once; shorten it, or judge a model with a longer context"
            )
        if self.causal:
            ids = [*lead, *before, *asked][-room:]
            return Request(np.array(ids, dtype=np.int64), len(ids) - len(asked), len(ids))
        text = [*before, *asked][-room:]
        ids = [*lead, *text, *self.suffix]
        last = len(lead) + len(text)
        return Request(np.array(ids, dtype=np.int64), last - len(asked), last)

    def score(self, requests: Sequence[Request], tick: Tick = silent) -> list[Scored]:
        """Log-probabilities by the model's own objective."""
        view, size = self.subject.view, self.subject.batch_size
        if self.causal:
            return score_causal(view, requests, size, tick)
        assert self.mask is not None
        return score_masked(view, requests, self.mask, size, tick)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without special tokens and whole, however long."""
    return tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= 40 else f"{shown[:37]}...")
