"""The dense FFN: two linear maps with an activation between them, or three where it is gated."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor, nn

from transect.models.activations import Activation, ActivationName
from transect.models.config import ModelConfig, Size
from transect.models.cuts import Cuts
from transect.models.ffn.base import FFN, FFNConfig, FFNOutput
from transect.models.plug import Unfit

if TYPE_CHECKING:
    from transect.models.config import LayerConfig


class Dense(FFN):
    """f(x W_up + b1) W_down + b2; gated: (f(x W_gate + b0) * (x W_up + b1)) W_down + b2.

    The modules are `up`, `act`, `down`, and `gate` where gated; dropout is the block's business. No losses, no
    statistics. Cost: 2 width d multiply-adds per token, 3 where gated.
    """

    class Config(FFNConfig):
        """width: units inside; if it is not given, `multiple` times the model's width."""

        kind: str = "dense"
        width: Size | None = None
        multiple: Annotated[float, Field(gt=0)] = 4.0
        activation: ActivationName = "gelu"
        gated: bool = False
        bias: bool = True

        def check(self, layer: "LayerConfig", model: ModelConfig, where: str) -> None:
            """As `check_sizes`."""
            self.check_sizes(model, where)

        def check_sizes(self, model: ModelConfig, where: str) -> None:
            """Raise Unfit where `multiple` does not give a whole number of units."""
            if self.width is None and not _whole(self.multiple * model.width):
                why = f"times width {model.width} must be a whole number; or give {where}.width"
                raise Unfit(f"{where}.multiple", self.multiple, why)

        def units(self, model: ModelConfig) -> int:
            """Units inside."""
            return self.width or round(self.multiple * model.width)

        def split(self, ratio: float, model: ModelConfig) -> "tuple[FFNConfig | None, FFNConfig | None]":
            """Two dense FFNs of ratio and 1 - ratio of the units; raises ValueError where these are not whole."""
            units = self.units(model)
            first = ratio * units
            if not 0 <= ratio <= 1 or not _whole(first):
                raise ValueError(f"{units} units cannot be split at {ratio}; a ratio must be a multiple of 1/{units}")
            parts = (round(first), units - round(first))
            return self._of(parts[0]), self._of(parts[1])

        def _of(self, units: int) -> "FFNConfig | None":
            return self.but(width=units) if units else None

    def __init__(self, config: "Dense.Config", model: ModelConfig, index: int) -> None:
        super().__init__()
        units = config.units(model)
        self.gate = nn.Linear(model.width, units, bias=config.bias) if config.gated else None
        self.up = nn.Linear(model.width, units, bias=config.bias)
        self.act = Activation(config.activation)
        self.down = nn.Linear(units, model.width, bias=config.bias)

    def forward(self, x: Tensor, token_ids: Tensor | None, real: Tensor | None) -> FFNOutput:
        hidden = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return FFNOutput(self.down(hidden), {}, {})

    def cuts(self) -> Cuts:
        """By units: `up` and `gate` by their outputs, `down` by its inputs."""
        columns = ("up",) if self.gate is None else ("gate", "up")
        return Cuts(columns=columns, rows=("down",), counts={"ffn.width": self.up.out_features})

    def flops(self) -> float:
        """Forward FLOPs per token, two for a multiply-add; biases and the activation are not counted."""
        maps = 2 if self.gate is None else 3
        return 2.0 * maps * self.up.in_features * self.up.out_features


def _whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-9 * max(1.0, abs(value))
