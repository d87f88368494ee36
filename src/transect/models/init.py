"""Initial values: one table from parameter paths to how they are drawn."""

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from transect.models.config import InitConfig, InitRule

_WRITERS = ("out.weight", "down.weight", "values")
"""Ends of the paths of parameters that write into the stream."""


def rule_for(path: str, parameter: Tensor, config: InitConfig) -> InitRule:
    """The rule of one parameter: the first of the table whose pattern fits its path, else the default.

    Defaults: a `norm`'s weight and a learned residual 1; biases 0; everything else normal with the table's std.
    """
    for pattern, rule in config.rules.items():
        if fnmatchcase(path, pattern):
            return rule
    name = path.rpartition(".")[2]
    if "bias" in name:
        return InitRule(value=0.0)
    if parameter.ndim == 0 or (parameter.ndim == 1 and "norm" in path):
        return InitRule(value=1.0)
    scaled = config.depth_scaled and path.endswith(_WRITERS)
    return InitRule(draw="normal", std=config.std, depth_scaled=scaled)


@torch.no_grad()
def draw(parameter: Tensor, rule: InitRule, layers: int) -> None:
    """Fill a parameter in place by its rule; `layers` is the depth that `depth_scaled` means."""
    if rule.value is not None:
        nn.init.constant_(parameter, rule.value)
        return
    std = rule.std / (2 * layers) ** 0.5 if rule.depth_scaled else rule.std
    if rule.draw == "normal":
        nn.init.normal_(parameter, std=std)
    elif rule.draw == "truncated":
        nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.uniform_(parameter, -(3**0.5) * std, 3**0.5 * std)
