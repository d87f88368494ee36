"""Reading and replacing one tensor inside what a module receives or returns: a tensor, a tuple or a mapping."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Key = int | str | None
"""Where a tensor stands: None for the value itself, a position in a tuple, a name in a mapping."""


def parts(value: object) -> dict[Key, Tensor]:
    """Every tensor one level deep in a module's return value."""
    if isinstance(value, Tensor):
        return {None: value}
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if isinstance(item, Tensor)}
    if isinstance(value, (tuple, list)):
        return {index: item for index, item in enumerate(value) if isinstance(item, Tensor)}
    return {}


def inputs(args: tuple, kwargs: Mapping[str, object]) -> dict[Key, Tensor]:
    """Every tensor among a call's positional and keyword arguments."""
    named: dict[Key, Tensor] = {name: item for name, item in kwargs.items() if isinstance(item, Tensor)}
    placed: dict[Key, Tensor] = {index: item for index, item in enumerate(args) if isinstance(item, Tensor)}
    return placed | named


def put(value: object, key: Key, new: Tensor) -> object:
    """The same return value with one tensor exchanged."""
    if key is None:
        return new
    if isinstance(value, tuple):
        items = [new if index == key else item for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [new if index == key else item for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        changed = value.copy() if isinstance(value, dict) else dict(value)
        changed[key] = new
        return changed
    raise TypeError(f"no tensor {key!r} in a {type(value).__name__}")


def logits_of(output: object) -> Any:
    """The vocabulary logits in a model's output, under either of their names; None where it has none."""
    logits = getattr(output, "logits", None)
    return getattr(output, "prediction_logits", None) if logits is None else logits


def by_position(tensor: Tensor, batch: int, positions: int) -> Tensor | None:
    """The tensor as [batch, positions, width], or None when it has no such form.

    Sparse and some older FFNs work on [batch * positions, width].
    """
    if tensor.ndim == 3 and tensor.shape[:2] == (batch, positions):
        return tensor
    if tensor.ndim == 2 and tensor.shape[0] == batch * positions:
        return tensor.reshape(batch, positions, tensor.shape[1])
    return None


def eps(dtype: torch.dtype) -> float:
    """The rounding unit of a floating dtype."""
    return torch.finfo(dtype).eps
