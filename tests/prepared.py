"""Small corpora for tests: texts on disk, and token ids that are planted."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "spruce", "yew")


def sentence(rng: np.random.Generator, words: int) -> str:
    """That many words, drawn at random, with a number each now and then so that few sentences agree."""
    chosen = rng.choice(WORDS, words)
    return " ".join(f"{word}{rng.integers(10_000)}" if rng.random() < 0.5 else str(word) for word in chosen)


def texts(count: int, seed: int = 0, words: int = 41) -> list[str]:
    """Documents that have no 13-word sequence in common."""
    rng = np.random.default_rng(seed)
    return [sentence(rng, words) for _ in range(count)]


def jsonl(file: Path, documents: list[str], **columns: list[str]) -> Path:
    """A JSON Lines file of texts and further columns."""
    rows = ({"text": text} | {name: values[i] for name, values in columns.items()} for i, text in enumerate(documents))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def word_tokenizer(vocabulary: Mapping[str, int], **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    raw = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=names.get("unk_token", "<unk>")))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)
