"""A recipe: the settings of a run, read from a file, from what it extends, and from `--set`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from transect.config import Config, with_settings
from transect.data.config import DataConfig
from transect.errors import InputError
from transect.models.config import ModelConfig, merged
from transect.recipes.reading import chain
from transect.train.config import TrainConfig
from transect.train.distributed.config import ParallelConfig

Text = Annotated[str, Field(min_length=1)]


class Recipe(Config):
    """Everything that a run is made of.

    name; description: one sentence; source: the paper and section it follows, and what of it is ASSUMED; model: the
    Transformer; data: what it reads; train: how; parallel: on how many processes.
    """

    name: Text
    description: Text
    source: Text
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()


def load(source: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a name or a YAML file, with `model.width=256`-like settings applied last.

    A file says `extends: NAME` or a path beside it, and gives only what differs: settings are merged level by level,
    a plug-in of another kind replaces the old one, a list is replaced whole.
    Raises InputError with the path of the field, the value and what is allowed.
    """
    whole: dict = {}
    for document in chain(source):
        own = {key: value for key, value in document.items() if key != "extends"}
        whole = merged(whole, own)
    whole = with_settings(whole, settings)
    try:
        return Recipe.parse(whole)
    except InputError as error:
        raise InputError(f"recipe {source}: {error}") from error
