"""Token ids in: an array, a list of lists, or a NumPy file; every row is a document."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transect.data.dataset import Dataset, assemble
from transect.errors import InputError

if TYPE_CHECKING:
    import torch

_LARGEST = np.iinfo(np.int32).max


def from_tokens(
    ids: "np.ndarray | torch.Tensor | Sequence[Sequence[int]]",
    mask: "np.ndarray | torch.Tensor | Sequence[Sequence[int]] | None" = None,
    seq_len: int | None = None,
    name: str = "tokens",
) -> Dataset:
    """Token ids (documents, tokens), cut into sequences of seq_len (default: the row width).

    `mask` is 1 or True at real tokens; the others are removed, so the padding side cannot matter. Without a mask, a
    list of lists may have rows of unequal length. Raises InputError for anything else.
    """
    rows = _rows(ids) if mask is None else _real_tokens(_array(ids, "ids"), _array(mask, "mask"))
    if not rows:
        raise InputError("ids has no rows; give at least one document")
    for number, row in enumerate(rows):
        _check(number, row)
    width = max(len(row) for row in rows) if isinstance(ids, list | tuple) and mask is None else np.shape(ids)[1]
    if seq_len is not None and seq_len < 2:
        raise InputError(f"seq_len is {seq_len}; it must be at least 2")
    return assemble(rows, seq_len or width, name)


def load_tokens(path: str | os.PathLike[str], seq_len: int | None = None, name: str | None = None) -> Dataset:
    """The dataset of a `.npy` file of integers (documents, tokens); raises InputError when it is not one."""
    path = Path(path)
    try:
        ids = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a .npy file of token ids") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path} is not a .npy file of plain numbers; save integers with numpy.save") from error
    if not isinstance(ids, np.ndarray):
        raise InputError(f"{path} holds several arrays; give a .npy file with one array (documents, tokens)")
    return from_tokens(ids, seq_len=seq_len, name=name or path.name)


def _array(values: Any, what: str) -> np.ndarray:
    try:
        array = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    except ValueError as error:
        raise InputError(f"{what} has rows of unequal length; with a mask, give rows of one length") from error
    if array.ndim != 2:
        raise InputError(f"{what} has shape {array.shape}; give a 2-D array (documents, tokens)")
    return array


def _rows(ids: Any) -> list[np.ndarray]:
    if not isinstance(ids, list | tuple):
        return list(_array(ids, "ids"))
    rows = []
    for number, row in enumerate(ids):
        try:
            rows.append(np.asarray(row))
        except ValueError as error:
            raise InputError(f"row {number} of ids is not a list of numbers; give (documents, tokens)") from error
    wrong = next((number for number, row in enumerate(rows) if row.ndim != 1), None)
    if wrong is not None:
        raise InputError(f"row {wrong} of ids is not a list of numbers; give a 2-D list (documents, tokens)")
    return rows


def _real_tokens(ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    if mask.shape != ids.shape:
        raise InputError(f"mask has shape {mask.shape} but ids has {ids.shape}; give one mark per token")
    if not np.isin(mask, (0, 1)).all():
        raise InputError("mask has values other than 0 and 1; give 1 at real tokens and 0 at padding")
    return [row[real] for row, real in zip(ids, mask.astype(bool), strict=True)]


def _check(number: int, row: np.ndarray) -> None:
    if not len(row):
        raise InputError(f"row {number} of ids has no real token; remove the row")
    if not np.issubdtype(row.dtype, np.integer):
        raise InputError(f"row {number} of ids is {row.dtype}; give integers")
    if row.min() < 0:
        raise InputError(f"row {number} of ids has the negative id {row.min()}; mask padding out with mask=")
    if row.max() > _LARGEST:
        raise InputError(f"row {number} of ids has the id {row.max()}; ids end at {_LARGEST}")
