"""Text in: documents are read, encoded and cut into sequences, and reading ends at the limit."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transect.data.dataset import Dataset, assemble
from transect.data.reading import documents, files
from transect.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUP = 1 << 18  # characters encoded in one call
_MARGIN = 1024  # tokens at the end of a cut text that the cut may have changed


def from_text(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: "PreTrainedTokenizerBase",
    seq_len: int = 128,
    limit_tokens: int | None = None,
    special_tokens: bool = True,
) -> Dataset:
    """Text files (a document each), `.jsonl` and `.parquet` records with `text`, all also gzipped, or folders of these.

    The first `limit_tokens` text tokens are kept. With `special_tokens`, each sequence is wrapped in what the
    tokenizer adds, inside seq_len; blank records are no documents. Raises InputError for input that cannot be used.
    """
    chosen = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if tokenizer is None:
        raise InputError("text needs a tokenizer and the view has none; give token ids: from_tokens or --tokens")
    if not chosen:
        raise InputError("no text files given; give at least one path")
    if limit_tokens is not None and limit_tokens < 1:
        raise InputError(f"limit_tokens is {limit_tokens}; it must be at least 1")
    prefix, suffix = wrappers(tokenizer) if special_tokens else ([], [])
    body = seq_len - len(prefix) - len(suffix)
    if seq_len < 2 or body < 1:
        least = max(2, seq_len - body + 1)
        raise InputError(f"seq_len is {seq_len}; it must be at least {least} with this tokenizer's special tokens")
    texts = (text for file in files(chosen) for text in documents(file))
    rows = list(_encoded(texts, tokenizer, limit_tokens))
    total = sum(len(row) for row in rows)
    if total < body:
        raise InputError(f"the text has {total} tokens, less than one sequence of {body}; give more or a lower seq_len")
    return assemble(rows, seq_len, _name(chosen), prefix, suffix)


def builtin_text(tokenizer: "PreTrainedTokenizerBase", seq_len: int = 128, limit_tokens: int | None = None) -> Dataset:
    """The State of the Union speeches that come with the package (see SOTU.md); raises InputError as `from_text`.

    A limit is shared out: the same number of tokens from the start of each speech, from fewer speeches, spread over
    the years, where that would be less than a sequence.
    """
    data = from_text(Path(__file__).with_name("sotu.jsonl.gz"), tokenizer, seq_len)
    if limit_tokens is not None:
        data = _shared_out(data, limit_tokens, *wrappers(tokenizer))
    return replace(data, name="State of the Union speeches, 1790 to 2021 (built in)", builtin=True)


def _shared_out(data: Dataset, limit: int, prefix: list[int], suffix: list[int]) -> Dataset:
    body = data.seq_len - len(prefix) - len(suffix)
    if limit < body:
        raise InputError(f"limit_tokens is {limit}, less than one sequence of {data.seq_len}; give more")
    count = min(data.num_documents, limit // body)
    owner = np.repeat(data.document, data.lengths)[~data.special]
    text = data.ids[~data.special]
    chosen = np.linspace(0, data.num_documents - 1, count).round().astype(int)
    pieces = [text[owner == document][: limit // count] for document in chosen]
    return assemble(pieces, data.seq_len, data.name, prefix, suffix)


def wrappers(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text; raises InputError when it drops the sample text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    if 0 not in mask:
        raise InputError(
            "the tokenizer has no token for 'a', so its special tokens are unknown; turn special_tokens off"
        )
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def _encoded(texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", limit: int | None) -> Iterator[np.ndarray]:
    left = sys.maxsize if limit is None else limit
    waiting = iter(texts)
    # No more characters are taken than tokens are missing: a text has fewer tokens, so little is read in vain.
    while left and (group := _take(waiting, min(_GROUP, left))):
        rows = _encode(group[:-1], tokenizer) if len(group) > 1 else []
        for row in [*rows, _first_tokens(group[-1], tokenizer, left)]:
            kept = row[:left]
            left -= len(kept)
            if kept:
                yield np.array(kept, dtype=np.int32)


def _take(texts: Iterator[str], characters: int) -> list[str]:
    """The next texts, up to the one with which they have that many characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            break
    return group


def _first_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", count: int) -> list[int]:
    """At least the first `count` tokens, if there are so many, without encoding much more of the text than needed."""
    size = 8 * (count + _MARGIN)
    while size < len(text):
        row = _encode([text[:size]], tokenizer)[0]
        if len(row) >= count + _MARGIN:
            return row[:count]
        size *= 2
    return _encode([text], tokenizer)[0]


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # The call, not the Rust backend: a tokenizer file may ask for truncation, which only the call switches off.
    # verbose=False: a document longer than the model's context is cut later and is no reason for a warning.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


def _name(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"
