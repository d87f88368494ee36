"""Muon: matrices move by orthogonal updates, everything else by AdamW."""

from typing import Annotated, Literal, cast

import torch
from pydantic import Field

from transect.train.optimizers._orthogonal import Orthogonal, Scale
from transect.train.optimizers._parameters import Named
from transect.train.optimizers.adamw import adam
from transect.train.optimizers.base import Moment, Optimizer, OptimizerConfig


class Muon(Optimizer):
    """Weights of linear maps, and each block's matrix of a memory's tables, by `Orthogonal`; all else by AdamW.

    All else: embeddings, the head, biases, norms, learned numbers. A block that no token reads keeps moving along its
    old momentum, at full length until that has faded. Blocks of one cell are matrices of one row: their updates are
    normed rows. Source: Keller Jordan, kellerjordan.github.io/posts/muon; the scale `moonlight` arXiv 2502.16982;
    stacked matrices are ours. Cost: one number of state per weight of a matrix; per matrix and step the products of
    `orthogonalised`, on every process that shares the matrix.
    """

    class Config(OptimizerConfig):
        """lr is that of matrices; adamw_lr that of all else, by default the same, which goes with scale `moonlight`.

        scale: see `_orthogonal.scaled`; Keller Jordan's own settings are scale keller, lr 0.02, adamw_lr 3e-4,
        weight_decay 0. betas and eps are AdamW's. iterations: of Newton-Schulz, in `precision`, by default bfloat16 on
        CUDA and float32 on the CPU; float64 for float64 weights.
        """

        kind: str = "muon"
        adamw_lr: Annotated[float, Field(gt=0)] | None = None
        momentum: Moment = 0.95
        nesterov: bool = True
        scale: Scale = "moonlight"
        iterations: Annotated[int, Field(ge=1)] = 5
        precision: Literal["bfloat16", "float32", "float64"] | None = None

    def make(self, parameters: list[Named]) -> list[torch.optim.Optimizer]:
        config = cast(Muon.Config, self.config)
        matrices = [item for item in parameters if item.role == "matrix"]
        others = [item for item in parameters if item.role != "matrix"]
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            groups = self.groups("muon", matrices, config.lr, turned=True)
            dtype = None if config.precision is None else getattr(torch, config.precision)
            how = (config.momentum, config.nesterov, config.iterations, config.scale, dtype)
            parts.append(Orthogonal(groups, *how))
        if others:
            parts.append(adam(self.groups("adamw", others, config.adamw_lr or config.lr), config))
        return parts
