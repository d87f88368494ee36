"""Evaluations: one file each, the file's name is the public name."""

import importlib

from transect import registry


def __getattr__(name: str) -> object:
    """`tasks.Options` is the class of `tasks/options.py`."""
    for module in registry.available(__name__):
        if module.replace("_", "") == name.lower():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"no task {name!r}; tasks are {', '.join(registry.available(__name__))}")
