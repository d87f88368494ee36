"""The sparse FFN: a memory of blocks, and a selector that says which of them a token reads."""

from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor, nn

from transect.config import misfit
from transect.models.activations import ActivationName
from transect.models.config import ModelConfig, Size
from transect.models.cuts import Cuts
from transect.models.ffn.base import FFN, FFNConfig, FFNOutput
from transect.models.ffn.dense import Dense
from transect.models.memory.choice import Picker
from transect.models.memory.memory import Memory
from transect.models.plug import PlugConfig, Unfit, chooser, plugin_of
from transect.models.selectors._scored import NoisyConfig, ScoredConfig
from transect.models.selectors.base import Selector, SelectorConfig, Shape

if TYPE_CHECKING:
    from typing import Self

    from transect.models.config import LayerConfig

SELECTORS = "transect.models.selectors"
EXPANSION = 16.0
Count = Annotated[int, Field(ge=0)]
SelectorChoice = Annotated[SerializeAsAny[PlugConfig], BeforeValidator(chooser(SELECTORS, "Selector", "avg_k"))]


class Sparse(FFN):
    """sum over the b chosen blocks of gate * f(x K^(i)^T + b1^(i)) V^(i), + b2, + shared blocks that every token reads.

    The parts are `memory`, `selector`, `shared` (a dense FFN, or None) and `out_bias` (b2, added once, outside the
    gate; that of the shared FFN's last map where there is one). Losses are weighted by the selector's settings;
    statistics are the selector's, with its unweighted losses. Source: Avg-K 3.1, table 4. Cost: that of the chosen
    blocks (`Memory.flops`), of choosing (`Selector.flops`) and of the shared blocks.
    """

    class Config(FFNConfig):
        """One of `expansion` E (width E * 4d; 16 if nothing is given), `width` in cells, or `blocks` sets the size.

        block_size g defaults to 4d/16, active_blocks b to 4d/g, so that a token reads 4d cells. shared_blocks are
        read by every token, in addition. backend: how the memory is computed; `auto` takes what was measured to be
        fastest (`choice.find_table`).
        """

        kind: str = "sparse"
        expansion: Annotated[float, Field(gt=0)] | None = None
        width: Size | None = None
        blocks: Size | None = None
        block_size: Size | None = None
        active_blocks: Size | None = None
        shared_blocks: Count = 0
        activation: ActivationName = "gelu"
        gated: bool = False
        bias: bool = False
        selector: SelectorChoice = Field(default="avg_k", validate_default=True)  # pyright: ignore[reportAssignmentType]
        backend: Literal["auto", "reference", "masked", "grouped", "gather"] = "auto"

        @model_validator(mode="after")
        def _one_size(self) -> "Self":
            given = [name for name in ("expansion", "width", "blocks") if getattr(self, name) is not None]
            if len(given) > 1:
                why = f"{given[0]} is given too; give one of expansion, width and blocks"
                raise misfit(given[1], getattr(self, given[1]), why)
            return self

        def check(self, layer: "LayerConfig", model: ModelConfig, where: str) -> None:
            """Raise Unfit where sizes are not whole or the selector does not go with them or with the model."""
            self.check_sizes(model, where)
            rule = plugin_of(self.selector, SELECTORS, Selector)
            if rule.cells_only and self.cells_per_block(model) != 1:
                why = f"selector {self.selector.kind} picks single cells; give block_size: 1"
                raise Unfit(f"{where}.block_size", self.cells_per_block(model), why)
            if rule.provides_keys and self.gated:
                # The linear half of a gated cell is a second key table of full rank: what such selectors save.
                why = f"selector {self.selector.kind} has keys of its own, without a gated half; give gated: false"
                raise Unfit(f"{where}.gated", True, why)
            if model.causal and not rule.causal_safe:
                self._check_consent(f"{where}.selector")
            # In a layer that splits its FFN these settings are a part's, and the selector must fit that part.
            self.selector.check(layer.model_copy(update={"ffn": self}), model, f"{where}.selector")

        def check_sizes(self, model: ModelConfig, where: str) -> None:
            """Raise Unfit where the numbers of blocks and cells are not whole, or more are read than there are."""
            width = 4 * model.width
            if self.block_size is None and width % 16:
                raise Unfit(f"{where}.block_size", None, f"a sixteenth of {width} is not whole; give block_size")
            size = self.cells_per_block(model)
            if self.active_blocks is None and width % size:
                why = f"does not divide 4 x width = {width} active cells; give active_blocks"
                raise Unfit(f"{where}.block_size", size, why)
            if self.blocks is None:
                cells = self.width or (self.expansion or EXPANSION) * width
                name = "width" if self.width else "expansion"
                if cells % size:
                    given = getattr(self, name) or EXPANSION
                    why = f"must give a whole number of blocks of {size} cells; there are {cells:g} cells"
                    raise Unfit(f"{where}.{name}", given, why)
            if self.active(model) > self.count(model):
                why = f"more than there are; a memory of {self.count(model)} blocks was asked for"
                raise Unfit(f"{where}.active_blocks", self.active(model), why)

        def _check_consent(self, where: str) -> None:
            """Refuse a selector that looks at later tokens, unless it asks for consent itself, or has it."""
            kind, says = self.selector.kind, getattr(type(self.selector), "leaks", None)
            if says not in (None, NoisyConfig.leaks, ScoredConfig.leaks):
                return  # it knows under which settings it does, and `check_shape` asks
            consent = getattr(self.selector, "accept_leak", None)
            if consent is None:
                why = "looks at later tokens and has no option accept_leak; a causal model allows selectors that do not"
                raise Unfit(f"{where}.kind", kind, why)
            if not consent:
                why = f"selector {kind} looks at later tokens; in a causal model give accept_leak: true"
                raise Unfit(f"{where}.accept_leak", False, why)

        def cells_per_block(self, model: ModelConfig) -> int:
            """g."""
            return self.block_size or 4 * model.width // 16

        def count(self, model: ModelConfig) -> int:
            """Blocks B."""
            cells = self.width or round((self.expansion or EXPANSION) * 4 * model.width)
            return self.blocks or cells // self.cells_per_block(model)

        def active(self, model: ModelConfig) -> int:
            """Blocks b that a token reads, shared ones not counted."""
            return self.active_blocks or 4 * model.width // self.cells_per_block(model)

        def shape(self, model: ModelConfig, index: int) -> Shape:
            """What the selector of layer `index` is told."""
            sizes = self.count(model), self.cells_per_block(model), self.active(model)
            return Shape(model.width, *sizes, model.vocab_size, index, gated=self.gated)

        def split(self, ratio: float, model: ModelConfig) -> "tuple[FFNConfig | None, FFNConfig | None]":
            """Two sparse FFNs of ratio and 1 - ratio of the blocks, of the active and of the shared ones.

            Raises ValueError where one of these is not whole.
            """
            wholes = {
                "blocks": self.count(model),
                "active_blocks": self.active(model),
                "shared_blocks": self.shared_blocks,
            }
            first = {name: round(ratio * whole) for name, whole in wholes.items()}
            wrong = [name for name, whole in wholes.items() if abs(first[name] - ratio * whole) > 1e-9 * (whole + 1)]
            if wrong or not 0 <= ratio <= 1:
                name = wrong[0] if wrong else "blocks"
                raise ValueError(f"{name} {wholes[name]} cannot be split at {ratio}; the parts must be whole")
            rest = {name: whole - first[name] for name, whole in wholes.items()}
            return self._of(first, model), self._of(rest, model)

        def _of(self, part: dict[str, int], model: ModelConfig) -> "FFNConfig | None":
            if not part["blocks"] or not part["active_blocks"]:
                return None
            return self.but(**part, block_size=self.cells_per_block(model), expansion=None, width=None)

    def __init__(self, config: "Sparse.Config", model: ModelConfig, index: int) -> None:
        super().__init__()
        rule = plugin_of(config.selector, SELECTORS, Selector)
        shape = config.shape(model, index)
        self.active = shape.active
        self.loss_weights = cast(SelectorConfig, config.selector).loss_weights()
        self.memory = Memory(
            shape.width,
            shape.blocks,
            shape.block_size,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
            with_keys=not rule.provides_keys,
            picker=Picker(config.backend),
        )
        self.selector = rule(cast(SelectorConfig, config.selector), shape)  # pyright: ignore[reportAbstractUsage]
        self.shared = _shared(config, model, index)
        own_bias = config.bias and self.shared is None
        self.out_bias = nn.Parameter(torch.zeros(model.width)) if own_bias else None

    def forward(self, x: Tensor, token_ids: Tensor | None, real: Tensor | None) -> FFNOutput:
        rows = x.flatten(0, -2)
        chosen = self.selector(rows, self.memory, _flat(token_ids), _flat(real))
        if self.memory.keys is None and chosen.coefficients is not None:
            # All that the memory then is: a view sees its experts one at a time as weight * value.
            hidden = self.memory(rows, chosen.blocks, chosen.weights * chosen.coefficients)
        elif chosen.coefficients is not None:
            hidden = self.memory(rows, chosen.blocks, chosen.weights, chosen.coefficients)
        else:
            hidden = self.memory(rows, chosen.blocks, chosen.weights)
        hidden = hidden.view(x.shape)
        if self.out_bias is not None:
            hidden = hidden + self.out_bias
        if self.shared is not None:
            hidden = hidden + self.shared(x, token_ids, real).hidden
        weights = self.loss_weights
        losses = {name: weights[name] * loss for name, loss in chosen.losses.items() if weights.get(name)}
        stats = chosen.stats | {name: loss.detach() for name, loss in chosen.losses.items()}
        return FFNOutput(hidden, losses, stats)

    def cuts(self) -> Cuts:
        """Not by units: its blocks can be spread instead."""
        return Cuts(refused="a sparse FFN has no units to share; give parallel.expert in place of tensor")

    def flops(self) -> float:
        """Forward FLOPs per token, two for a multiply-add: the chosen blocks, choosing them, the shared ones."""
        shared = 0.0 if self.shared is None else self.shared.flops()
        return self.memory.flops(self.active) + self.selector.flops() + shared


def _shared(config: "Sparse.Config", model: ModelConfig, index: int) -> Dense | None:
    if not config.shared_blocks:
        return None
    units = config.shared_blocks * config.cells_per_block(model)
    dense = Dense.Config(width=units, activation=config.activation, gated=config.gated, bias=config.bias)
    return Dense(dense, model, index)


def _flat(given: Tensor | None) -> Tensor | None:
    return None if given is None else given.flatten()
