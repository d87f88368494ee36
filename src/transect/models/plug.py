"""A setting that names a plug-in: `kind: name` with the plug-in's own options beside it, or only the name."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from transect import registry
from transect.config import Config, inner_misfit, misfit
from transect.errors import InputError

if TYPE_CHECKING:
    from transect.models.config import LayerConfig, ModelConfig


class Unfit(Exception):
    """A setting that does not go with the others: its path below the layer, the value, and what is allowed."""

    def __init__(self, where: str, given: Any, why: str) -> None:
        super().__init__(why)
        self.where, self.given, self.why = where, given, why


class PlugConfig(Config):
    """The options of one plug-in; `kind` is its name, or `package.module:Class` for one from outside."""

    kind: str
    checks_ffn: ClassVar[bool] = False
    """Of a block: whether `check` sees to the layer's `ffn` itself, as it builds something else from it."""

    def check(self, layer: "LayerConfig", model: "ModelConfig", where: str) -> None:
        """Raise Unfit where these settings do not go with those of the layer and the model; `where` is their path."""


def chooser(package: str, base: str, default: str | None = None) -> Callable[[Any], PlugConfig]:
    """Reads a plug-in's options with its own `Config`; `base` is the class in `package.base` that it derives from.

    Options without a kind are those of `default`. The plug-in's module is imported only when its name is read.
    """

    def read(given: Any) -> PlugConfig:
        if isinstance(given, PlugConfig):
            return given
        options = {"kind": given} if isinstance(given, str) else given
        if isinstance(options, dict) and default is not None:
            options = {"kind": default} | options
        if not isinstance(options, dict) or not isinstance(options.get("kind"), str):
            raise misfit("", given, f"give a name or settings with a kind; known are {_known(package)}")
        parent = getattr(importlib.import_module(f"{package}.base"), base)
        try:
            found = registry.load(package, options["kind"], parent)
        except InputError as error:
            raise misfit("", options["kind"], str(error)) from error
        try:
            return found.Config.model_validate(options)
        except ValidationError as error:
            raise inner_misfit(found.Config, error) from error

    return read


def plugin_of(config: PlugConfig, package: str, base: type[registry.Plugin]) -> type[registry.Plugin]:
    """The class that a plug-in's settings were read for."""
    return registry.load(package, config.kind, base)


def _known(package: str) -> str:
    return ", ".join(registry.available(package))
