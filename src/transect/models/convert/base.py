"""What a family of Hugging Face models is to ours: settings both ways, names of weights both ways."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.convert._attributes import Attributes

State = dict[str, Tensor]
MASKED = "TransectForMaskedLM"


@dataclass(frozen=True, slots=True)
class Part:
    """One of their weights and what it is made of: theirs = ours joined along `dim`, then perhaps transposed.

    Names hold `{}` where the number of the layer stands.
    """

    ours: tuple[str, ...]
    theirs: str
    dim: int = 0
    transposed: bool = False

    def at(self, layer: int) -> "Part":
        """The part of one layer."""
        ours = tuple(name.format(layer) for name in self.ours)
        return Part(ours, self.theirs.format(layer), self.dim, self.transposed)

    def joined(self, weights: State) -> Tensor:
        """Their weight."""
        pieces = [weights[name] for name in self.ours]
        whole = torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0]
        return (whole.mT if self.transposed else whole).clone(memory_format=torch.contiguous_format)

    def split(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our weights."""
        whole = whole.mT if self.transposed else whole
        for name, piece in zip(self.ours, whole.chunk(len(self.ours), self.dim), strict=True):
            yield name, piece.clone(memory_format=torch.contiguous_format)


def module(ours: str, theirs: str) -> tuple[Part, Part]:
    """The weight and the bias of a module that is the same in both; either may be missing in both."""
    return Part((f"{ours}.weight",), f"{theirs}.weight"), Part((f"{ours}.bias",), f"{theirs}.bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model type of transformers that our model can be.

    classes: our class's name -> theirs. settings: their configuration -> ours; `native` the other way, at best: what it
    leaves out is found by reading its result back. trunk: parts below the base model; heads: parts below the whole.
    dropped: their weights that have no place in a class of ours, by our class. bare: arguments of their bare class.
    pretraining: their class for a TransectForMaskedLM with `head.next_sentence`.
    """

    name: str
    classes: Mapping[str, str]
    settings: Callable[[Attributes], dict[str, Any]]
    native: Callable[[ModelConfig], dict[str, Any]]
    trunk: tuple[Part, ...]
    heads: tuple[Part, ...]
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bare: Mapping[str, Any] = field(default_factory=dict)
    pretraining: str | None = None

    def ours(self, theirs: str) -> str | None:
        """Our class for one of theirs."""
        if theirs == self.pretraining:
            return MASKED
        return {name: own for own, name in self.classes.items()}.get(theirs)

    def theirs(self, ours: str, next_sentence: bool) -> str:
        """Their class for one of ours."""
        return self.pretraining if self.pretraining and ours == MASKED and next_sentence else self.classes[ours]

    def parts(self, layers: int, ours: str, theirs: str) -> Iterator[Part]:
        """All parts with their full names; the arguments are the prefixes of the base models, or nothing."""
        for part in self.trunk:
            full = Part(tuple(ours + name for name in part.ours), theirs + part.theirs, part.dim, part.transposed)
            yield from (full.at(layer) for layer in range(layers)) if "{}" in full.theirs else (full,)
        yield from self.heads


def to_ours(parts: Iterator[Part], weights: State, dropped: tuple[str, ...] = ()) -> State:
    """Their weights under our names, as copies; raises InputError for one that has no place."""
    left, made = dict(weights), {}
    for part in parts:
        whole = left.pop(part.theirs, None)
        if whole is not None:
            made.update(part.split(whole))
    strange = [name for name in left if name not in dropped]
    if strange:
        raise InputError(f"weight {strange[0]} has no place in a transect model; import a model without it")
    return made


def to_theirs(parts: Iterator[Part], weights: State) -> State:
    """Our weights under their names, as copies; raises InputError for one that has no place."""
    used: set[str] = set()
    made = {}
    for part in parts:
        if all(name in weights for name in part.ours):
            made[part.theirs] = part.joined(weights)
            used.update(part.ours)
    strange = [name for name in weights if name not in used]
    if strange:
        raise InputError(f"weight {strange[0]} has no place in a native model; save with native=False")
    return made


@cache
def families() -> dict[str, Family]:
    """Every family, by its model type; among those that fit, export takes the first."""
    package = importlib.import_module("transect.models.convert")
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    made = [
        importlib.import_module(f"{package.__name__}.{name}").FAMILY
        for name in names
        if name != "base" and not name.startswith("_")
    ]
    return {family.name: family for family in sorted(made, key=lambda family: (family.name != "llama", family.name))}
