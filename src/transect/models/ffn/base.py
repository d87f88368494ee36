"""What a feed-forward network is to a layer."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from transect import registry
from transect.models.config import ModelConfig
from transect.models.plug import PlugConfig

Numbers = dict[str, Tensor]


class FFNConfig(PlugConfig):
    """Settings that any kind of FFN has beside its own."""

    def check_sizes(self, model: ModelConfig, where: str) -> None:
        """Raise Unfit where the width is not whole; the part of `check` that holds before a split, too."""

    def split(self, ratio: float, model: ModelConfig) -> "tuple[FFNConfig | None, FFNConfig | None]":
        """Two FFNs that share this one's width, the first with `ratio` of it; None in place of one without width.

        Raises ValueError saying what is allowed where the parts are not whole. Called after `check_sizes`; the parts
        are checked by themselves.
        """
        raise ValueError(f"an FFN of kind {self.kind} cannot be split")


class FFNOutput(NamedTuple):
    """hidden [batch, positions, width]; losses already weighted, ready to be summed; stats for the log, detached."""

    hidden: Tensor
    losses: Numbers
    stats: Numbers


class FFN(nn.Module, ABC):
    """A position-wise map of the stream's width onto itself; `sparse` ones also return losses and statistics.

    Made by `(config, model, index)`: `index` numbers the layer's weights; nothing may depend on it but seeds.
    """

    Config: ClassVar[type[FFNConfig]]

    @abstractmethod
    def forward(self, x: Tensor, token_ids: Tensor | None, real: Tensor | None) -> FFNOutput:
        """x [batch, positions, width]; token_ids and real [batch, positions] (real False at padding), or None."""


def build(config: FFNConfig, model: ModelConfig, index: int) -> FFN:
    """The FFN that the settings describe."""
    return registry.load("transect.models.ffn", config.kind, FFN)(config, model, index)  # pyright: ignore[reportAbstractUsage]
