"""A whole model by its settings: with a head for its objective, or only its shape."""

import torch

from transect.models.config import ModelConfig
from transect.models.heads import TransectForCausalLM, TransectForMaskedLM

LanguageModel = TransectForCausalLM | TransectForMaskedLM


def build(settings: ModelConfig) -> LanguageModel:
    """A new language model, drawn from torch's current random state; its head is that of the objective."""
    kind = TransectForCausalLM if settings.causal else TransectForMaskedLM
    model = kind.make(settings)
    assert isinstance(model, LanguageModel)
    return model


def skeleton(settings: ModelConfig) -> LanguageModel:
    """The same model on the meta device: every module and shape, no numbers, no memory."""
    with torch.device("meta"):
        return build(settings)
