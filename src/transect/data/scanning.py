"""The first look at all documents: what there is, which split each belongs to, and which are left out."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from transect.data.card import SPLITS, Removed
from transect.data.corpus import folder_name
from transect.data.normalise import normalise, writable
from transect.data.sources import Unit
from transect.errors import InputError

TRAIN, VALID, OOD = range(3)  # as in SPLITS
OUT = 255
_UNDECIDED = 254
_LONGEST_LABEL = 200  # bytes, as a folder's name
_MOST_LABELS = 10_000
Advance = Callable[[int], None]
"""Told the bytes of each document read."""


@dataclass(slots=True)
class Scan:
    """What is kept of each document between passes: 21 bytes."""

    hashes: np.ndarray  # [documents] uint64 of the text
    sizes: np.ndarray  # [documents] int64 UTF-8 bytes
    domain: np.ndarray  # [documents] int32 number of the label
    role: np.ndarray  # [documents] uint8: TRAIN, VALID, OOD or OUT
    counts: list[int]  # documents of each unit
    domains: list[str]
    skipped: list[str] = field(default_factory=list)
    removed: Removed = field(default_factory=Removed)

    def is_role(self, *roles: int) -> np.ndarray:
        """[documents] bool: those of these roles."""
        return np.isin(self.role, roles)

    def label(self, number: int) -> tuple[str, str]:
        """Split and domain of a document."""
        return SPLITS[self.role[number]], self.domains[self.domain[number]]


def texts_of(unit: Unit, normalised: bool) -> Iterator[tuple[str, str]]:
    """Text and domain of each document that is not blank, as the corpus has it."""
    for text, domain in unit.read():
        clean = writable(text)
        clean = normalise(clean) if normalised else clean
        if clean.strip():
            yield clean, _label(domain, unit)


def _label(domain: str, unit: Unit) -> str:
    label = normalise(writable(domain))
    if not label or len(folder_name(label)) > _LONGEST_LABEL:
        raise InputError(f"{unit.name} has a domain label of {len(domain)} characters; give a column of short labels")
    return label


def text_hash(content: bytes) -> int:
    """64 bits of BLAKE2b of a text in UTF-8."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def scan(units: Sequence[Unit], normalised: bool, skip_unreadable: bool, advance: Advance) -> Scan:
    """Read everything once. Raises InputError when a unit cannot be read and is not to be skipped, or all are blank.

    A unit that turns out unreadable half-way is left out whole.
    """
    hashes, sizes, labels, roles = array("Q"), array("q"), array("i"), array("B")
    counts: list[int] = []
    domains: dict[str, int] = {}
    skipped: list[str] = []
    for unit in units:
        begin = len(hashes)
        role = _UNDECIDED if unit.split is None else SPLITS.index(unit.split)
        try:
            for text, domain in texts_of(unit, normalised):
                content = text.encode()
                hashes.append(text_hash(content))
                sizes.append(len(content))
                labels.append(domains.setdefault(domain, len(domains)))
                roles.append(role)
                advance(len(content))
        except InputError as error:
            if not skip_unreadable:
                raise
            skipped.append(str(error))
            for column in (hashes, sizes, labels, roles):
                del column[begin:]
        counts.append(len(hashes) - begin)
        if len(domains) > _MOST_LABELS:
            raise InputError(f"{unit.name} has over {_MOST_LABELS} domain labels; give another --domain-column")
    if not hashes:
        raise InputError("the sources have no document with text; give other files")
    return Scan(
        np.frombuffer(hashes, dtype=np.uint64).copy(),
        np.frombuffer(sizes, dtype=np.int64).copy(),
        np.frombuffer(labels, dtype=np.int32).copy(),
        np.frombuffer(roles, dtype=np.uint8).copy(),
        counts,
        list(domains),
        skipped,
    )


def divide(found: Scan, fraction: float) -> None:
    """Give every undecided document its split: valid below `fraction` of all hashes, at least the lowest; else train.

    Raises InputError when nothing is left for train.
    """
    open_to = found.is_role(_UNDECIDED)
    if fraction and open_to.any():
        border = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
        border = max(border, found.hashes[open_to].min() + np.uint64(1))
        found.role[open_to & (found.hashes < border)] = VALID
    found.role[found.is_role(_UNDECIDED)] = TRAIN
    if not found.is_role(TRAIN).any():
        count = len(found.hashes)
        raise InputError(
            f"no train split: {count} document{'s' * (count > 1)} and none left for train; give more documents, "
            "valid/NAME=PATH beside them, or --valid-fraction 0"
        )


def remove_copies(found: Scan, repeats: bool) -> None:
    """Take out of train what is word for word an evaluation document and, with `repeats`, all but the first of equals.

    Raises InputError when nothing is left.
    """
    copies = found.is_role(TRAIN) & np.isin(found.hashes, np.unique(found.hashes[found.is_role(VALID, OOD)]))
    found.role[copies] = OUT
    repeated = 0
    if repeats:
        train = np.flatnonzero(found.is_role(TRAIN))
        first = np.unique(found.hashes[train], return_index=True)[1]
        again = np.delete(train, first)
        found.role[again] = OUT
        repeated = len(again)
    found.removed = found.removed.but(copies_of_evaluation=int(copies.sum()), repeats=repeated)
    need_train(found)


def remove_near(found: Scan, near: np.ndarray) -> None:
    """Take these documents [count] out of train; raises InputError when nothing is left."""
    found.role[near] = OUT
    found.removed = found.removed.but(near_copies_of_evaluation=len(near))
    need_train(found)


def need_train(found: Scan) -> None:
    """Raises InputError when no document of train is left."""
    if not found.is_role(TRAIN).any():
        raise InputError(
            "every train document is a copy of an evaluation document; give other text or --no-deduplicate"
        )
