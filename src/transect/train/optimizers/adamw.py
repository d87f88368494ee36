"""AdamW, and Adam with an L2 penalty."""

from typing import cast

import torch

from transect.train.optimizers._parameters import Named
from transect.train.optimizers.base import Group, Optimizer, OptimizerConfig

_FUSED = ("cpu", "cuda")


class AdamW(Optimizer):
    """w = (1 - lr wd) w - lr m / (sqrt(v) + eps), m and v corrected for their start at 0.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2. PyTorch's own, fused on the CPU and on CUDA.
    Source: Loshchilov and Hutter, arXiv 1711.05101; with `l2` Kingma and Ba, arXiv 1412.6980, as FFN-Wider trains
    (papers/ffn_wider_cea, Common). Cost: two numbers of state per parameter.
    """

    class Config(OptimizerConfig):
        """l2: weight_decay is added to the gradient, wd w, and so divided by sqrt(v) too: Adam, not AdamW."""

        kind: str = "adamw"
        l2: bool = False

    def make(self, parameters: list[Named]) -> list[torch.optim.Optimizer]:
        config = cast(AdamW.Config, self.config)
        name = "adam" if config.l2 else "adamw"
        return [adam(self.groups(name, parameters, config.lr), config, config.l2)]


def adam(groups: list[Group], config: OptimizerConfig, l2: bool = False) -> torch.optim.Optimizer:
    """PyTorch's Adam or AdamW over groups: the fused one where all devices have it, else one call for many tensors."""
    fused = all(parameter.device.type in _FUSED for group in groups for parameter in group["params"])
    kind = torch.optim.Adam if l2 else torch.optim.AdamW
    return kind(groups, betas=config.betas, eps=config.eps, fused=fused or None, foreach=None if fused else True)
