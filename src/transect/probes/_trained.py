"""The paper's approximator: a linear map (or one ReLU layer) trained by Adam on the cosine or the squared error."""

from typing import Any

import torch
from torch import Tensor, nn

OBJECTIVES = ("cosine_adam", "mse_adam", "relu_control")
LEARNING_RATE = 1e-3
STD = 0.02


class Approximator:
    """W and b of one (layer, element) with their Adam state; a step is one batch of the fit documents."""

    def __init__(self, objective: str, weight: Tensor, bias: Tensor) -> None:
        self.objective = objective
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.adam = torch.optim.Adam(self._parameters(), lr=LEARNING_RATE)

    def _parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    @classmethod
    def truncated_normal(cls, objective: str, sizes: tuple[int, int], like: Tensor, seed: int) -> "Approximator":
        """W truncated normal with std 0.02, b = 0, as in the paper's code."""
        weight = _truncated(sizes, like, torch.Generator().manual_seed(seed))
        return cls(objective, weight, torch.zeros(sizes[1], dtype=like.dtype, device=like.device))

    def __call__(self, x: Tensor) -> Tensor:
        """y* [tokens, e] for x [tokens, d]."""
        out = torch.addmm(self.bias, x, self.weight)
        return out.relu() if self.objective == "relu_control" else out

    def step(self, x: Tensor, y: Tensor) -> None:
        """One Adam step on 1 - mean cos(y, y*), or on the mean squared error."""
        with torch.enable_grad():
            out = self(x.detach())
            if self.objective == "mse_adam":
                loss = (out - y.detach()).square().mean()
            else:
                loss = 1 - torch.cosine_similarity(out, y.detach(), dim=1).mean()
            self.adam.zero_grad()
            loss.backward()
        self.adam.step()

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {"weight": self.weight.detach(), "bias": self.bias.detach(), "adam": self.adam.state_dict()}

    @classmethod
    def unpack(cls, objective: str, packed: dict[str, Any]) -> "Approximator":
        """Take up what `pack` gave."""
        twin = cls(objective, packed["weight"], packed["bias"])
        twin.adam.load_state_dict(packed["adam"])
        return twin


class TwoLinear(Approximator):
    """Two linear maps in a row, d -> 4 d -> e, without a non-linearity between them; trained on the cosine."""

    def __init__(self, first: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor) -> None:
        self.first = [nn.Parameter(tensor) for tensor in first]
        super().__init__("cosine_adam", weight, bias)

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.first, self.weight, self.bias]

    @classmethod
    def fresh(cls, sizes: tuple[int, int], like: Tensor, seed: int) -> "TwoLinear":
        """Both maps truncated normal with std 0.02, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        wide = 4 * sizes[0]
        empty = {"dtype": like.dtype, "device": like.device}
        first = _truncated((sizes[0], wide), like, generator), torch.zeros(wide, **empty)
        return cls(first, _truncated((wide, sizes[1]), like, generator), torch.zeros(sizes[1], **empty))

    def __call__(self, x: Tensor) -> Tensor:
        """y* [tokens, e] for x [tokens, d]."""
        return super().__call__(torch.addmm(self.first[1], x, self.first[0]))

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return super().pack() | {"first": [tensor.detach() for tensor in self.first]}

    @classmethod
    def unpack(cls, objective: str, packed: dict[str, Any]) -> "TwoLinear":
        """Take up what `pack` gave; the objective is always the cosine."""
        twin = cls(tuple(packed["first"]), packed["weight"], packed["bias"])
        twin.adam.load_state_dict(packed["adam"])
        return twin


def _truncated(sizes: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    weight = torch.empty(sizes, dtype=like.dtype)
    nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
    return weight.to(like.device)
