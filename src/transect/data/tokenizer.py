"""The tokenizer of a corpus: one that is taken, and what a corpus needs to know of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transect.data.card import digest
from transect.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDS = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # of a tokenizer.json alone


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """A tokenizer with the ids that a corpus uses; `end_id` is the end-of-text token, or else the separator."""

    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    end_id: int
    start_id: int | None
    mask_id: int | None
    pad_id: int | None
    unknown_id: int | None
    fingerprint: str

    @property
    def rules(self) -> str:
        """The content of its tokenizer.json."""
        fast: Any = self.tokenizer
        return fast.backend_tokenizer.to_str()

    def save(self, folder: Path) -> None:
        """Write files that `AutoTokenizer.from_pretrained` opens."""
        self.tokenizer.save_pretrained(str(folder))


def take(tokenizer: "PreTrainedTokenizerBase", name: str = "the tokenizer") -> Taken:
    """What a corpus needs of a tokenizer; raises InputError when it is a slow one or has no end of text."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{name} is not a fast tokenizer; give one with a tokenizer.json")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise InputError(f"{name} has no end token; set its eos_token or sep_token, save it and give that folder")
    ids = {
        "end_id": end,
        "start_id": tokenizer.cls_token_id,
        "mask_id": tokenizer.mask_token_id,
        "pad_id": tokenizer.pad_token_id,
        "unknown_id": tokenizer.unk_token_id,
    }
    size = max(tokenizer.get_vocab().values()) + 1
    taken = Taken(tokenizer, size, fingerprint="", **ids)
    # Padding and truncation are states of a call, not of the text.
    content = {key: value for key, value in json.loads(taken.rules).items() if key not in ("padding", "truncation")}
    return replace(taken, fingerprint=digest([content, ids, size])[:16])


def load(source: str) -> Taken:
    """The tokenizer in a folder, a tokenizer.json or on the hub; raises InputError for one that cannot be used."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    try:
        if path.is_file() and not (path.parent / "tokenizer_config.json").is_file():
            return take(_named(PreTrainedTokenizerFast(tokenizer_file=source)), source)
        return take(AutoTokenizer.from_pretrained(str(path.parent if path.is_file() else source)), source)
    except InputError:
        raise
    except Exception as error:  # the libraries raise everything from OSError to a bare Exception
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(
            f"cannot open the tokenizer {source}: {reason}; give a folder, a tokenizer.json or a hub id"
        ) from error


def _named(tokenizer: Any) -> Any:
    """A tokenizer.json does not say which of its special tokens ends a text, so the usual names are looked for."""
    known = tokenizer.get_vocab()
    tokenizer.eos_token = next((name for name in _ENDS if name in known), None)
    tokenizer.mask_token = next((name for name in ("<|mask|>", "<mask>", "[MASK]") if name in known), None)
    tokenizer.pad_token = next((name for name in ("<|pad|>", "<pad>", "[PAD]") if name in known), None)
    tokenizer.unk_token = next((name for name in ("<unk>", "[UNK]") if name in known), None)
    tokenizer.cls_token = "[CLS]" if "[CLS]" in known else None
    return tokenizer
