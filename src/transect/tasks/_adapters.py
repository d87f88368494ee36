"""Adapters: small bottlenecks behind every sub-layer, trained in place of the model's own weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from transect.errors import InputError
from transect.view.layout import Tap
from transect.view.view import View
from transect.view.walk import Walk

STD = 0.01


class Adapters(nn.Module):
    """y + up(gelu(down(y))) in the place of what each attention and FFN sub-layer adds to the stream.

    down [width, bottleneck] is a truncated normal with std 0.01, up and both biases are 0, so that the model is as it
    was before training. An adapter belongs to a layer as loaded, and moves with it.
    Source: Houlsby et al., arXiv 1902.00751, section 2.1; difference: in a model whose sub-layers' outputs are normed
    themselves the adapter follows that norm. Raises InputError for a bottleneck below 1.
    """

    def __init__(self, view: View, bottleneck: int, seed: int) -> None:
        super().__init__()
        if bottleneck < 1:
            raise InputError(f"adapters is {bottleneck}; give the width of the bottleneck, at least 1, or none")
        generator = torch.Generator().manual_seed(seed)
        self._taps: list[tuple[int, Tap]] = []
        made = []
        for layer, known in {layer: known for layer, known in zip(view.executed, view.maps, strict=True)}.items():
            for name in known.sublayers:
                self._taps.append((layer, known.taps[f"{name}_out"]))
                made.append(_adapter(view, bottleneck, generator))
        self.adapters = nn.ModuleList(made)

    @contextmanager
    def within(self, view: View) -> Iterator[None]:
        """Let the view's model run with its adapters."""
        with Walk(view) as walk:
            for (layer, tap), adapter in zip(self._taps, self.adapters, strict=True):
                walk.tap(layer, tap, _behind(adapter, tap.scale))
            yield


def _adapter(view: View, bottleneck: int, generator: torch.Generator) -> nn.Module:
    down, up = linear(view, view.width, bottleneck), linear(view, bottleneck, view.width)
    with torch.no_grad():
        drawn = torch.empty(down.weight.shape)
        down.weight.copy_(nn.init.trunc_normal_(drawn, std=STD, a=-2 * STD, b=2 * STD, generator=generator))
    return nn.Sequential(down, nn.GELU(), up)


def linear(view: View, inputs: int, outputs: int) -> nn.Linear:
    """A linear map of zeros in the view's dtype and on its device; torch's random state stays as it is."""
    made = nn.Linear(inputs, outputs, device="meta", dtype=view.dtype).to_empty(device=view.device)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def _behind(adapter: nn.Module, scale: float) -> Callable[[int, Tensor], Tensor]:
    return lambda _, tensor: tensor + adapter(tensor * scale) / scale
