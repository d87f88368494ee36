"""Probe: a measurement. Which sites it reads, what it adds up, which rows come out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from transect.data import Dataset
from transect.results import Row
from transect.view.capture import Seen
from transect.view.view import View

PHASES = ("fit", "tune", "train", "score")


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How documents are divided into fit, tune and score; see `data.split.assign`."""

    score_fraction: float = 0.25
    tune_fraction: float = 0.125
    method: Literal["hash", "ordered"] = "hash"


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What a probe knows before the first token: the model, its layers in this pass, the data and its error units."""

    view: View
    layers: tuple[int, ...]
    data: Dataset
    unit_of: np.ndarray  # [sequences] int64
    unit_keys: np.ndarray  # [units] uint64
    unit_name: str
    seed: int
    fit_units: int = 0  # units among the fit documents

    @property
    def units(self) -> int:
        """How many documents (or sequences) errors are computed over."""
        return len(self.unit_keys)


@dataclass(slots=True, eq=False)
class Sight:
    """One batch as probes see it, on the model's device."""

    phase: str
    ids: Tensor  # [batch, positions]
    mask: Tensor  # [batch, positions] bool, True = real token
    special: Tensor  # [batch, positions] bool
    sequence: Tensor  # [batch] index of each sequence in the dataset
    unit: Tensor  # [batch] error unit of each sequence
    scratch: dict[Any, Any] = field(default_factory=dict)  # lives as long as the batch

    def rows(self, tensor: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The chosen tokens' vectors [tokens, width] (all real tokens by default) of [batch, positions, width]."""
        chosen = self.mask if chosen is None else chosen
        key = ("index", id(chosen))
        if key not in self.scratch:  # found once for the batch, used for every site
            self.scratch[key] = None if bool(chosen.all()) else chosen.flatten().nonzero()[:, 0]
        flat, index = tensor.flatten(0, 1), self.scratch[key]
        return flat if index is None else flat.index_select(0, index)

    def owners(self, chosen: Tensor | None = None) -> Tensor:
        """The row in the batch of each chosen token [tokens]."""
        chosen = self.mask if chosen is None else chosen
        return torch.arange(len(chosen), device=chosen.device)[:, None].expand(chosen.shape)[chosen]


class State(Protocol):
    """What a probe has added up so far; `pack` gives plain tensors, numbers, lists and dicts for a file."""

    def pack(self) -> dict:
        """Everything needed to go on from here."""
        ...


@dataclass(frozen=True, kw_only=True)
class Probe(ABC):
    """A measurement; its fields are its options, and a subclass is one file of this package.

    The driver makes one state for each pass, hands it every layer of every batch as soon as the layer is done, and asks
    for rows at the end. Nothing is kept on the probe itself.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    by_layer: ClassVar[bool] = False  # whether layers can be measured in different passes

    @property
    def name(self) -> str:
        """The probe's public name: its file's name."""
        return type(self).__module__.rpartition(".")[2]

    def split_rule(self) -> SplitRule | None:
        """How documents must be divided; None when it does not matter."""
        return None

    def epochs(self) -> int:
        """How many extra passes over the fit and tune documents come before the score documents."""
        return 0

    def wants_padding(self) -> bool:
        """Whether sequences must be padded to full length."""
        return False

    @abstractmethod
    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """The sites of a layer it reads."""

    @abstractmethod
    def memory(self, setting: Setting) -> int:
        """Bytes its state takes at the most."""

    @abstractmethod
    def start(self, setting: Setting, packed: dict | None) -> State:
        """A fresh state, or the one a file holds."""

    @abstractmethod
    def see(self, state: Any, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:
        """Add one layer of one batch."""

    def turn(self, state: Any, setting: Setting, phase: str) -> None:  # noqa: B027 - most probes have nothing to do
        """Called when a phase is over."""

    @abstractmethod
    def rows(self, state: Any, setting: Setting) -> Iterator[Row]:
        """The rows, without provenance, which the driver adds."""
