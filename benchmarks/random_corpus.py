"""A prepared corpus of random tokens, of any vocabulary, for timing."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from transect.data.shards import write_corpus


def random_corpus(folder: Path, vocab: int, tokens: int, seed: int = 0) -> None:
    """One document of uniformly drawn ids below `vocab`, whose last id is the end token."""
    words = {f"t{number}": number for number in range(vocab - 1)} | {"<|end|>": vocab - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), unk_token="t0", eos_token="<|end|>"
    )
    ids = np.random.Generator(np.random.PCG64(seed)).integers(vocab - 1, size=tokens).tolist()
    write_corpus(folder, {"train": {"random": [(ids, 4 * tokens)]}}, tokenizer)
