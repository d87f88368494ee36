"""A Hugging Face configuration, read attribute by attribute: one that nobody reads is refused by its name."""

from typing import Any

from transformers import PreTrainedConfig

from transect.errors import InputError

CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "use_cache")
"""Attributes that both kinds of configuration have, handed over as they are."""

_IGNORED = {
    *CARRIED,
    *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version"),  # where it is from
    *("dtype", "torch_dtype"),  # the weights say
    *("output_attentions", "output_hidden_states", "return_dict", "torchscript"),  # what else is returned
    *("chunk_size_feed_forward", "gradient_checkpointing"),  # how it is computed, not what
    *("finetuning_task", "prefix", "task_specific_params", "tokenizer_class"),  # notes for others
    *("cls_token_id", "sep_token_id", "decoder_start_token_id"),  # the tokenizer's and the generation's
    "initializer_range",  # read where there are new weights to draw
}


class Attributes:
    """The attributes of a configuration; `finish` refuses what was neither read nor is known to change nothing.

    A new option of transformers, or one from a file, then fails by name in place of being left out in silence.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.kind = config.model_type
        self._config, self._given = config, config.to_dict()
        self._read: set[str] = set()

    def __call__(self, name: str) -> Any:
        """An attribute's value; None where the configuration has none."""
        self.ignore(name, self._config.attribute_map.get(name, name))
        return getattr(self._config, name, None)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Raise InputError unless the attribute is missing, None or one of `allowed`."""
        value = self(name)
        if value is not None and value not in allowed:
            raise self.misfit(name, value, why)

    def ignore(self, *names: str) -> None:
        """Attributes of this family that change nothing."""
        self._read.update(names)

    def misfit(self, name: str, value: Any, why: str) -> InputError:
        """The error for a value that a transect model cannot have."""
        return InputError(f"{self.kind} with {name} {value!r} cannot become a transect model: {why}")

    def finish(self) -> None:
        """Raise InputError for an attribute that nobody has read."""
        self.only("is_encoder_decoder", False, why="it is an encoder and a decoder; one stack of layers is allowed")
        self.only("add_cross_attention", False, why="it reads a second text; only self-attention is allowed")
        self.only("pruned_heads", {}, why="heads were cut out; import the model before pruning")
        for name, value in self._given.items():
            if name not in self._read and name not in _IGNORED and value is not None:
                raise self.misfit(name, value, "nothing is known of this attribute; remove it if it changes nothing")
