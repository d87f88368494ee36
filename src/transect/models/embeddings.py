"""Token, position and segment embeddings."""

import torch
from torch import Tensor, nn

from transect.models.config import ModelConfig
from transect.models.norms import norm


class Embeddings(nn.Module):
    """dropout(N(scale * token + position + segment)); the norm, positions and segments where the settings have them."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.scale = model.embedding.scale
        self.tokens = nn.Embedding(model.vocab_size, model.width)
        self.positions = nn.Embedding(model.max_positions, model.width) if model.positions == "learned" else None
        self.types = nn.Embedding(model.embedding.types, model.width) if model.embedding.types else None
        self.norm = norm(model.norm, model.width) if model.embedding.norm else None
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, embedded: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """embedded [batch, positions, width] are rows of `tokens`; positions and types [batch or 1, positions]."""
        x = self.summed(embedded, positions, types)
        return self.dropout(x if self.norm is None else self.norm(x))

    def summed(self, embedded: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """The sum of the tables' rows, before norm and dropout."""
        x = embedded if self.scale == 1.0 else embedded * self.scale
        if self.types is not None:
            x = x + self.types(torch.zeros_like(positions) if types is None else types)
        if self.positions is not None:
            x = x + self.positions(positions)
        return x
