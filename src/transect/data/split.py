"""Which sequences are fitted on, tuned on and scored on, and over which units errors are computed."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from transect.data.dataset import Dataset
from transect.data.hashing import keyed
from transect.errors import InputError

FIT, TUNE, SCORE = 0, 1, 2
FEWEST_DOCUMENTS = 20  # with fewer, sequences take the place of documents
MOST_UNITS = 4096
Unit = Literal["document", "sequence"]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The part of each sequence, and the unit that was kept together."""

    part: np.ndarray  # [sequences] uint8: 0 fit, 1 tune, 2 score
    unit: Unit


def assign(
    dataset: Dataset,
    score_fraction: float = 0.25,
    tune_fraction: float = 0.125,
    method: Literal["hash", "ordered"] = "hash",
    seed: int = 0,
) -> Split:
    """Score is `score_fraction` of all units, tune `tune_fraction` of the others, fit the rest.

    "hash": units are documents (sequences when there are under 20 documents) in the order of a hash of (seed, token
    ids); equal ones stay together. "ordered": the last sequences score, those before them tune. Raises InputError
    when a part would be empty.
    """
    if not 0 < score_fraction < 1 or not 0 <= tune_fraction < 1:
        raise InputError(f"score_fraction {score_fraction} and tune_fraction {tune_fraction} must be between 0 and 1")
    if method == "ordered":
        # Keys fall, so that the last sequence comes first, as in the hash order.
        keys, unit_of, unit = np.arange(dataset.num_sequences)[::-1], np.arange(dataset.num_sequences), "sequence"
    elif method == "hash":
        unit_of, hashes, unit = _units(dataset)
        keys = keyed(hashes, seed)
    else:
        raise InputError(f"split method {method!r} is unknown; give 'hash' or 'ordered'")
    order = np.argsort(keys, kind="stable")
    scored = _border(keys[order], max(1, round(score_fraction * len(keys))))
    tuned = round(tune_fraction * (len(keys) - scored))
    last = _border(keys[order], scored + max(tuned, 1)) if tune_fraction else scored
    part = np.full(len(keys), FIT, dtype=np.uint8)
    part[order[scored:last]] = TUNE
    part[order[:scored]] = SCORE
    needed = (FIT, TUNE, SCORE) if tune_fraction else (FIT, SCORE)
    if not set(needed) <= set(part.tolist()):
        raise InputError(_too_few(len(needed), len(np.unique(keys)), unit))
    return Split(part[unit_of], unit)


def error_units(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, Unit]:
    """The unit of each sequence [sequences] int64, a hash of each unit [units] uint64, and what a unit is.

    A unit is a document, or a sequence when there are under 20 documents. More than 4,096 units are merged by hash
    into at most 4,096 groups, so that memory stays bounded; a group's hash is the smallest in it.
    """
    unit_of, hashes, unit = _units(dataset)
    if len(hashes) <= MOST_UNITS:
        return unit_of, hashes, unit
    taken, group = np.unique(hashes % MOST_UNITS, return_inverse=True)
    smallest = np.full(len(taken), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, group, hashes)
    return group[unit_of], smallest, unit


def _units(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, Unit]:
    if dataset.num_documents >= FEWEST_DOCUMENTS:
        return dataset.document, dataset.document_hash, "document"
    return np.arange(dataset.num_sequences), dataset.sequence_hash, "sequence"


def _border(keys: np.ndarray, count: int) -> int:
    """The first border at or after `count` that does not part equal keys; keys are sorted."""
    if count >= len(keys):
        return len(keys)
    return int(np.searchsorted(keys, keys[count - 1], side="right"))


def _too_few(parts: int, found: int, unit: Unit) -> str:
    names = "score, tune and fit" if parts == 3 else "score and fit"
    return (
        f"the text has {found} different {unit}s, too few for {names} parts of the sizes asked for; "
        f"give more text, at least {parts} {unit}s, or other fractions"
    )
