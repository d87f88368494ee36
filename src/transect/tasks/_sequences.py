"""Texts and pairs of texts as token sequences of at most so many tokens, and batches of these."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transect.data.text import wrappers
from transect.errors import InputError
from transect.tasks._encoding import encoded
from transect.tasks._labelled import Example
from transect.tasks._scoring import right_padded
from transect.view.own import settings_of
from transect.view.view import View


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A sequence: ids, which of two texts each is of, and whether the tokenizer added it, [T] each."""

    ids: np.ndarray
    types: np.ndarray
    special: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """Labelled sequences. classes: how many there are; 0 where the best of several sequences is asked for.

    sequences: those of each item, one alone for a class; labels [items] int64; keys [items] uint64, hashes of texts.
    """

    sequences: list[tuple[Tokens, ...]]
    labels: np.ndarray
    keys: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.sequences)


def coded(view: View, examples: Sequence[Example], classes: Sequence[str], length: int) -> Coded:
    """The examples for a view's model. classes: by name, empty where labels are numbers of options.

    A pair is encoded as the tokenizer encodes pairs where the model sees both sides and the tokenizer separates them,
    else as first text, separator token (else end token), second text. Of what is longer than `length` tokens the longer
    text loses its end. Raises InputError for a text without tokens, and a tokenizer that cannot separate texts.
    """
    encoder = _Encoder.of(view, length)
    numbers = {name: number for number, name in enumerate(classes)}
    sequences = [tuple(encoder.tokens(*pair) for pair in example.texts) for example in examples]
    labels = [numbers[example.label] if classes else int(example.label) for example in examples]
    keys = np.array([example.key for example in examples], dtype=np.uint64)
    return Coded(sequences, np.array(labels, dtype=np.int64), keys, len(classes))


@dataclass(frozen=True, slots=True)
class _Encoder:
    """How a tokenizer makes one sequence of one or two texts; own: it separates pairs itself."""

    tokenizer: Any
    length: int
    own: bool
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, view: View, length: int) -> "_Encoder":
        mask = _called(view.tokenizer, length, "a", "a")["special_tokens_mask"]
        inner = mask[mask.index(0) : len(mask) - mask[::-1].index(0)] if 0 in mask else []
        prefix, suffix = wrappers(view.tokenizer)
        return cls(view.tokenizer, length, not view.causal and 1 in inner, tuple(prefix), tuple(suffix))

    def tokens(self, first: str, second: str) -> Tokens:
        """Ids, types and special marks of a text, or of two."""
        both = bool(first.strip() and second)
        if not both or self.own:
            given = (first, second) if both else (first if first.strip() else second, None)
            made = _called(self.tokenizer, self.length, *given)
            ids, special, types = made["input_ids"], made["special_tokens_mask"], made["token_type_ids"]
        else:
            ids, special, types = self._joined(first, second)
        if all(special):
            raise InputError(f"{first[:40] or second[:40]!r} has no token of this tokenizer; leave the record out")
        return Tokens(np.array(ids, dtype=np.int64), np.array(types, dtype=np.int64), np.array(special, dtype=bool))

    def _joined(self, first: str, second: str) -> tuple[list[int], list[int], list[int]]:
        named = (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)
        separator = next((one for one in named if one is not None), None)
        if separator is None:
            raise InputError("the tokenizer has no separator and no end token to stand between two texts; give it one")
        texts = [encoded(self.tokenizer, text) for text in (first, second)]
        room = self.length - len(self.prefix) - len(self.suffix) - 1
        while len(texts[0]) + len(texts[1]) > room:
            max(texts, key=len).pop()
        ids = [*self.prefix, *texts[0], separator, *texts[1], *self.suffix]
        before, after = len(self.prefix), len(self.suffix)
        special = [1] * before + [0] * len(texts[0]) + [1] + [0] * len(texts[1]) + [1] * after
        return ids, special, [0] * (before + len(texts[0]) + 1) + [1] * (len(texts[1]) + after)


def _called(tokenizer: Any, length: int, first: str, second: str | None) -> Any:
    return tokenizer(
        first,
        second,
        truncation=True,
        max_length=length,
        return_special_tokens_mask=True,
        return_token_type_ids=True,
        return_attention_mask=False,
        verbose=False,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Padded:
    """Sequences [n, positions] padded on the right, with the item and the number within it of each [n]."""

    ids: Tensor
    mask: Tensor
    types: Tensor
    special: Tensor
    item: Tensor
    number: Tensor


def padded(view: View, items: Sequence[tuple[Tokens, ...]]) -> Padded:
    """The sequences of some items on the view's device."""
    rows = [(tokens, item, number) for item, own in enumerate(items) for number, tokens in enumerate(own)]
    ids, mask = right_padded(view, [tokens.ids for tokens, _, _ in rows])
    types, special = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, (tokens, _, _) in enumerate(rows):
        end = len(tokens.ids)
        types[row, :end], special[row, :end] = torch.from_numpy(tokens.types), torch.from_numpy(tokens.special)
    places = torch.tensor([(item, number) for _, item, number in rows])
    return Padded(*(one.to(view.device) for one in (ids, mask, types, special, places[:, 0], places[:, 1])))


def groups(items: Sequence[tuple[Tokens, ...]], size: int) -> Iterator[list[int]]:
    """Numbers of items in groups of about equal length, so that little is padding."""
    order = sorted(range(len(items)), key=lambda n: -max(len(tokens.ids) for tokens in items[n]))
    return (order[start : start + size] for start in range(0, len(order), size))


def states(view: View, batch: Padded) -> Tensor:
    """The last hidden states [n, positions, width], with segments told apart where the model has embeddings of them."""
    with _typed(view, batch.types):
        return view.run(batch.ids, batch.mask)


@contextmanager
def _typed(view: View, types: Tensor) -> Iterator[None]:
    settings = settings_of(view.model)
    known = getattr(view.model.config, "type_vocab_size", 0) if settings is None else settings.embedding.types
    if known < 2 or "token_type_ids" not in inspect.signature(view.base.forward).parameters:
        yield
        return
    handle = view.base.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"token_type_ids": types}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()
