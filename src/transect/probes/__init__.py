"""Measurements: one file each, the file's name is the public name."""

import importlib

from transect import registry


def __getattr__(name: str) -> object:
    """`probes.Nonlinearity` is the class of `probes/nonlinearity.py`."""
    for module in registry.available(__name__):
        if module.replace("_", "") == name.lower():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"no probe {name!r}; probes are {', '.join(registry.available(__name__))}")
