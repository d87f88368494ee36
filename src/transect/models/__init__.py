"""Build a Transformer from settings: every architecture of the papers, in any combination, as Hugging Face models.

Importing this package tells transformers' Auto classes about them.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
)

from transect.models.config import ModelConfig as ModelConfig
from transect.models.heads import TransectForCausalLM as TransectForCausalLM
from transect.models.heads import TransectForMaskedLM as TransectForMaskedLM
from transect.models.heads import TransectForMultipleChoice as TransectForMultipleChoice
from transect.models.heads import TransectForSequenceClassification as TransectForSequenceClassification
from transect.models.transformer import TransectConfig as TransectConfig
from transect.models.transformer import TransectModel as TransectModel

AutoConfig.register(TransectConfig.model_type, TransectConfig)
AutoModel.register(TransectConfig, TransectModel)
AutoModelForCausalLM.register(TransectConfig, TransectForCausalLM)
AutoModelForMaskedLM.register(TransectConfig, TransectForMaskedLM)
AutoModelForSequenceClassification.register(TransectConfig, TransectForSequenceClassification)
AutoModelForMultipleChoice.register(TransectConfig, TransectForMultipleChoice)
