"""How a sub-layer reads the stream and is added to it: norms where the layout puts them, dropout, residual number."""

import torch
from torch import Tensor, nn

from transect.models.config import LayerConfig, ModelConfig
from transect.models.norms import norm


class Residual(nn.Module):
    """g x + f(x) with norms: `enter` gives f its input, `leave` adds what it returned.

    pre: g x + f(N(x)); post: N(g x + f(x)); sandwich: g x + N'(f(N(x))); branch: g x + N(f(x)); none: g x + f(x).
    """

    def __init__(self, layer: LayerConfig, model: ModelConfig, number: float | str) -> None:
        super().__init__()
        layout = self.layout = layer.norm.layout
        self.norm = norm(layer.norm, model.width) if layout != "none" else None
        self.out_norm = norm(layer.norm, model.width) if layout == "sandwich" else None
        self.dropout = nn.Dropout(layer.dropout)
        self.number = nn.Parameter(torch.ones(())) if number == "learned" else float(number)

    def enter(self, x: Tensor) -> Tensor:
        """What the sub-layer receives."""
        return self.norm(x) if self.norm is not None and self.layout in ("pre", "sandwich") else x

    def leave(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream after the sub-layer."""
        if self.layout == "branch" and self.norm is not None:
            branch = self.norm(branch)
        if self.out_norm is not None:
            branch = self.out_norm(branch)
        branch = self.dropout(branch)
        if isinstance(self.number, Tensor):
            total = self.number * x + branch
        elif self.number == 0:
            total = branch
        else:
            total = branch + (x if self.number == 1 else self.number * x)
        return self.norm(total) if self.layout == "post" and self.norm is not None else total
