"""`torch.compile` of a model's layers, where the machine can."""

import torch

from transect.models.selectors.base import chooses
from transect.models.transformer import TransectPreTrainedModel


def compile_layers(model: TransectPreTrainedModel, backend: str = "inductor") -> str | None:
    """Compile each layer in place; None, or one line that says what stays uncompiled and why.

    Parameters keep their names. Layers of one kind share what is compiled, and a step of the same shapes compiles
    nothing again. Dense FFNs and the `reference` and `masked` memory back ends are compiled whole; `grouped` on a CPU
    and `gather` run eagerly between compiled parts, and so does the choice of a back end by `auto`. Give `recompute`
    before: with `cheap` the compiler itself keeps products and computes the rest again; with `layer` a layer that has a
    selector is not compiled, for inside compiled code what was chosen could not be kept. backend: of `torch.compile`.
    """
    trunk = model.trunk
    reason = _unable(trunk.device, backend)
    if reason is not None:
        return f"layers are not compiled: {reason}"
    kept = [layer for layer in trunk.layers if trunk.recompute_mode == "layer" and chooses(layer)]
    for layer in trunk.layers:
        if layer not in kept:
            layer.compile(backend=backend)
    trunk.compiled = True
    if not kept:
        return None
    return f"{len(kept)} of {len(trunk.layers)} layers are not compiled: recompute layer would choose blocks again"


def _unable(device: torch.device, backend: str) -> str | None:
    """Why a small function cannot be compiled here; None where it can."""
    try:
        torch.compile(_trial, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # compilers fail in ways of their own
        said = str(error).strip() or type(error).__name__
        return said.splitlines()[0]
    return None


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
