"""Probe: a measurement. Which sites it reads, which edits it makes, what it adds up, which rows come out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from transect.data import Dataset
from transect.data.objective import Objective
from transect.results import Row
from transect.view.capture import Seen
from transect.view.variants import Variant
from transect.view.view import View

PHASES = ("fit", "tune", "train", "score", "edit")


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How documents are divided into fit, tune and score; see `data.split.assign`."""

    score_fraction: float = 0.25
    tune_fraction: float = 0.125
    method: Literal["hash", "ordered"] = "hash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a probe goes through the text; probes with the same reading share every forward pass.

    `split`: fit and tune on other documents than those scored. `rounds` 2: every document comes in phase `fit` and
    again in phase `score`. `canonical`: without a split, in an order that follows from the tokens alone; two rounds
    always do. `targets`: what each position is asked for.
    `edit_tokens`: on how much of the text (of the scored part, with a split) edited models are run, in whole sequences;
    0 for a probe without edits. `observes`: whether the unedited model is looked into at all. `fits`: whether it is on
    the documents of fit and tune, where there is a split.
    """

    split: SplitRule | None = None
    rounds: int = 1
    canonical: bool = False
    targets: Objective | None = None
    edit_tokens: int = 0
    observes: bool = True
    fits: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one model, edited or not, made of one batch, against the unedited model on the same tokens.

    Losses in nats; `agree` says that the most probable token is the same; all three are those of positions with a
    target, None for a model without a head. `displacement` is (1 - cos)/2 of each real token's last hidden state.
    """

    loss: Tensor | None  # [targets]
    kl: Tensor | None  # [targets] KL(intact || edited)
    agree: Tensor | None  # [targets] 0 or 1
    displacement: Tensor  # [tokens]
    target_unit: Tensor  # [targets] error unit
    token_unit: Tensor  # [tokens] error unit
    layers_run: int


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
    edit_sequences: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    train_sequences: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # those not scored

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
    token: Tensor  # [batch, positions] index of each token in the dataset
    target: Tensor | None = None  # [batch, positions] the token asked for, -1 none; for a probe that reads targets
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
    saving: ClassVar[str] = "measure less text"  # what to do where its sums do not fit into memory
    costly: ClassVar[bool] = False  # whether it runs the model many times, and only when asked for by name

    @property
    def name(self) -> str:
        """The probe's public name: its file's name."""
        return type(self).__module__.rpartition(".")[2]

    def refusal(self, view: View) -> str | None:
        """Why this model cannot be measured with it; None when it can."""
        return None

    def reading(self, view: View) -> Reading:
        """How it goes through the text; by default once, in any order, with whatever other probes share the pass."""
        return Reading()

    def epochs(self) -> int:
        """How many extra passes over the fit and tune documents come before the score documents."""
        return 0

    def wants_padding(self) -> bool:
        """Whether sequences must be padded to full length."""
        return False

    def sites(self, view: View, layer: int) -> tuple[str, ...]:
        """The sites of a layer it reads."""
        return ()

    @abstractmethod
    def memory(self, setting: Setting) -> int:
        """Bytes its state takes at the most."""

    def work(self, setting: Setting) -> float:
        """Floating-point operations beyond the model's own, for the time that a plan foretells; rough is enough."""
        return 0.0

    @abstractmethod
    def start(self, setting: Setting, packed: dict | None) -> State:
        """A fresh state, or the one a file holds."""

    def see(self, state: Any, setting: Setting, layer: int, seen: Seen, sight: Sight) -> None:  # noqa: B027
        """Add one layer of one batch."""

    def end(self, state: Any, setting: Setting, sight: Sight) -> None:  # noqa: B027
        """Called when a batch's pass is over, for what needs passes of its own."""

    def turn(self, state: Any, setting: Setting, phase: str) -> None:  # noqa: B027 - most probes have nothing to do
        """Called when a phase is over."""

    def variants(self, state: Any, setting: Setting) -> tuple[Variant, ...]:
        """The edited models that phase `edit` runs; state None: for a plan, which counts their layers and runs none."""
        return ()

    def see_edit(self, state: Any, setting: Setting, variant: int | None, outcome: Outcome) -> None:  # noqa: B027
        """Add what a variant made of one batch; variant None is the unedited model, and comes first."""

    def trainings(self, setting: Setting) -> tuple[int, ...]:
        """What each training after an edit takes, as tokens through the whole model; they come last, one by one."""
        return ()

    def train(self, state: Any, setting: Setting, number: int, tick: Callable[[int], None]) -> None:  # noqa: B027
        """Do one of the trainings, all or nothing; `tick` hears of tokens done and may raise KeyboardInterrupt."""

    @abstractmethod
    def rows(self, state: Any, setting: Setting) -> Iterator[Row]:
        """The rows, without provenance, which the driver adds."""
