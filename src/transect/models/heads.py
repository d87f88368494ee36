"""The four heads: next token, masked token, a class for a sequence, the best of several choices."""

from dataclasses import dataclass, replace
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
from transect.models.loss import IGNORED, LossRule, VocabularyLoss, mapped_loss, vocabulary_loss
from transect.models.norms import norm
from transect.models.transformer import Numbers, TransectConfig, TransectModel, TransectPreTrainedModel, TrunkOutput


@dataclass
class HeadOutput(ModelOutput):
    """The loss, where labels were given; logits; and what the trunk returns.

    loss: in training losses["main"] plus every other one, else the main one alone, so that evaluation compares models
    by what they predict. Losses are float32 or better. With a `LossRule` logits are None and losses are parts; outside
    training there are also token_losses [batch, positions], 0 where nothing is predicted.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Numbers | None = None
    stats: Numbers | None = None
    next_sentence_logits: Tensor | None = None
    token_losses: Tensor | None = None


def output_of(
    trunk: TrunkOutput, logits: Tensor | None, main: Tensor | None, training: bool, own: Numbers | None = None
) -> HeadOutput:
    """The head's output, with the losses summed where there is a main one.

    own: further losses of the head; one of the trunk's that has the name of one of these is then called `trunk.NAME`.
    """
    own = own or {}
    losses = {f"trunk.{name}" if name in own else name: loss for name, loss in (trunk.losses or {}).items()}
    loss = main
    if main is not None:
        losses = {"main": main, **own, **losses}
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


def sequence_loss(logits: Tensor, labels: Tensor, mask: Tensor | None, rule: LossRule | None) -> Tensor:
    """Mean cross-entropy of logits [batch, classes] or, by a rule, this pass's part of the mean over the step.

    A part weighs each sequence by its tokens that are not padding, as `share` counts them: so parts add up however the
    step is cut. Both ways are the same where sequences are equally long.
    """
    if rule is None:
        return cross_entropy(logits, labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sizes = wide.new_ones(len(labels)) if mask is None else mask.sum(1).to(wide.dtype)
    return (F.cross_entropy(wide, labels, reduction="none") * sizes).sum() / sizes.sum() * rule.share


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

    def forward(self, x: Tensor, labels: Tensor | None = None, rule: LossRule | None = None) -> Tensor | VocabularyLoss:
        """Logits or, with labels [n] for x [n, width] and a rule, the losses, without all logits at once."""
        if self.dense is not None and self.act is not None and self.norm is not None:
            x = self.norm(self.act(self.dense(x)))
        if labels is None or rule is None:
            return self.decoder(x)
        rule = rule if self.training else replace(rule, z_loss=0.0)
        return mapped_loss(x, self.decoder.weight, self.decoder.bias, labels, rule)


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
        self.pooler = self.next_sentence = None
        if settings.head.next_sentence:
            self.pooler = Pooler(settings)
            self.next_sentence = nn.Linear(settings.width, 2)
        self.post_init()

    def _predicted(
        self, trunk: TrunkOutput, hidden: Tensor, labels: Tensor | None, rule: LossRule | None
    ) -> HeadOutput:
        """The output: logits and their loss or, by a rule, parts of the losses."""
        if rule is None:
            logits = self.head(hidden)
            main = None if labels is None else cross_entropy(logits, labels)
            return output_of(trunk, logits, main, self.training)
        if labels is None:
            raise InputError("a loss rule goes with labels; give labels, or no rule for logits")
        found = vocabulary_loss(hidden, self.head, labels, rule)
        own = {"z_loss": found.z_loss} if rule.z_loss and self.training else {}
        output = output_of(trunk, None, found.main, self.training, own)
        if not self.training:
            output["token_losses"] = torch.zeros_like(labels, dtype=found.each.dtype).masked_scatter_(
                labels != IGNORED, found.each
            )
        return output

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
        rule: LossRule | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """labels [batch, positions] are the ids themselves, moved by one here; -100 is not counted.

        main loss: mean cross-entropy in nats over the counted positions; with document_ids no document predicts the
        next one. logits_to_keep: the last so many positions, without labels. step: the training step, which penalties
        with a schedule need. rule: losses are parts of that step's, and there are no logits.
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
            rule=rule,
        )
        hidden = trunk.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        output = self._predicted(trunk, hidden, labels, rule)
        return output if return_dict is not False else output.to_tuple()


class TransectForMaskedLM(_ForTokens):
    """Predicts masked tokens from both sides; with `head.next_sentence` also whether two texts follow each other."""

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
        next_sentence_label: Tensor | None = None,
        output_hidden_states: bool | None = None,
        step: int | None = None,
        rule: LossRule | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple:
        """labels [batch, positions] are the original ids at masked positions, -100 elsewhere; step and rule as above.

        next_sentence_label [batch]: 0 where the second text follows the first, 1 where it does not.
        """
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
            rule=rule,
        )
        answers = self._answers(trunk, next_sentence_label, attention_mask, rule)
        output = self._predicted(trunk, trunk.last_hidden_state, labels, rule)
        if answers is not None:
            output["next_sentence_logits"] = answers
        return output if return_dict is not False else output.to_tuple()

    def _answers(
        self, trunk: TrunkOutput, labels: Tensor | None, mask: Tensor | None, rule: LossRule | None
    ) -> Tensor | None:
        """Logits [batch, 2] of whether the second text follows the first; their loss joins the trunk's."""
        if self.pooler is None or self.next_sentence is None:
            if labels is not None:
                raise InputError("next_sentence_label was given; a model needs head.next_sentence true to read it")
            return None
        assert trunk.last_hidden_state is not None and trunk.losses is not None
        logits = self.next_sentence(self.pooler(trunk.last_hidden_state, mask))
        if labels is not None:
            trunk.losses["next_sentence"] = sequence_loss(logits, labels, mask, rule)
        return logits


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
