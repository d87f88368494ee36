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
        self.adam = torch.optim.Adam([self.weight, self.bias], lr=LEARNING_RATE)

    @classmethod
    def truncated_normal(cls, objective: str, sizes: tuple[int, int], like: Tensor, seed: int) -> "Approximator":
        """W truncated normal with std 0.02, b = 0, as in the paper's code."""
        weight = torch.empty(sizes, dtype=like.dtype)
        nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD, generator=torch.Generator().manual_seed(seed))
        return cls(objective, weight.to(like.device), torch.zeros(sizes[1], dtype=like.dtype, device=like.device))

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
