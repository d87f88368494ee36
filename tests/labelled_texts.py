"""Labelled texts of made-up words, the tokenizers that read them, and tiny models to learn from them."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from families import FIRST_TEXT_ID, VOCAB, tiny_model
from own_models import own_model
from transect.tasks._labelled import Example
from transect.tasks._sequences import Coded, coded
from transect.tasks.base import Subject
from transect.view.view import View

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
FIRST_FILLER = 11


def word(number: int) -> str:
    """The word of a token id."""
    return f"w{number}"


@functools.cache
def tokenizer(wrapped: bool) -> PreTrainedTokenizerFast:
    """One token a word; `wrapped` as BERT's: <bos> A <eos> B <eos>, with segments."""
    words = [*SPECIAL.values(), *map(word, range(FIRST_TEXT_ID, VOCAB))]
    raw = Tokenizer(models.WordLevel({text: number for number, text in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrapped:
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>",
            pair="<bos>:0 $A:0 <eos>:0 $B:1 <eos>:1",
            special_tokens=[("<bos>", 1), ("<eos>", 2)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def view(name: str = "bert", dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0) -> View:
    """A fresh tiny model with its tokenizer; `own/...` is one of our own architectures."""
    model = own_model(name[4:], dtype, seed) if name.startswith("own/") else tiny_model(name, dtype, seed, layers)
    made = View(model, name=name)
    made.tokenizer = tokenizer(not made.causal)
    return made


def texts(count: int, seed: int, marks: Iterable[int] = (5, 6), low: int = 3, high: int = 13) -> list[tuple[str, int]]:
    """Texts of random words with one marked word among them, and which mark it is."""
    generator, marks = np.random.default_rng(seed), list(marks)
    made = []
    for _ in range(count):
        label = int(generator.integers(len(marks)))
        words = generator.integers(FIRST_FILLER, VOCAB, int(generator.integers(low, high))).tolist()
        words.insert(int(generator.integers(len(words) + 1)), marks[label])
        made.append((" ".join(map(word, words)), label))
    return made


def items(view: View, count: int, seed: int, marks: Iterable[int] = (5, 6)) -> Coded:
    """Such texts as sequences, labelled by their mark."""
    marks = list(marks)
    examples = [Example(((text, ""),), str(label), None) for text, label in texts(count, seed, marks)]
    return coded(view, examples, [str(number) for number in range(len(marks))], 31)


def written(folder: Path, training: list[dict], test: list[dict], **layout: str) -> str:
    """A data set file with these records; the layout's default is a text and its label."""
    for split, records in (("train", training), ("test", test)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    kind = "options" if "options" in layout else "labelled"
    content: dict[str, Any] = {
        "description": "made up",
        "source": "a test",
        "kind": kind,
        "files": {split: [str(folder / f"{split}.jsonl")] for split in ("train", "test")},
        "layouts": [layout or {"text": "{{ text }}", "label": "label"}],
    }
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def marked(count: int, seed: int, marks: Iterable[int] = (5, 6)) -> list[dict]:
    """Records of such texts."""
    return [{"text": text, "label": f"class {label}"} for text, label in texts(count, seed, marks)]


def subject(view: View, **options: Any) -> Subject:
    return Subject(view=view, **options)
