"""Tiny prepared corpora whose tokens are known one by one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from transect.data.corpus import Corpus
from transect.data.shards import write_corpus

PAD, START, END, MASK, UNKNOWN = 0, 7, 3, 11, 2
"""Ids of the special tokens, neither first nor in a row; a causal tokenizer has END and UNKNOWN alone."""
SPECIAL = {PAD, START, END, MASK}
Documents = Sequence[Sequence[int]]


def tokenizer(vocab_size: int, masked: bool) -> PreTrainedTokenizerFast:
    """A word for each id: `w12`, but for the special ones."""
    named = {PAD: "[PAD]", START: "[CLS]", END: "[SEP]", MASK: "[MASK]"} if masked else {END: "<|end|>"}
    words = {named.get(i, "[UNK]" if i == UNKNOWN else f"w{i}"): i for i in range(vocab_size)}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    if not masked:
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<|end|>")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def corpus(
    folder: Path,
    splits: Mapping[str, Mapping[str, Documents]],
    vocab_size: int,
    masked: bool = False,
    shard_tokens: int = 13,
) -> Corpus:
    """A corpus of these documents, three bytes a token and one more, in files so short that most windows need two."""
    told = {
        split: {domain: [(list(ids), 3 * len(ids) + 1) for ids in rows] for domain, rows in domains.items()}
        for split, domains in splits.items()
    }
    write_corpus(folder, told, tokenizer(vocab_size, masked), shard_tokens)
    return Corpus.open(folder)


def distinct(lengths: Sequence[Sequence[int]], first: int = 17) -> list[list[list[int]]]:
    """Domains of documents of these lengths, in which no token comes twice."""
    ids = iter(range(first, first + sum(map(sum, lengths))))
    return [[[next(ids) for _ in range(length)] for length in domain] for domain in lengths]


def lengths(seed: int, documents: int, longest: int) -> list[int]:
    """Lengths of documents, 1 to `longest`."""
    return np.random.default_rng(seed).integers(1, longest + 1, documents).tolist()
