"""Hugging Face both ways: native models into ours, ours into native ones, and folders that reload anywhere."""

import copy
import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from transect import models
from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.convert._attributes import CARRIED, Attributes
from transect.models.convert._resolved import differences, resolved
from transect.models.convert.base import Family, families, to_ours, to_theirs
from transect.models.plug import Unfit
from transect.models.transformer import TransectConfig, TransectPreTrainedModel
from transect.view.commit import check_target, whole_folder
from transect.view.load import DTYPES, load_model

_WITH_HEAD = ("TransectForCausalLM", "TransectForMaskedLM")


def import_model(
    source: PreTrainedModel | str | os.PathLike[str], dtype: str | torch.dtype | None = None
) -> TransectPreTrainedModel:
    """The same function as one of our models, with its own copy of the weights.

    source: a live model, or what `View.load` takes; dtype is by default the live model's own, float32 for others.
    Families: llama, mistral, qwen2, qwen3, qwen3_moe, gpt2, bert, mixtral, olmoe; with their heads for the next token,
    masked tokens, classes and choices. A bare BERT leaves its pooler behind. Raises InputError for another family or
    class, and with its name for an attribute or weight that our model cannot have: nothing is left out in silence.
    One of our models comes back as it is, or copied if its dtype changes. Cost: memory for both.
    """
    if isinstance(source, PreTrainedModel):
        given, wanted = source, _dtype(dtype) or source.dtype
    else:
        given = load_model(source, None, dtype, "auto", trust_remote_code=False).model
        wanted = given.dtype
    if isinstance(given, TransectPreTrainedModel):
        return given if given.dtype == wanted else copy.deepcopy(given).to(wanted)  # pyright: ignore[reportArgumentType]
    family = _family(given.config.model_type)
    ours = family.ours(type(given).__name__)
    if ours is None:
        known = ", ".join([*family.classes.values(), *([family.pretraining] if family.pretraining else [])])
        raise InputError(f"{type(given).__name__} has no class of ours; of {family.name} there are {known}")
    settings = _asking(_read(family, given.config), type(given).__name__ == family.pretraining)
    _check_problem(ours, given.config)
    parts = family.parts(settings.layers, _prefix_of_ours(ours), _prefix(given))
    dropped = family.dropped.get(ours, ())
    state = to_ours(parts, dict(given.state_dict()), dropped)
    carried = {name: getattr(given.config, name) for name in CARRIED}
    config = TransectConfig(architecture=settings.plain(), **carried)
    return _filled(getattr(models, ours), config, state, given).to(wanted)


def export_model(model: TransectPreTrainedModel, family: str | None = None) -> PreTrainedModel:
    """The same function as a model of transformers itself, with its own copy of the weights.

    family: a model type, by default the first of llama, bert, gpt2, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe
    that computes the same outside training. Dropout, initial values, penalties and losses of selectors are handed over
    only as far as the family has a place for them. Raises InputError with the setting and its value where no family
    fits, and with what the nearest one would have. Cost: memory for both.
    """
    if not isinstance(model, TransectPreTrainedModel):
        raise InputError(f"cannot export a {type(model).__name__}; give one of transect's own models")
    chosen, config = _fitting(model, families() if family is None else {family: _family(family)})
    settings = model.settings
    theirs = getattr(transformers, chosen.theirs(type(model).__name__, settings.head.next_sentence))
    bare = type(model).__name__ == "TransectModel"
    prefix = "" if bare else f"{theirs.base_model_prefix}."
    state = to_theirs(
        chosen.parts(settings.layers, _prefix_of_ours(type(model).__name__), prefix), dict(model.state_dict())
    )
    if model.dtype == torch.float64:
        config._experts_implementation = "eager"  # fused experts refuse it
    return _filled(theirs, config, state, model, **(chosen.bare if bare else {}))


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    native: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model and its tokenizer as a new folder, whole or not at all; returns the folder.

    Weights are safetensors, in parts of at most `max_shard_size`. With `native` the folder holds what `export_model`
    gives, and needs nothing of ours. Otherwise `import transect.models` is enough for the Auto classes to read it, and
    without that import `trust_remote_code=True`, wherever transect is installed. Raises InputError for a folder that is
    not empty or cannot be written to.
    """
    target = check_target(folder)
    written = export_model(model) if native and isinstance(model, TransectPreTrainedModel) else model
    with whole_folder(target) as partial:
        written.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return target


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def _family(name: str) -> Family:
    known = families()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        why = _REASONS.get(name) or (f"did you mean {close[0]!r}?" if close else "")
        raise InputError(f"model type {name!r} has no class of ours; known are {', '.join(known)}{why and '; ' + why}")
    return known[name]


_REASONS = {
    "switch_transformers": "it is an encoder and a decoder, ours is one stack; its FFN alone is selector switch",
    "deepseek_v3": "its attention keeps latent keys and values; its router alone is selector bias_balanced",
}


def _read(family: Family, config: Any) -> ModelConfig:
    """Our settings for a configuration of theirs."""
    read = Attributes(config)
    settings = family.settings(read)
    read.finish()
    return ModelConfig.parse(settings, root=family.name)


def _asking(settings: ModelConfig, next_sentence: bool) -> ModelConfig:
    """The same settings with the second question of BERT's pre-training, of which its configuration says nothing."""
    return settings.but(head=settings.head.plain() | {"next_sentence": next_sentence})


def _check_problem(ours: str, config: Any) -> None:
    """Our classifier has two losses: a number for one label, one class of several."""
    fitting = (None, "regression" if config.num_labels == 1 else "single_label_classification")
    if ours == "TransectForSequenceClassification" and config.problem_type not in fitting:
        why = f"with {config.num_labels} labels {fitting[1]} is allowed"
        raise Attributes(config).misfit("problem_type", config.problem_type, why)


def _fitting(model: TransectPreTrainedModel, among: dict[str, Family]) -> tuple[Family, Any]:
    """The first family that computes the same, and its configuration; raises InputError with the nearest's reason."""
    kind, settings = type(model).__name__, model.settings
    asked = resolved(settings, head=kind in _WITH_HEAD)
    carried = {name: getattr(model.config, name) for name in CARRIED}
    misfits: dict[str, list[tuple[str, Any, Any]]] = {}
    for family in among.values():
        if kind not in family.classes:
            continue
        try:
            config = AutoConfig.for_model(family.name, **family.native(settings), **carried)
            back = _read(family, config)
            if family.theirs(kind, settings.head.next_sentence) == family.pretraining:
                back = _asking(back, True)
        except Unfit as error:
            misfits[family.name] = [(error.where, error.given, error.why)] * _FAR
        except (ValueError, TypeError, StrictDataclassError) as error:  # their own check of their configuration
            refused = " ".join(str(error).split())
            misfits[family.name] = [("the architecture", "one that its class refuses", refused)] * _FAR
        else:
            found = differences(asked, resolved(back, head=kind in _WITH_HEAD))
            if not found:
                return family, config
            misfits[family.name] = found
    if not misfits:
        raise InputError(f"{kind} has no class in {', '.join(among)}; save with native=False")
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    where, value, has = misfits[nearest][0]
    raise InputError(
        f"{where} is {value!r}: no native class has that; the nearest, {nearest}, has {has!r}; save with native=False"
    )


_FAR = 1000


def _filled(
    kind: type[PreTrainedModel], config: Any, state: dict[str, torch.Tensor], like: PreTrainedModel, **arguments: Any
) -> Any:
    """A model of a class with these weights, and the place, mode, dtype and generation settings of another."""
    loader: Any = kind
    with _without_progress_bar():
        made, report = loader.from_pretrained(
            None, config=config, state_dict=state, dtype=like.dtype, output_loading_info=True, **arguments
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise InputError(f"weight {min(report[problem])} has no counterpart in a {type(like).__name__}")
    if like.can_generate() and made.can_generate():
        made.generation_config = copy.deepcopy(like.generation_config)
    return made.to(like.device).train(like.training)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Nothing is read from a disk."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _prefix(model: PreTrainedModel) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _prefix_of_ours(name: str) -> str:
    return "" if name == "TransectModel" else f"{TransectPreTrainedModel.base_model_prefix}."
