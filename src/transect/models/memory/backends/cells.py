"""From the activation's input to memory coefficients and back, gated or not."""

from torch import Tensor

from transect.models.memory.backends.slopes import backward_of
from transect.models.memory.backends.tables import Tables


class Cells:
    """f(z), or f(a) * c where gated: `z` then holds a before c along `dim`."""

    def __init__(self, tables: Tables, dim: int) -> None:
        self.gated, self.dim = tables.up is not None, dim
        self.function, self.slope = tables.function, backward_of(tables.activation)

    def value(self, z: Tensor) -> Tensor:
        """The coefficients; `z` itself where f is the identity."""
        if not self.gated:
            return self.function(z)
        gate, linear = z.chunk(2, self.dim)
        return self.function(gate) * linear

    def backward(self, gradient: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Gradient of z, given that of the coefficients; that of its two halves where gated."""
        if not self.gated:
            return (self.slope(gradient, z),)
        gate, linear = z.chunk(2, self.dim)
        return self.slope(gradient * linear, gate), self.function(gate).mul_(gradient)
