"""Taps for model types whose structure does not tell a site: one file a `model_type`, with one constant `TAPS`.

No supported type needs one today: the finder reads all of them. A file here, or the `adapter` argument of `View`,
replaces taps before the proof, so a wrong one is refused like any other.
"""

import importlib
import pkgutil
from collections.abc import Mapping

from transect.view.layout import Tap


def find(model_type: str) -> Mapping[str, Tap]:
    """The taps of a model type's adapter file; empty when it has none."""
    names = {module.name for module in pkgutil.iter_modules(__path__)}
    if model_type not in names:
        return {}
    return importlib.import_module(f"{__name__}.{model_type}").TAPS
