"""Token ids onto disk: documents are appended to files of bounded size, and what was appended can be cut back."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transect.data.card import NAME, SPLITS, Card, FileCard, PartCard, content_fingerprint
from transect.data.corpus import BYTES, OFFSETS, TOKENIZER, folder_name, shard_name
from transect.data.digests import Digest, file_digest
from transect.data.tokenizer import Taken, take
from transect.errors import InputError
from transect.results import make_folder, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Documents of one part: ids with their end tokens, tokens and bytes of each, and how many ids are unknown."""

    ids: np.ndarray  # [tokens] uint16 or uint32
    lengths: np.ndarray  # [documents] int64, end token included
    bytes: np.ndarray  # [documents] int64
    unknown: int = 0


@dataclass(slots=True)
class Size:
    """What has been appended to a part."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    unknown: int = 0


class PartWriter:
    """Appends documents to the files of one part, `shard_tokens` tokens in each but the last."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int, size: Size) -> None:
        """Goes on after `size`; what lies behind it is cut off. Raises InputError when there is less than that."""
        self.folder = folder
        self.size = size
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._touched: set[Path] = set()
        make_folder(folder)
        for file, length in self._expected().items():
            _cut(file, length)
        for file in set(folder.glob("*.bin")) - set(self._expected()):
            file.unlink()
        if not size.documents:
            self._append(folder / OFFSETS, np.zeros(1, dtype="<i8"))

    def append(self, new: Encoded) -> None:
        """Add documents behind those that are there."""
        ends = self.size.tokens + np.cumsum(new.lengths)
        done = 0
        while done < len(new.ids):
            number, inside = divmod(self.size.tokens + done, self._shard_tokens)
            piece = new.ids[done : done + self._shard_tokens - inside]
            self._append(self.folder / shard_name(number), piece)
            done += len(piece)
        self._append(self.folder / OFFSETS, ends.astype("<i8"))
        self._append(self.folder / BYTES, new.bytes.astype("<i8"))
        self.size.documents += len(new.lengths)
        self.size.tokens += len(new.ids)
        self.size.bytes += int(new.bytes.sum())
        self.size.unknown += new.unknown

    def settle(self) -> None:
        """Have the disk keep all that was appended."""
        for file in self._touched:
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        self._touched.clear()

    def _append(self, file: Path, values: np.ndarray) -> None:
        with file.open("ab") as handle:
            handle.write(values.tobytes())
        self._touched.add(file)

    def _shards(self) -> list[int]:
        full, rest = divmod(self.size.tokens, self._shard_tokens)
        return [self._shard_tokens] * full + [rest] * (rest > 0)

    def _expected(self) -> dict[Path, int]:
        if not self.size.documents:
            return {}
        shards = {self.folder / shard_name(i): n * self._dtype.itemsize for i, n in enumerate(self._shards())}
        documents = self.size.documents
        return shards | {self.folder / OFFSETS: 8 * (documents + 1), self.folder / BYTES: 8 * documents}

    def card(self, root: Path) -> tuple[PartCard, dict[str, FileCard]]:
        """The part's card, and that of each of its files by its path below `root`; reads everything once."""
        whole, files = Digest(), {}
        for file, length in self._expected().items():
            files[file.relative_to(root).as_posix()] = FileCard(size=length, digest=Digest().feed(file, whole).text)
        size = self.size
        part = PartCard(
            documents=size.documents,
            tokens=size.tokens,
            bytes=size.bytes,
            unknown=size.unknown,
            shards=tuple(self._shards()),
            digest=whole.text,
        )
        return part, files


def _cut(file: Path, length: int) -> None:
    there = file.stat().st_size if file.is_file() else 0
    if there < length:
        raise InputError(f"{file} lost what was written to it; remove {file.parents[2].parent} and prepare again")
    if there > length:
        os.truncate(file, length)


class CorpusWriter:
    """All parts of a corpus that is being made below `folder`."""

    def __init__(self, folder: Path, taken: Taken, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder = folder
        self._taken = taken
        self.shard_tokens = shard_tokens
        self._parts: dict[tuple[str, str], PartWriter] = {}

    @property
    def dtype(self) -> np.dtype:
        """How ids are written."""
        return np.dtype("<u2" if self._taken.vocab_size <= 1 << 16 else "<u4")

    def place(self, part: tuple[str, str]) -> Path:
        """The folder of a split and domain."""
        return self.folder / part[0] / folder_name(part[1])

    def part(self, split: str, domain: str, size: Size | None = None) -> PartWriter:
        """The writer of a part, which goes on after `size` where that is given."""
        if (split, domain) not in self._parts:
            self._parts[split, domain] = PartWriter(
                self.place((split, domain)), self.dtype, self.shard_tokens, size or Size()
            )
        return self._parts[split, domain]

    def sizes(self) -> dict[tuple[str, str], Size]:
        """What each part holds."""
        return {key: part.size for key, part in self._parts.items()}

    def settle(self) -> None:
        """Have the disk keep all that was appended."""
        for part in self._parts.values():
            part.settle()

    def card(self, name: str) -> Card:
        """The card of all that was written; its seal and what only the caller knows are missing."""
        splits: dict[str, dict[str, PartCard]] = {}
        files: dict[str, FileCard] = {}
        for split, domain in sorted(self._parts, key=lambda key: (SPLITS.index(key[0]), key[1])):
            part, own = self._parts[split, domain].card(self.folder)
            splits.setdefault(split, {})[domain] = part
            files |= own
        for file in sorted((self.folder / TOKENIZER).rglob("*")):
            if file.is_file():
                inner = file.relative_to(self.folder).as_posix()
                files[inner] = FileCard(size=file.stat().st_size, digest=file_digest(file))
        taken = self._taken
        return Card(
            name=name,
            vocab_size=taken.vocab_size,
            end_id=taken.end_id,
            start_id=taken.start_id,
            mask_id=taken.mask_id,
            pad_id=taken.pad_id,
            unknown_id=taken.unknown_id,
            dtype="uint16" if self.dtype.itemsize == 2 else "uint32",
            tokenizer=taken.fingerprint,
            content=content_fingerprint(taken.fingerprint, splits),
            splits=splits,
            files=files,
        )


def write_card(folder: Path, card: Card) -> None:
    """Seal the card and write it; the folder is a corpus from then on."""
    write_whole(folder / NAME, (card.sealed().model_dump_json(indent=1) + "\n").encode())


def write_corpus(
    folder: Path,
    splits: Mapping[str, Mapping[str, Iterable[tuple[list[int], int]]]],
    tokenizer: "PreTrainedTokenizerBase",
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """A corpus out of split -> domain -> documents, each its token ids without the end token and its UTF-8 bytes.

    Raises InputError when the folder cannot be written to, and ValueError for an id outside the vocabulary.
    """
    taken = take(tokenizer)
    make_folder(folder)
    taken.save(folder / TOKENIZER)
    writer = CorpusWriter(folder, taken, shard_tokens)
    for split, domains in splits.items():
        for domain, documents in domains.items():
            for ids, size in documents:
                row = np.array([*ids, taken.end_id], dtype=np.int64)
                if row.min() < 0 or row.max() >= taken.vocab_size:
                    raise ValueError(f"an id of {split}/{domain} is not in a vocabulary of {taken.vocab_size}")
                new = Encoded(row.astype(writer.dtype), np.array([len(row)]), np.array([size]))
                writer.part(split, domain).append(new)
    write_card(folder, writer.card(folder.name))
