"""What a layer architecture is to the model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, cast

from torch import Tensor, nn

from transect import registry
from transect.models.config import LayerConfig, ModelConfig
from transect.models.context import Context
from transect.models.cuts import Cuts, Cuttable
from transect.models.ffn.base import Numbers
from transect.models.plug import PlugConfig


class BlockOutput(NamedTuple):
    """hidden [batch, positions, width], the stream leaving the layer; losses weighted; stats for the log, detached."""

    hidden: Tensor
    losses: Numbers
    stats: Numbers


class Block(nn.Module, ABC):
    """One layer of the stack: reads the stream, returns it changed.

    Made by `(layer, model, index)`: `layer.block` are its own settings, `index` numbers its weights among the model's.
    """

    Config: ClassVar[type[PlugConfig]]

    @abstractmethod
    def forward(self, hidden: Tensor, context: Context, place: int) -> BlockOutput:
        """`place` is the 0-based position in the executed order: the layer's place in the cache."""

    def plan(self) -> dict[str, Cuts]:
        """How its parts, by their paths, are shared among processes that see the same text; others stay whole."""
        return {path: part.cuts() for path, part in self.named_modules() if isinstance(part, Cuttable)}


def build(layer: LayerConfig, model: ModelConfig, index: int) -> Block:
    """The layer that the settings describe."""
    made = cast(Callable[..., Block], registry.load("transect.models.blocks", layer.block.kind, Block))
    return made(layer, model, index)


def named(numbers: Numbers, part: str) -> Numbers:
    """Losses or statistics of one part of a layer, under its name."""
    return {f"{part}.{name}": number for name, number in numbers.items()}
