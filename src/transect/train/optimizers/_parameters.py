"""What a model's parameters are to an optimizer: matrices, lookup tables, the head, everything else."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from transect.models.memory.memory import Memory

Role = Literal["matrix", "embedding", "head", "plain"]
_PLAIN = ("bias", "sink")
"""Words in the names of parameters that are added to something, however many dimensions they have."""


@dataclass(frozen=True, slots=True)
class Named:
    """A trained parameter under the first of its names.

    role: `matrix`, the weight of a linear map, or a stack of them [blocks, rows, columns] as in a memory;
    `embedding`, a lookup table, tied to the head or not; `head`, the map to the vocabulary; `plain`, all else: biases,
    norms, learned numbers. transposed: rows of its matrices are inputs, and columns outputs.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    transposed: bool


def trained(model: nn.Module) -> Iterator[Named]:
    """Each parameter that asks for a gradient, tied ones once, in the model's order."""
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    values = {id(module.values) for module in model.modules() if isinstance(module, Memory)}
    getter = getattr(model, "get_output_embeddings", None)
    head = id(getattr(getter() if getter is not None else None, "weight", None))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role: Role = "matrix"
        if id(parameter) in lookups:
            role = "embedding"
        elif parameter.ndim < 2 or any(word in name.rpartition(".")[2] for word in _PLAIN):
            role = "plain"
        elif id(parameter) == head:
            role = "head"
        yield Named(name, parameter, role, id(parameter) in values)
