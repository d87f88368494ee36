"""Extra losses on hidden states: one file, one penalty."""

import importlib

from transect import registry


def __getattr__(name: str) -> object:
    """`penalties.Jump` is the class of `penalties/jump.py`."""
    files = {module.replace("_", ""): module for module in registry.available(__name__)}
    if name != name.lower() and name.lower() in files:
        return getattr(importlib.import_module(f"{__name__}.{files[name.lower()]}"), name)
    raise AttributeError(f"no penalty {name!r}; penalties are {', '.join(files.values())}")
