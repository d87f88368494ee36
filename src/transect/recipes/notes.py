"""What a reader of a model's settings should know before training it."""

from typing import Any

from torch import nn

from transect.models.blocks.caa import CAA
from transect.models.budget import Budget, budget
from transect.models.build import LanguageModel
from transect.models.config import ModelConfig
from transect.models.plug import PlugConfig
from transect.models.selectors._scored import GatedConfig, NoisyConfig
from transect.models.selectors.base import Selector


def notes(settings: ModelConfig, model: LanguageModel, counted: Budget) -> list[str]:
    """One line for each trap that the settings hold; `model` may be a skeleton, `counted` is its budget."""
    said: list[str] = []
    for selector in (module for module in model.modules() if isinstance(module, Selector)):
        said += _of_selector(selector, settings.causal)
    if any(_moves_ffn(layer.block) for layer in settings.layer_configs):
        said += _of_caa(settings, counted)
    return list(dict.fromkeys(said))


def _moves_ffn(block: PlugConfig) -> bool:
    """Whether a part of the layer's own FFN is inside attention."""
    return isinstance(block, CAA.Config) and block.inner is None and block.outer_ratio != 1


def _of_selector(selector: Selector, causal: bool) -> list[str]:
    config = getattr(selector, "config", None)
    said: list[str] = []
    if causal and isinstance(config, NoisyConfig) and config.leaks() is not None:
        said.append(f"{config.kind} leaks: {config.leaks()}. Losses of this causal model are too good.")
    if isinstance(config, GatedConfig) and config.gate == "binary" and not config.loss_weights() and _trained(selector):
        said.append(
            f"{config.kind} with gate: binary and no balance loss: its own weights get no gradient, so they stay a "
            "random projection; give another gate, or balance: 0.01"
        )
    return said


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _of_caa(settings: ModelConfig, counted: Budget) -> list[str]:
    """What the block costs beyond the standard one with the same FFN."""
    plain: dict[str, Any] = settings.plain()
    for given in (plain, *(override["set"] for override in plain["overrides"])):
        block = given.get("block")
        kind = block.get("kind", settings.block.kind) if isinstance(block, dict) else block
        if kind == "caa":
            given["block"] = "standard"
    whole = budget(ModelConfig.parse(plain), counted.context, counted.dtype)
    more = [counted.parameters - whole.parameters, counted.flops - whole.flops]
    shares = [more[0] / whole.parameters, more[1] / whole.flops]
    return [
        f"against the standard block with this FFN: {more[0]:+,} parameters ({shares[0]:+.2%}, biases and norms) and "
        f"{more[1]:+,.0f} FLOPs per token ({shares[1]:+.1%}; a raw direct path projects keys and values twice); "
        "transect.models.match finds the width of equal FLOPs"
    ]
