"""Corpus: a prepared folder of token ids, opened without reading it; any stretch of it can be read at any time."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from transect.data.card import FORMAT, NAME, SPLITS, Card, FileCard, PartCard
from transect.data.digests import file_digest
from transect.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORK = ".preparing"  # where a folder is made, until it is whole
TOKENIZER = "tokenizer"
OFFSETS, BYTES = "offsets.bin", "bytes.bin"
_CHUNK = 1 << 22  # tokens counted at once


def folder_name(domain: str) -> str:
    """The folder of a domain: the label itself, with `%` and hexadecimal digits for what a file name cannot hold."""
    return quote(domain, safe="").replace(".", "%2E", 1) if domain.startswith(".") else quote(domain, safe="")


def shard_name(number: int) -> str:
    """The file of a part's shard."""
    return f"{number:05d}.bin"


class Part:
    """One domain of one split: documents one after another, each followed by the end token; files stay on disk."""

    def __init__(self, folder: Path, domain: str, card: PartCard, dtype: str) -> None:
        self.domain = domain
        self.documents = card.documents
        self.tokens = card.tokens
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._starts = np.concatenate([[0], np.cumsum(card.shards, dtype=np.int64)])
        self._shards: dict[int, np.ndarray] = {}

    @cached_property
    def offsets(self) -> np.ndarray:
        """[documents + 1] int64: where each document begins, in tokens, and where the last one ends."""
        return np.memmap(self._folder / OFFSETS, dtype="<i8", mode="r")

    @cached_property
    def bytes(self) -> np.ndarray:
        """[documents] int64 UTF-8 bytes of each document's text."""
        return np.memmap(self._folder / BYTES, dtype="<i8", mode="r")

    def read(self, start: int, count: int) -> np.ndarray:
        """[count] int64 token ids from token `start` on, across shards; raises ValueError outside the part."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise ValueError(f"tokens {start} to {start + count} of {self.domain!r}, which has {self.tokens}")
        out = np.empty(count, dtype=np.int64)
        done = 0
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            first = start + done - self._starts[number]
            piece = self._shard(number)[first : first + count - done]
            out[done : done + len(piece)] = piece
            done, number = done + len(piece), number + 1
        return out

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            self._shards[number] = np.memmap(self._folder / shard_name(number), dtype=self._dtype, mode="r")
        return self._shards[number]


class Corpus:
    """A folder made by `transect data prepare`; `Corpus.open` reads its card and looks at the size of every file."""

    def __init__(self, path: Path, card: Card) -> None:
        self.path = path
        self.card = card

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Corpus":
        """The corpus in a folder; raises InputError when it is none, is half written, damaged or was edited."""
        path = Path(path)
        card = _card(path)
        for name, file in card.files.items():
            _check_size(path / name, file)
        return cls(path, card)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the tokenizer, labels, token ids, and where documents end."""
        return self.card.content

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, valid and ood that have text."""
        return tuple(split for split in SPLITS if self.card.splits.get(split))

    def domains(self, split: str) -> tuple[str, ...]:
        """Labels of a split, sorted; raises InputError for a split that is not there."""
        if split not in self.splits:
            raise InputError(f"{self.path} has no split {split!r}; it has {', '.join(self.splits)}")
        return tuple(sorted(self.card.splits[split]))

    def part(self, split: str, domain: str) -> Part:
        """One domain of a split; raises InputError for one that is not there."""
        known = self.domains(split)
        if domain not in known:
            raise InputError(f"split {split!r} of {self.path} has no domain {domain!r}; it has {', '.join(known)}")
        folder = self.path / split / folder_name(domain)
        return Part(folder, domain, self.card.splits[split][domain], self.card.dtype)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that made the ids."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.path / TOKENIZER))

    def token_counts(self) -> np.ndarray:
        """[vocab_size] int64: how often each id stands in the train split, end tokens included; reads all of it."""
        counts = np.zeros(self.card.vocab_size, dtype=np.int64)
        for domain in self.domains("train"):
            part = self.part("train", domain)
            for start in range(0, part.tokens, _CHUNK):
                ids = part.read(start, min(_CHUNK, part.tokens - start))
                counts += np.bincount(ids, minlength=len(counts))
        return counts

    def verify(self) -> None:
        """Read every file; raises InputError naming one whose content is not what was written."""
        for name, file in self.card.files.items():
            _check_size(self.path / name, file)
            if file_digest(self.path / name) != file.digest:
                raise InputError(f"{self.path / name} was changed after it was prepared; prepare the corpus again")


def _card(path: Path) -> Card:
    file = path / NAME
    if not file.is_file():
        if (path / WORK).is_dir():
            raise InputError(f"{path} is half prepared; run the same `transect data prepare` again to go on")
        raise InputError(f"{path} is not a prepared corpus; make one with `transect data prepare SOURCE -o {path}`")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged: {error}; prepare the corpus again") from error
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise InputError(f"{file} is not a card of format {FORMAT}; prepare the corpus again with this version")
    card = Card.parse(given, root="card")
    if card.seal != card.expected_seal():
        raise InputError(f"{file} was edited by hand; put the old one back or prepare the corpus again")
    return card


def _check_size(file: Path, card: FileCard) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; prepare the corpus again") from error
    if size != card.size:
        raise InputError(f"{file} has {size} bytes and should have {card.size}; prepare the corpus again")
