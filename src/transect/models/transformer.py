"""The reference Transformer: embeddings, a stack of layers that may all differ, a final norm; a Hugging Face model."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.generic import ModelOutput

from transect.errors import InputError
from transect.models.blocks.base import BlockOutput, build
from transect.models.config import ModelConfig
from transect.models.context import Context
from transect.models.embeddings import Embeddings
from transect.models.init import draw, rule_for
from transect.models.loss import LossRule
from transect.models.masks import Visible
from transect.models.norms import FINAL, norm
from transect.models.penalties._pass import PenaltyPass, build_penalty
from transect.models.penalties.base import LayerSums
from transect.models.recompute import Mode, checked, recomputed
from transect.models.saved import is_checkpoint, read_weights
from transect.models.selectors.base import Selector, chooses
from transect.models.stub import write_stub

Numbers = dict[str, Tensor]


@lru_cache(maxsize=64)
def _parsed(architecture: str) -> ModelConfig:
    """Settings, which never change, of their JSON: transformers asks for the names below again and again."""
    return ModelConfig.parse(json.loads(architecture))


class TransectConfig(PreTrainedConfig):
    """A `ModelConfig` as Hugging Face keeps it: `architecture` holds the settings, `settings` reads them.

    The usual names (`hidden_size`, `num_hidden_layers`, ...) are there for tools that look for them.
    """

    model_type = "transect"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "losses", "stats"]

    architecture: dict | None = None
    use_cache: bool = True
    is_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.architecture is not None:
            settings = ModelConfig.parse(self.architecture)
            self.architecture = settings.plain()
            self.tie_word_embeddings = settings.head.tied
            self.is_decoder = settings.causal
            if self.pad_token_id is None:
                self.pad_token_id = settings.pad_token_id
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: our code is a package, of which no file needs to be copied beside the weights."""

    @property
    def settings(self) -> ModelConfig:
        """The settings that describe the model; raises InputError where there are none."""
        if self.architecture is None:
            raise InputError("this configuration has no architecture; make it with TransectConfig(architecture={...})")
        return _parsed(json.dumps(self.architecture))

    @property
    def vocab_size(self) -> int:
        return self.settings.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.architecture = self.settings.but(vocab_size=size).plain()

    @property
    def hidden_size(self) -> int:
        return self.settings.width

    @property
    def num_hidden_layers(self) -> int:
        return self.settings.layers

    @property
    def num_attention_heads(self) -> int:
        return self.settings.attention.heads

    @property
    def num_key_value_heads(self) -> int:
        return self.settings.attention.groups

    @property
    def max_position_embeddings(self) -> int:
        return self.settings.max_positions


@dataclass
class TrunkOutput(ModelOutput):
    """last_hidden_state, after the final norm; hidden_states are resid[0..L], the last one before that norm.

    losses: penalties and balance losses, weighted, to be added to the main loss; stats: numbers for the log.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Numbers | None = None
    stats: Numbers | None = None


class TransectPreTrainedModel(PreTrainedModel):
    """What all our models have in common: settings, initial values, what Hugging Face needs to know."""

    config_class = TransectConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    config: TransectConfig

    @classmethod
    def make(
        cls,
        settings: ModelConfig,
        num_labels: int = 2,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> Self:
        """A new model with these settings, drawn from torch's current random state."""
        given: dict[str, Any] = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "num_labels": num_labels}
        return cls(TransectConfig(architecture=settings.plain(), **given))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **options: Any):
        """As transformers loads; also a checkpoint of a training run, whose weights lie in parts.

        Raises InputError with the file's name for a damaged checkpoint.
        """
        folder = None if pretrained_model_name_or_path is None else Path(pretrained_model_name_or_path)
        if folder is None or not is_checkpoint(folder):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **options)
        weights = read_weights(folder)
        if not isinstance(config, PreTrainedConfig):
            config = TransectConfig.from_pretrained(config or folder)
        config.name_or_path = str(folder)
        made: Any = super().from_pretrained(None, *model_args, config=config, state_dict=weights, **options)
        model = made[0] if isinstance(made, tuple) else made  # with output_loading_info
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return made

    def recompute(self, mode: str) -> None:
        """What training computes again in the backward pass instead of keeping it: see `recompute.recomputed`.

        mode: `none`, `layer` or `cheap`; raises InputError for another, and for layers that are compiled already.
        """
        if self.trunk.compiled:
            raise InputError(f"recompute {mode!r} was given after layers were compiled; give it before")
        self.trunk.recompute_mode = checked(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **options: Any) -> None:
        """As transformers saves, with a module that only imports ours, so that the folder reloads in any process."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            write_stub(Path(save_directory), type(self).__name__)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing, as for the configuration."""

    @property
    def settings(self) -> ModelConfig:
        """The settings that describe the model."""
        return self.trunk.settings

    @property
    def trunk(self) -> "TransectModel":
        """The model without its head."""
        trunk = self.base_model
        assert isinstance(trunk, TransectModel)
        return trunk

    def _init_weights(self, module: nn.Module) -> None:
        settings = self.settings
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                draw(parameter, rule_for(f"{self._path(module)}.{name}", parameter, settings.init), settings.layers)
        loaded = any(getattr(buffer, "_is_hf_initialized", False) for buffer in module.buffers(recurse=False))
        if isinstance(module, Selector) and not loaded:
            module.reset_buffers()

    def _path(self, module: nn.Module) -> str:
        """A module's path below the trunk or, in a head, below the whole model; empty where it is in neither."""
        known = self.__dict__.setdefault("_known_paths", {})
        if id(module) not in known:
            known.clear()
            known.update((id(part), path) for path, part in self.named_modules())
        return known.get(id(module), "").removeprefix(f"{self.base_model_prefix}.")


class TransectModel(TransectPreTrainedModel):
    """Embeddings, layers, final norm.

    Layers may share weights: `settings.modules` says which of `layers` each place in the stack uses.
    """

    def __init__(self, config: TransectConfig) -> None:
        super().__init__(config)
        settings = self._settings = config.settings
        self.embeddings = Embeddings(settings)
        self.layers = nn.ModuleList(build(layer, settings, index) for index, layer in enumerate(settings.layer_configs))
        self.final_norm = norm(settings.norm, settings.width) if settings.norm.layout in FINAL else None
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers})
        self.penalties = [build_penalty(config, settings.layers) for config in settings.penalties]
        self.recompute_mode: Mode = "none"
        self.compiled = False
        self.post_init()

    @property
    def settings(self) -> ModelConfig:
        return self._settings

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass; transformers' switch for it, which means `layer`."""
        return self.recompute_mode != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.recompute_mode = "layer" if on else "none"

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Raises InputError for another number of tokens where a selector has a table of them."""
        if value.num_embeddings != self.settings.vocab_size:
            for path, module in self.named_modules():
                if isinstance(module, Selector) and module.needs_token_ids:
                    raise InputError(f"{path} is a table of {self.settings.vocab_size} tokens; it cannot be resized")
            self._settings = self.settings.but(vocab_size=value.num_embeddings)
        self.embeddings.tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        loss_mask: Tensor | None = None,
        step: int | None = None,
        rule: LossRule | None = None,
        return_dict: bool | None = None,
    ) -> TrunkOutput | tuple:
        """attention_mask [batch, keys] is 0 at padding, on either side, cached keys included.

        Positions count real tokens only, unless position_ids are given. document_ids [batch, positions] number the
        documents of packed sequences, which then do not see each other and have positions of their own. inputs_embeds
        stand in for rows of the token table. The cache is made when `use_cache` asks for it; by default only `generate`
        does. loss_mask [batch, positions] says which states the main loss is computed from: only where it is given, and
        in training, are penalties computed, with the strength of training step `step`. rule: losses are parts of that
        step's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds")
        if not self.settings.causal and (use_cache or past_key_values is not None):
            raise InputError("a masked model has no cache: every position sees later ones")
        embedded = self.embeddings.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if document_ids is not None and past_key_values is not None:
            raise InputError("document_ids are for packed training sequences; give no cache with them")
        context = self._context(input_ids, embedded, attention_mask, position_ids, past_key_values, document_ids)
        hidden = self.embeddings(embedded, context.positions, token_type_ids)
        watch = self._watch(loss_mask, step, context, lambda: (embedded, context.positions, token_type_ids))
        streams: list[Tensor] = [hidden]
        losses: Numbers = {}
        stats: Numbers = {}
        sums: list[tuple[LayerSums, ...]] = []
        for place in range(self.settings.layers):
            made, seen = self._layer(place, hidden, context, watch)
            hidden = made.hidden
            if output_hidden_states:
                streams.append(hidden)
            sums.append(seen)
            for name, loss in made.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
            stats.update({f"layers.{place}.{name}": number for name, number in made.stats.items()})
        if rule is not None:
            losses = {name: loss * rule.share for name, loss in losses.items()}
        last = None
        if watch is not None:
            more, numbers = watch.totals(sums, rule)
            losses |= more
            stats |= numbers
            last = watch.final()
        if last is None:
            last = hidden if self.final_norm is None else self.final_norm(hidden)
        output = TrunkOutput(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if output_hidden_states else None,
            losses=losses,
            stats=stats,
        )
        return output if return_dict is not False else output.to_tuple()

    def _layer(
        self, place: int, hidden: Tensor, context: Context, watch: PenaltyPass | None
    ) -> tuple[BlockOutput, tuple[LayerSums, ...]]:
        layer = self.layers[self.settings.modules[place]]
        mode = self.recompute_mode if self.training else "none"
        if mode == "cheap" and self.compiled:
            mode = "none"  # the compiler itself keeps products and computes the rest again
        # Both runs must begin alike; what the first adds to the context, as rotary angles, the second makes itself.
        first, known = iter([context]), context if mode == "none" else context.copied()

        def run(entering: Tensor) -> tuple[BlockOutput, tuple[LayerSums, ...]]:
            made = layer(entering, next(first, None) or known.copied(), place)
            return made, () if watch is None else watch.layer(place, entering, made.hidden)

        return recomputed(run, hidden, mode, choosing=mode == "layer" and chooses(layer))

    def _watch(
        self, loss_mask: Tensor | None, step: int | None, context: Context, embedded: Callable[[], tuple]
    ) -> PenaltyPass | None:
        """The penalties of this pass; None where there are none, so that nothing is computed for them."""
        if loss_mask is None or not self.training:
            return None
        active = [penalty for penalty in self.penalties if penalty.active(step)]
        if not active:
            return None
        counted = [penalty.counted(loss_mask, context.real) for penalty in active]
        raw = None if self.embeddings.norm is None else lambda: self.embeddings.summed(*embedded())
        return PenaltyPass(active, counted, step, self.final_norm, raw)

    def _context(
        self,
        ids: Tensor | None,
        embedded: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        documents: Tensor | None,
    ) -> Context:
        count, device = embedded.shape[1], embedded.device
        offset = int(cache.get_seq_length()) if cache is not None else 0
        real = None if mask is None else mask.to(device).bool()
        if real is not None and (real.shape[1] != offset + count or real.ndim != 2):
            raise InputError(
                f"attention_mask is {tuple(real.shape)}; it must be (batch, {offset + count}), one number for each "
                "position, cached ones included"
            )
        if real is not None and bool(real.all()):
            real = None
        settings, used = self.settings, offset + count
        if position_ids is not None:
            positions = position_ids.to(device)
        elif documents is not None:
            positions = _since_start(documents.to(device))
        elif real is not None:
            positions = (real.long().cumsum(1) - 1).clamp_min(0)[:, offset:]
        else:
            positions = torch.arange(offset, used, device=device)[None]
        if settings.positions == "learned":
            if position_ids is not None or documents is not None or real is not None:
                used = int(positions.max()) + 1 if count else 0
            if used > settings.max_positions:
                raise InputError(f"{used} positions do not fit: the model has {settings.max_positions} learned ones")
        return Context(
            token_ids=ids,
            real=None if real is None else real[:, offset:],
            positions=positions,
            visible=Visible(count, offset, settings.causal, device, real, documents),
            rotary=settings.positions == "rotary",
            cache=cache,
        )


def _since_start(documents: Tensor) -> Tensor:
    """The position of each token in its own document, [batch, positions]."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(starts, places, 0).cummax(1).values
