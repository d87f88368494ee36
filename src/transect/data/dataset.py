"""Dataset: tokens cut into sequences, each of which knows its document."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from transect.data.hashing import token_hashes


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """All sequences one after another; those of a document follow each other, and its last one may be short."""

    ids: np.ndarray  # [tokens] int32
    special: np.ndarray  # [tokens] bool: added by the tokenizer ([CLS], [SEP], BOS)
    starts: np.ndarray  # [sequences] int64 offset into ids
    lengths: np.ndarray  # [sequences] int64, 1..seq_len
    document: np.ndarray  # [sequences] int64 index of its document
    document_hash: np.ndarray  # [documents] uint64 hash of the document's token ids, special ones left out
    seq_len: int
    name: str  # what the text is, in words
    builtin: bool = False
    target: np.ndarray | None = None  # [tokens] int32 the token each position is asked for, -1 none; see `objective`

    @property
    def num_tokens(self) -> int:
        """Tokens, special ones included."""
        return len(self.ids)

    @property
    def num_sequences(self) -> int:
        """Sequences, short tails included."""
        return len(self.starts)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_hash)

    @property
    def sequence_hash(self) -> np.ndarray:
        """[sequences] uint64 hash of each sequence's token ids, special ones included."""
        return token_hashes(self.ids, self.starts, self.lengths)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the token ids, which are special, the cuts and seq_len; free of the documents' order."""
        cuts = np.bincount(self.document, minlength=self.num_documents)
        first = np.cumsum(cuts) - cuts
        # The low bit is free in a shifted id, so one hash covers the id and whether it is special.
        marked = self.ids.astype(np.int64) * 2 + self.special
        documents = np.sort(token_hashes(token_hashes(marked, self.starts, self.lengths).view(np.int64), first, cuts))
        return blake2b(
            documents.astype("<u8").tobytes() + self.seq_len.to_bytes(8, "little"), digest_size=8
        ).hexdigest()


def assemble(
    documents: Sequence[np.ndarray],
    seq_len: int,
    name: str,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> Dataset:
    """Cut each document [tokens] into sequences of at most seq_len, each wrapped in prefix and suffix inside it."""
    text = np.concatenate(documents).astype(np.int32)
    sizes = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    body = seq_len - len(prefix) - len(suffix)
    cuts = -(-sizes // body)
    document = np.repeat(np.arange(len(sizes)), cuts)
    place = np.arange(len(document)) - (np.cumsum(cuts) - cuts)[document]
    lengths = np.minimum(sizes[document] - place * body, body) + len(prefix) + len(suffix)
    starts = np.cumsum(lengths) - lengths
    ids = np.empty(lengths.sum(), dtype=np.int32)
    special = np.zeros(len(ids), dtype=bool)
    ends = starts + lengths - len(suffix)
    added = [*((starts + i, token) for i, token in enumerate(prefix)), *((ends + i, t) for i, t in enumerate(suffix))]
    for at, token in added:
        ids[at], special[at] = token, True
    ids[~special] = text
    hashes = token_hashes(text, np.cumsum(sizes) - sizes, sizes)
    return Dataset(ids, special, starts, lengths, document, hashes, seq_len, name)
