"""A checkpoint of a training run as a model: the files that describe it, and its weights put together."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transect.errors import InputError
from transect.models import shards
from transect.models.damage import MANIFEST, Damaged, check, whole_before
from transect.models.stub import write_stub


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or was, a checkpoint of a training run."""
    return (folder / MANIFEST).is_file() or (folder / "state" / "model").is_dir()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole, on the CPU, however many processes wrote it.

    Raises InputError for a damaged one: it names the file and the checkpoint before that can be asked for. Cost: reads
    all but the optimizer's state, twice.
    """
    _check(folder, lambda name: not name.startswith("state/optimizer/"))
    model = folder / "state" / "model"
    weights = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shards.forms(model).items()}
    shards.read(model, weights)
    return weights


def check_description(folder: Path) -> None:
    """Raise InputError, as `read_weights` does, for a damaged file of those beside the tensors."""
    _check(folder, lambda name: "/" not in name)


def _check(folder: Path, wanted: Callable[[str], bool]) -> None:
    try:
        check(folder, wanted)
    except Damaged as error:
        before = whole_before(folder)
        advice = "no checkpoint before it is whole" if before is None else f"ask for {before.name} instead"
        raise InputError(f"{error}; {advice}") from error


def write_description(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write all that `save_pretrained` writes of one of our models but its weights, and the tokenizer, if any.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = type(model).__name__.removeprefix("FSDP")  # fully_shard makes a class of its own
    config = copy.deepcopy(model.config)
    config.architectures = [name]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    write_stub(folder, name)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # as tokenizers says that the disk did not take it
