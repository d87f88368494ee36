"""Text -> documents -> tokens -> sequences -> batches."""

from transect.data.batches import Batch, batches, sample_tokens
from transect.data.dataset import Dataset
from transect.data.split import Split, assign, error_units
from transect.data.text import builtin_text, from_text
from transect.data.tokens import from_tokens, load_tokens

__all__ = [
    "Batch",
    "Dataset",
    "Split",
    "assign",
    "batches",
    "builtin_text",
    "error_units",
    "from_text",
    "from_tokens",
    "load_tokens",
    "sample_tokens",
]
