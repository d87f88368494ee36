"""Small prepared corpora of made-up text in which there is something to learn."""

import json
from pathlib import Path

import numpy as np

from transect.data import PrepareConfig, prepare
from transect.data.corpus import Corpus

WORDS = """the a cat dog bird sees hears finds small red old
house tree river and then never goes to from""".split()  # noqa: SIM905


def documents(count: int, seed: int, length: int = 60) -> list[str]:
    """Texts in which two of three words follow from the word before."""
    draw = np.random.Generator(np.random.PCG64(seed))
    texts = []
    for _ in range(count):
        place, words = int(draw.integers(len(WORDS))), []
        for _ in range(length):
            words.append(WORDS[place])
            place = (3 * place + 1) % len(WORDS) if draw.random() < 0.67 else int(draw.integers(len(WORDS)))
        texts.append(" ".join(words) + ".")
    return texts


def write_texts(file: Path, texts: list[str]) -> Path:
    """A JSON Lines file of texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def small_corpus(folder: Path, kind: str = "characters", vocab_size: int = 97, seed: int = 5) -> Corpus:
    """Train and validation text of one domain and one other, in a vocabulary of at most `vocab_size`."""
    sources = (
        f"train/words={write_texts(folder / 'train.jsonl', documents(113, seed))}",
        f"valid/words={write_texts(folder / 'valid.jsonl', documents(11, seed + 1))}",
        f"ood/short={write_texts(folder / 'other.jsonl', documents(7, seed + 2, length=23))}",
    )
    sizes = {} if kind == "characters" else {"vocab_size": vocab_size}
    config = PrepareConfig(sources=sources, tokenizer_kind=kind, deduplicate=False, **sizes)
    return prepare(config, folder / "corpus")
