"""The four heads: next token, masked token, a class for a sequence, the best of several choices."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.generation.utils import GenerationMixin
from transformers.utils.generic import ModelOutput

from transect.errors import InputError
from transect.models.activations import Activation
from transect.models.config import ModelConfig
from transect.models.norms import norm
from transect.models.transformer import Numbers, TransectConfig, TransectModel, TransectPreTrainedModel, TrunkOutput

IGNORED = -100


@dataclass
class HeadOutput(ModelOutput):
    """The loss, where labels were given; logits; and what the trunk returns.

    loss: in training losses["main"] plus every other one, else the main one alone, so that evaluation compares models
    by what they predict. Losses are float32 or better.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Numbers | None = None
    stats: Numbers | None = None


def output_of(trunk: TrunkOutput, logits: Tensor, main: Tensor | None, training: bool) -> HeadOutput:
    """The head's output, with the losses summed where there is a main one."""
    losses = dict(trunk.losses or {})
    loss = main
    if main is not None:
        losses = {"main": main, **losses}
        if training:
            loss = torch.stack([one.to(main.dtype) for one in losses.values()]).sum()
    return HeadOutput(
        loss=loss,
        logits=logits,
        past_key_values=trunk.past_key_values,
        hidden_states=trunk.hidden_states,
        losses=losses,
        stats=trunk.stats,
    )


def next_labels(labels: Tensor, documents: Tensor | None) -> Tensor:
    """The label of the next position, [batch, positions]; the last position and the end of a document have none.

    Labels are moved, not logits: a slice of those would be a copy of the largest tensor there is.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if documents is None:
        return following
    ends = F.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    return following.masked_fill(ends, IGNORED)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count, in nats, float32 or better; not-a-number where none counts."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, -2).to(wide), labels.flatten(), ignore_index=IGNORED)


class VocabularyHead(nn.Module):
    """logits = decoder(N(act(dense(x)))), or only decoder(x) where the settings have no transform."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.dense = self.act = self.norm = None
        if model.head.transform != "none":
            self.dense = nn.Linear(model.width, model.width)
            self.act = Activation(model.head.transform)
            self.norm = norm(model.norm, model.width)
        self.decoder = nn.Linear(model.width, model.vocab_size, bias=model.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.dense is not None and self.act is not None and self.norm is not None:
            x = self.norm(self.act(self.dense(x)))
        return self.decoder(x)


class _ForTokens(TransectPreTrainedModel):
    """A trunk and a map to the vocabulary."""

    objective: ClassVar[str]

    def __init__(self, config: TransectConfig) -> None:
        super().__init__(config)
        settings = config.settings
        if settings.objective != self.objective:
            raise InputError(f"objective is {settings.objective!r}: a {type(self).__name__} needs {self.objective!r}")
        self.model = TransectModel(config)
        self.head = VocabularyHead(settings)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head.decoder = new_embeddings


class TransectForCausalLM(_ForTokens, GenerationMixin):
    """Predicts the next token; `generate` works for every block, with and without the cache."""

    objective = "causal"

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **unused: Any) -> Tensor | None:
        """The mask as it is, one number for each position: a static cache needs no other."""
        return attention_mask

    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.decoder.weight": "model.embeddings.tokens.weight"}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        step: int | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """labels [batch, positions] are the ids themselves, moved by one here; -100 is not counted.

        main loss: mean cross-entropy in nats over the counted positions; with document_ids no document predicts the
        next one. logits_to_keep: the last so many positions, without labels. step: the training step, which penalties
        with a schedule need.
        """
        if labels is not None:
            if isinstance(logits_to_keep, Tensor) or logits_to_keep:
                raise InputError("logits_to_keep goes without labels: the loss needs the logits of every position")
            labels = next_labels(labels, document_ids)
        trunk = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            loss_mask=None if labels is None else labels != IGNORED,
            step=step,
        )
        hidden = trunk.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.head(hidden)
        main = None if labels is None else cross_entropy(logits, labels)
        output = output_of(trunk, logits, main, self.training)
        return output if return_dict is not False else output.to_tuple()


class TransectForMaskedLM(_ForTokens):
    """Predicts masked tokens from both sides."""

    objective = "masked"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.decoder.weight": "model.embeddings.tokens.weight"}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        step: int | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """labels [batch, positions] are the original ids at masked positions, -100 elsewhere; step as above."""
        trunk = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            output_hidden_states=output_hidden_states,
            loss_mask=None if labels is None else labels != IGNORED,
            step=step,
        )
        logits = self.head(trunk.last_hidden_state)
        main = None if labels is None else cross_entropy(logits, labels)
        output = output_of(trunk, logits, main, self.training)
        return output if return_dict is not False else output.to_tuple()


class Pooler(nn.Module):
    """One state for a sequence: tanh(dense(first)) of a masked model, the last real token's state of a causal one."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.dense = None if model.causal else nn.Linear(model.width, model.width)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if self.dense is not None:
            return torch.tanh(self.dense(hidden[:, 0]))
        if mask is None:
            return hidden[:, -1]
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(mask.bool(), places, -1).amax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


class TransectForSequenceClassification(TransectPreTrainedModel):
    """A class, or with one label a number, for a sequence."""

    def __init__(self, config: TransectConfig) -> None:
        super().__init__(config)
        settings = config.settings
        self.model = TransectModel(config)
        self.pooler = Pooler(settings)
        self.dropout = nn.Dropout(settings.classifier_dropout)
        self.classifier = nn.Linear(settings.width, config.num_labels or 2, bias=not settings.causal)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """labels [batch]: classes, or numbers where there is one label (mean squared error).

        A causal model reads the last real token: by the mask or, without one, the last that is not `pad_token_id`.
        """
        trunk = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            attention_mask = input_ids != pad
        logits = self.classifier(self.dropout(self.pooler(trunk.last_hidden_state, attention_mask)))
        main = None
        if labels is not None and self.config.num_labels == 1:
            wide = torch.promote_types(logits.dtype, torch.float32)
            main = F.mse_loss(logits[:, 0].to(wide), labels.to(wide))
        elif labels is not None:
            main = cross_entropy(logits, labels)
        output = output_of(trunk, logits, main, self.training)
        return output if return_dict is not False else output.to_tuple()


class TransectForMultipleChoice(TransectPreTrainedModel):
    """The best of several continuations of one text: each is read as a sequence of its own and given a score."""

    def __init__(self, config: TransectConfig) -> None:
        super().__init__(config)
        settings = config.settings
        self.model = TransectModel(config)
        self.pooler = Pooler(settings)
        self.dropout = nn.Dropout(settings.classifier_dropout)
        self.classifier = nn.Linear(settings.width, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """input_ids [batch, choices, positions]; logits [batch, choices]; labels [batch]."""
        batch, choices = input_ids.shape[:2]
        mask, types = (None if x is None else x.flatten(0, 1) for x in (attention_mask, token_type_ids))
        trunk = self.model(input_ids=input_ids.flatten(0, 1), attention_mask=mask, token_type_ids=types)
        scores = self.classifier(self.dropout(self.pooler(trunk.last_hidden_state, mask)))
        logits = scores.reshape(batch, choices)
        main = None if labels is None else cross_entropy(logits, labels)
        output = output_of(trunk, logits, main, self.training)
        return output if return_dict is not False else output.to_tuple()
