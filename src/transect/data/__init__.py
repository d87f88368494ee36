"""Text -> documents -> tokens -> sequences -> batches."""

import importlib
from typing import TYPE_CHECKING

from transect.data.batches import Batch, batches, sample_tokens
from transect.data.corpus import Corpus
from transect.data.dataset import Dataset
from transect.data.split import Split, assign, error_units
from transect.data.text import builtin_text, from_text
from transect.data.tokens import from_tokens, load_tokens

if TYPE_CHECKING:
    from transect.data.making import PrepareConfig as PrepareConfig
    from transect.data.making import prepare as prepare

__all__ = [
    "Batch",
    "Corpus",
    "Dataset",
    "PrepareConfig",
    "Split",
    "assign",
    "batches",
    "builtin_text",
    "error_units",
    "from_text",
    "from_tokens",
    "load_tokens",
    "prepare",
    "sample_tokens",
]


def __getattr__(name: str) -> object:
    if name not in ("PrepareConfig", "prepare"):  # those import transformers
        raise AttributeError(f"module 'transect.data' has no attribute {name!r}")
    return getattr(importlib.import_module("transect.data.making"), name)
