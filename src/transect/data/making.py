"""Text into a corpus on disk: what is asked for, the passes over the text, and how a stopped preparation goes on."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from transect.config import Config
from transect.data.card import NAME, Card, Removed, digest
from transect.data.comparing import near_copies
from transect.data.corpus import TOKENIZER, WORK, Corpus
from transect.data.filling import Filling
from transect.data.hashing import keyed
from transect.data.learning import Kind, check_size, learn
from transect.data.pool import tokenizer_threads
from transect.data.rereading import Changed, Reader
from transect.data.scanning import TRAIN, Scan, divide, remove_copies, remove_near, scan
from transect.data.shards import SHARD_TOKENS, CorpusWriter, write_card
from transect.data.sources import Columns, Unit, units
from transect.data.tokenizer import Taken, load
from transect.errors import InputError
from transect.results import make_folder, whole_file, write_whole

_WORTH = 1 << 24  # bytes of text that a further process is started for
_LEARNED_FROM = 1 << 28  # bytes of text that a tokenizer is learned from, at most
_PLAN, _SCAN, _JOURNAL, _MADE = "plan.json", "scan.npz", "journal.json", "corpus"
Progress = Callable[[str, int, int], None]
"""Told the phase, the bytes of text done since the last time, and the bytes of the whole phase, 0 if not known."""


class PrepareConfig(Config):
    """What a corpus is made of and how; see `transect data prepare --help` and docs/prepare_data.md.

    sources: as on the command line. valid_fraction: None is 0 where a source is given as valid/..., else 0.01.
    near_share: share of the shorter document's 13-word sequences found in the other one that makes a near copy.
    tokenizer: one to take; else one of `tokenizer_kind` with `vocab_size` tokens is learned from the train split.
    """

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    text_column: str = "text"
    domain_column: str | None = None
    stream: bool = False
    valid_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    normalise: bool = True
    deduplicate: bool = True
    keep_repeats: bool = False
    near_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    tokenizer: str | None = None
    tokenizer_kind: Kind = "bpe"
    vocab_size: Annotated[int, Field(ge=1)] = 8192
    lower_case: bool = False
    shard_tokens: Annotated[int, Field(ge=1)] = SHARD_TOKENS


def prepare(
    config: PrepareConfig,
    output: str | os.PathLike[str],
    workers: int = 1,
    skip_unreadable: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus of the settings in the folder `output`, made now, gone on with, or found there.

    What is made does not depend on `workers`, processes that are used where there is text enough for them. A stopped
    call goes on when it is repeated; a finished one is opened. `skip_unreadable` leaves out files that cannot be read
    and lists them in the card. Cost: three readings of the text, four with a learned tokenizer; memory for 21 bytes a
    document, the longest document, and about 20 bytes for each evaluation word.

    Raises InputError for text, settings or a folder that cannot be used, and when the disk is full.
    """
    folder = Path(output)
    if workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1")
    if config.tokenizer is None:
        check_size(config.tokenizer_kind, config.vocab_size)
    elif not {"tokenizer_kind", "vocab_size", "lower_case"}.isdisjoint(config.model_fields_set):
        raise InputError("a tokenizer is given, so --tokenizer-kind, --vocab-size and --lower-case have no use")
    elif _on_disk(config.tokenizer) and not Path(config.tokenizer).exists():
        raise InputError(f"no tokenizer at {config.tokenizer}; give a folder, a tokenizer.json or a hub id")
    columns = Columns(config.text_column, config.domain_column)
    found = units(config.sources, columns, config.stream, folder / WORK)
    job = _Job(config, folder, found, workers, skip_unreadable, progress or _silent)
    try:
        return job.run()
    except Changed:
        shutil.rmtree(folder / WORK)
        raise
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; make room or give another folder, then run again"
        ) from error


def _silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


def _on_disk(tokenizer: str) -> bool:
    return tokenizer.startswith((".", "/", "~")) or tokenizer.endswith(".json")


class _Job:
    def __init__(
        self,
        config: PrepareConfig,
        folder: Path,
        found: Sequence[Unit],
        workers: int,
        skip_unreadable: bool,
        progress: Progress,
    ) -> None:
        self.config, self.folder, self.units = config, folder, found
        self.workers, self.skip, self.progress = workers, skip_unreadable, progress
        self.work = folder / WORK
        self.made = self.work / _MADE
        self.inputs = digest([[unit.name, unit.size] for unit in found])

    def run(self) -> Corpus:
        if (self.folder / NAME).is_file():
            corpus = Corpus.open(self.folder)
            self._same(corpus.card.settings, corpus.card.inputs)
            shutil.rmtree(self.work, ignore_errors=True)
            return corpus
        strange = next(iter(self._strange()), None)
        if strange is not None:
            raise InputError(f"{self.folder} holds {strange}, which is no part of a corpus; give a new folder")
        make_folder(self.work)
        if not (self.made / NAME).is_file():
            found = self._scanned()
            taken = self._tokenizer(found)
            card = self._encoded(found, taken)
            write_card(self.made, card)
        self._move()
        return Corpus.open(self.folder)

    def _strange(self) -> Iterator[str]:
        """What lies in the folder that no preparation put there; of one that is being moved, nothing."""
        if self.folder.is_dir() and not (self.made / NAME).is_file():
            yield from sorted(inner.name for inner in self.folder.iterdir() if inner.name != WORK)

    def _same(self, settings: dict[str, Any], inputs: str) -> None:
        own = self.config.plain()
        for name in own:
            if own[name] != settings.get(name):
                raise InputError(
                    f"{self.folder} was begun with {name} = {_short(settings.get(name))}, now it is "
                    f"{_short(own[name])}; give another folder, or remove this one"
                )
        if inputs != self.inputs:
            raise InputError(
                f"the text of {self.folder} has changed: other files or sizes; give another folder, or remove this one"
            )

    def _scanned(self) -> Scan:
        plan = self.work / _PLAN
        if plan.is_file():
            return self._kept(json.loads(plan.read_text(encoding="utf-8")))
        shutil.rmtree(self.made, ignore_errors=True)
        (self.work / _JOURNAL).unlink(missing_ok=True)
        config = self.config
        found = scan(self.units, config.normalise, self.skip, lambda done: self.progress("reading", done, 0))
        fraction = config.valid_fraction
        if fraction is None:
            fraction = 0.0 if any(unit.split == "valid" for unit in self.units) else 0.01
        divide(found, fraction)
        if config.deduplicate:
            remove_copies(found, repeats=not config.keep_repeats)
            told = partial(self.progress, "comparing")
            near = near_copies(self._reader(found), found, config.near_share, self._processes(found), self.work, told)
            remove_near(found, near)
        columns = {name: getattr(found, name) for name in ("hashes", "sizes", "domain", "role")}
        with whole_file(self.work / _SCAN) as partial_file, partial_file.open("wb") as handle:
            np.savez(handle, **columns)
        rest = {
            "settings": config.plain(),
            "inputs": self.inputs,
            "counts": found.counts,
            "domains": found.domains,
            "skipped": found.skipped,
            "removed": found.removed.plain(),
        }
        write_whole(plan, json.dumps(rest).encode())
        return found

    def _kept(self, plan: dict[str, Any]) -> Scan:
        self._same(plan["settings"], plan["inputs"])
        with np.load(self.work / _SCAN) as columns:
            arrays = {name: columns[name] for name in columns.files}
        removed = Removed.parse(plan["removed"])
        return Scan(**arrays, counts=plan["counts"], domains=plan["domains"], skipped=plan["skipped"], removed=removed)

    def _reader(self, found: Scan) -> Reader:
        return Reader(self.units, found, self.config.normalise)

    def _processes(self, found: Scan) -> int:
        return min(self.workers, 1 + int(found.sizes.sum()) // _WORTH)

    def _tokenizer(self, found: Scan) -> Taken:
        folder = self.made / TOKENIZER
        if folder.is_dir():
            return load(str(folder))
        config = self.config
        if config.tokenizer is not None:
            taken = load(config.tokenizer)
        else:
            with tokenizer_threads(many=self.workers > 1):
                taken = learn(
                    config.tokenizer_kind, partial(self._train_texts, found), config.vocab_size, config.lower_case
                )
        partly = self.made / f"{TOKENIZER}.partial"
        shutil.rmtree(partly, ignore_errors=True)
        taken.save(partly)
        os.replace(partly, folder)
        return load(str(folder))

    def _train_texts(self, found: Scan) -> Iterator[str]:
        """The train split, or, of a large one, the documents with the lowest hashes under another key."""
        wanted = found.is_role(TRAIN)
        total = int(found.sizes[wanted].sum())
        if total > _LEARNED_FROM:
            wanted &= keyed(found.hashes, 1) < np.uint64(_LEARNED_FROM / total * 2**64)
        told = int(found.sizes[wanted].sum())
        for _, text in self._reader(found)(wanted):
            yield text
            self.progress("learning tokens", len(text.encode()), told)

    def _encoded(self, found: Scan, taken: Taken) -> Card:
        writer = CorpusWriter(self.made, taken, self.config.shard_tokens)
        told = partial(self.progress, "encoding")
        empty = Filling(writer, found, self.work / _JOURNAL).run(
            self._reader(found), taken, self._processes(found), told
        )
        update = {
            "removed": found.removed.but(empty=empty),
            "skipped": tuple(found.skipped),
            "settings": self.config.plain(),
            "inputs": self.inputs,
        }
        return writer.card(self.folder.resolve().name).model_copy(update=update)

    def _move(self) -> None:
        """Everything into its place, the card last; goes on where it was stopped."""
        for inner in sorted(self.made.iterdir()):
            if inner.name != NAME:
                os.replace(inner, self.folder / inner.name)
        os.replace(self.made / NAME, self.folder / NAME)
        with suppress(OSError):
            shutil.rmtree(self.work)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
