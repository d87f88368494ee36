"""The last pass: every document encoded and appended, with notes of how far it is, so that it can go on from there."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from transect.data.corpus import TOKENIZER
from transect.data.encoding import Encoder, Item, Result
from transect.data.pool import in_order
from transect.data.rereading import Reader
from transect.data.scanning import OUT, Scan
from transect.data.shards import CorpusWriter, Size
from transect.data.tokenizer import Taken
from transect.errors import InputError
from transect.results import write_whole

_BATCH = 1 << 20  # characters given to a worker at once
_SETTLED = 1 << 24  # bytes of text between two notes, at most


class Filling:
    """Fills a corpus that is being made with the documents of a scan."""

    def __init__(self, writer: CorpusWriter, found: Scan, journal: Path) -> None:
        self._writer, self._found, self._journal = writer, found, journal
        self._ends: list[tuple[int, int]] = []  # of every batch: number behind its last document, bytes

    def run(self, read: Reader, taken: Taken, workers: int, advance: Callable[[int, int], None]) -> int:
        """Encode and append what is missing; the number of documents without a token.

        Raises InputError when the tokenizer has no token for the first batch of text.
        """
        found, writer = self._found, self._writer
        start, empty = self._resume()
        make = partial(Encoder, taken.rules, taken.end_id, taken.unknown_id, writer.dtype.name)
        wanted = ~found.is_role(OUT)
        total = int(found.sizes[wanted].sum())
        wanted[:start] = False
        advance(total - int(found.sizes[wanted].sum()), total)
        since = 0
        results: Iterator[Result] = in_order(make, self._batches(read(wanted)), workers)
        for done, result in enumerate(results):
            for (split, domain), new in result.parts.items():
                writer.part(split, domain).append(new)
            empty += result.empty
            if done == 0 and start == 0:
                self._need_tokens()
            behind, size = self._ends[done]
            advance(size, total)
            since += size
            if since >= min(_SETTLED, writer.shard_tokens):
                self._note(behind, empty)
                since = 0
        self._note(len(wanted), empty)
        return empty

    def _batches(self, documents: Iterator[tuple[int, str]]) -> Iterator[list[Item]]:
        batch: list[Item] = []
        characters = size = last = 0
        for number, text in documents:
            batch.append((*self._found.label(number), text))
            characters, size, last = characters + len(text), size + int(self._found.sizes[number]), number
            if characters >= _BATCH:
                self._ends.append((last + 1, size))
                yield batch
                batch, characters, size = [], 0, 0
        if batch:
            self._ends.append((last + 1, size))
            yield batch

    def _need_tokens(self) -> None:
        sizes = self._writer.sizes().values()
        if sum(size.tokens - size.documents for size in sizes) <= sum(size.unknown for size in sizes):
            raise InputError("the tokenizer has no token for this text; give another one, or none to learn one from it")

    def _note(self, behind: int, empty: int) -> None:
        """Write down how far the text is encoded; a later run cuts what came after it and goes on from there."""
        writer = self._writer
        writer.settle()
        sizes = [[*key, size.documents, size.tokens, size.bytes, size.unknown] for key, size in writer.sizes().items()]
        write_whole(self._journal, json.dumps({"documents": behind, "empty": empty, "parts": sizes}).encode())

    def _resume(self) -> tuple[int, int]:
        """The number of the first document that is not encoded yet, and how many had no token."""
        writer = self._writer
        noted = json.loads(self._journal.read_text(encoding="utf-8")) if self._journal.is_file() else None
        known = {(part[0], part[1]): Size(*part[2:]) for part in noted["parts"]} if noted else {}
        places = {writer.place(part) for part in known}
        for inner in writer.folder.glob("*/*"):  # parts begun after the note
            if inner.is_dir() and inner.parent.name != TOKENIZER and inner not in places:
                shutil.rmtree(inner)
        for (split, domain), size in known.items():
            writer.part(split, domain, size)
        return (noted["documents"], noted["empty"]) if noted else (0, 0)
