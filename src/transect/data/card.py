"""The card of a prepared corpus: what is in the folder, in numbers that can be checked."""

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from transect.config import Config

SPLITS = ("train", "valid", "ood")
FORMAT = 1
NAME = "card.json"


class PartCard(Config):
    """One domain of one split.

    tokens: end tokens included. bytes: UTF-8 bytes of the text, which has no end tokens. unknown: tokens that stand
    for text the tokenizer has no token for. shards: tokens in each file. digest: of ids, offsets and bytes.
    """

    documents: int
    tokens: int
    bytes: int
    unknown: int = 0
    shards: tuple[int, ...]
    digest: str


class FileCard(Config):
    """Size and BLAKE2b (16 bytes, hexadecimal) of one file."""

    size: int
    digest: str


class Removed(Config):
    """Documents left out of the train split, and why; `empty` counts documents of any split without a token."""

    copies_of_evaluation: int = 0
    near_copies_of_evaluation: int = 0
    repeats: int = 0
    empty: int = 0


class Card(Config):
    """What a prepared folder holds.

    end_id follows every document; start_id, mask_id, pad_id and unknown_id are None where the tokenizer has no such
    token. tokenizer: its fingerprint. content: the fingerprint of it, the labels, the token ids, where documents end
    and their bytes; neither depends on where text or folder lie, on shards or on processes. settings: those that made
    the folder. inputs: of the names and sizes of the files read. seal: of all the rest.
    """

    format: int = FORMAT
    name: str
    vocab_size: int
    end_id: int
    start_id: int | None = None
    mask_id: int | None = None
    pad_id: int | None = None
    unknown_id: int | None = None
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    content: str
    splits: dict[str, dict[str, PartCard]]
    removed: Removed = Removed()
    skipped: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: str = ""
    files: dict[str, FileCard]
    seal: str = ""

    def sealed(self) -> "Card":
        """The same card with the seal of its content."""
        return self.model_copy(update={"seal": self.expected_seal()})

    def expected_seal(self) -> str:
        """The seal that fits the other fields."""
        return digest({name: value for name, value in self.plain().items() if name != "seal"})


def digest(content: Any) -> str:
    """32 hexadecimal digits of something that JSON can hold; the order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def content_fingerprint(tokenizer: str, splits: dict[str, dict[str, PartCard]]) -> str:
    """16 hexadecimal digits of the tokenizer, every label, and what lies under it."""
    parts = {split: {domain: part.digest for domain, part in domains.items()} for split, domains in splits.items()}
    return digest([tokenizer, parts])[:16]
