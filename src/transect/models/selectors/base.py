"""What a rule that picks memory blocks for a token is to a sparse FFN."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from transect.models.plug import PlugConfig

if TYPE_CHECKING:
    from transect.models.config import LayerConfig, ModelConfig
    from transect.models.memory.memory import Memory


@dataclass(frozen=True, slots=True)
class Shape:
    """The memory a selector chooses from: `blocks` of `block_size` cells each, `active` of them for a token.

    width is the stream's; vocab_size and layer are for rules that need them. gated: cells have a linear half.
    """

    width: int
    blocks: int
    block_size: int
    active: int
    vocab_size: int
    layer: int
    gated: bool = False


class Selection(NamedTuple):
    """What was chosen for each token.

    blocks [tokens, b], whole numbers, distinct within a row, best first, -1 = dropped; weights [tokens, b], what each
    block's output is multiplied with, 0 where dropped, in float32 or better. scores [tokens, blocks] are what was
    ranked, None for a rule that never has them all. coefficients [tokens, b]: memory coefficients that the rule itself
    computed (block size 1), in place of f(x k). losses are unweighted scalars (balance is 1 at perfect balance), there
    only when they have a weight; stats are detached numbers for the log (`_balance.statistics`).
    """

    blocks: Tensor
    weights: Tensor
    scores: Tensor | None
    coefficients: Tensor | None
    losses: dict[str, Tensor]
    stats: dict[str, Tensor]


class SelectorConfig(PlugConfig):
    """Settings that any selector has beside its own: weights of its losses, by their names in `Selection.losses`."""

    def loss_weights(self) -> dict[str, float]:
        """The factor of each loss in the model's total; losses not named here are not computed."""
        return {}

    def check(self, layer: "LayerConfig", model: "ModelConfig", where: str) -> None:
        """`check_shape` for the memory of `layer.ffn`; raises Unfit."""
        sizes = layer.ffn
        if isinstance(sizes, _Sizes):
            numbers = sizes.count(model), sizes.cells_per_block(model), sizes.active(model)
            self.check_shape(Shape(model.width, *numbers, model.vocab_size, 0), model.causal, where)

    def check_shape(self, shape: Shape, causal: bool, where: str) -> None:
        """Raise Unfit where these settings, at path `where`, do not go with a memory or with a causal model."""


@runtime_checkable
class _Sizes(Protocol):
    """Settings of an FFN that has a memory."""

    def count(self, model: "ModelConfig") -> int: ...

    def cells_per_block(self, model: "ModelConfig") -> int: ...

    def active(self, model: "ModelConfig") -> int: ...


class Selector(nn.Module, ABC):
    """Picks memory blocks for each token; keeps no state of a batch.

    What it decides by comparing scores goes through `_top.best` or `recompute.decided`, so that a backward pass that
    computes the layer again keeps the choice.

    causal_safe: what a token is given does not depend on later tokens. A causal model refuses a selector that is not,
    unless its Config has an option `accept_leak` that is true, or a method `leaks` of its own that says under which
    settings it does (`_scored.NoisyConfig`). provides_keys: it scores with keys of its own, and the memory has none.
    needs_token_ids: it reads token ids. cells_only: it picks single cells, block size 1.
    """

    Config: ClassVar[type[SelectorConfig]]
    causal_safe: ClassVar[bool] = True
    provides_keys: ClassVar[bool] = False
    needs_token_ids: ClassVar[bool] = False
    cells_only: ClassVar[bool] = False

    def __init__(self, config: SelectorConfig, shape: Shape) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    @abstractmethod
    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        """x [tokens, width]; token_ids [tokens]; real [tokens], False at padding, which no statistic or loss counts."""

    @abstractmethod
    def flops(self) -> float:
        """Forward FLOPs per token of choosing, two for a multiply-add, beyond what `Memory.flops` counts."""

    def reads_cells(self) -> bool:
        """Whether it reads the memory's tables cell by cell, and not only through `Memory.of_blocks`.

        Then the blocks cannot be spread over processes.
        """
        return False

    def reset_buffers(self) -> None:
        """Give buffers their first values, which follow from the settings; for models built on the meta device."""


def chooses(module: nn.Module) -> bool:
    """Whether there is a selector in it."""
    return any(isinstance(part, Selector) for part in module.modules())
