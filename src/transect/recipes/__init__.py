"""Shipped recipes, one YAML file each (or a grid of them), and how a recipe is read.

`names()` and `described()` read text only; `load` and `Recipe` bring torch.
"""

import importlib
from typing import TYPE_CHECKING

from transect.recipes.reading import shipped

if TYPE_CHECKING:
    from transect.recipes.recipe import Recipe as Recipe
    from transect.recipes.recipe import load as load

__all__ = ["Recipe", "described", "load", "names"]


def names() -> tuple[str, ...]:
    """The names of all shipped recipes."""
    return tuple(shipped())


def described() -> dict[str, str]:
    """Every shipped recipe's sentence, by name."""
    return {name: document["description"] for name, document in shipped().items()}


def __getattr__(name: str) -> object:
    if name not in ("Recipe", "load"):
        raise AttributeError(f"module 'transect.recipes' has no attribute {name!r}")
    return getattr(importlib.import_module("transect.recipes.recipe"), name)
