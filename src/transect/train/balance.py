"""How often memory blocks were chosen in a step, over micro-batches and processes, and what follows from it."""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transect.models.build import LanguageModel
from transect.models.ffn.sparse import Sparse
from transect.models.selectors._balance import load_statistics
from transect.models.selectors.bias_balanced import BiasBalanced

if TYPE_CHECKING:
    from transect.train.distributed.world import World


class Loads:
    """Counts of chosen blocks [blocks], before drops, for each sparse FFN of each layer that runs.

    A sparse FFN is named by its place and, unless it is the layer's `ffn`, its attribute, as in the model's statistics:
    `layers.3.`, `layers.3.ffn2.`, `layers.3.inner.`.
    """

    def __init__(self, model: LanguageModel) -> None:
        trunk = model.trunk
        self.found: dict[str, Sparse] = {}
        for place, module in enumerate(trunk.settings.modules):
            for path, part in trunk.layers[module].named_modules():
                if isinstance(part, Sparse):
                    leaf = path.rpartition(".")[2]
                    self.found[f"layers.{place}." + ("" if leaf == "ffn" else f"{leaf}.")] = part
        self.counts: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor]) -> None:
        """Add one micro-batch."""
        for name in self.found:
            if f"{name}load" not in stats:
                continue
            pairs = stats[f"{name}pairs"].double()
            chosen = (stats[f"{name}load"].double() * pairs).round()
            read = pairs * (1 - stats[f"{name}drop_fraction"].double())
            self.counts[name] = self.counts[name] + chosen if name in self.counts else chosen
            self.read[name] = self.read[name] + read if name in self.read else read

    def sum(self, world: "World") -> None:
        """Add up all processes."""
        if not self.counts or world.data_size == 1:
            return
        names = sorted(self.counts)
        flat = world.sum(torch.cat([torch.cat([self.counts[name], self.read[name][None]]) for name in names]))
        for name in names:
            size = len(self.counts[name])
            self.counts[name], self.read[name], flat = flat[:size], flat[size], flat[size + 1 :]

    def rebalance(self) -> None:
        """Move the biases of selectors that are balanced by them, once for a step and for each set of weights."""
        of_module: dict[BiasBalanced, list[Tensor]] = defaultdict(list)
        for name, counts in self.counts.items():
            if isinstance(selector := self.found[name].selector, BiasBalanced):
                of_module[selector].append(counts)
        for selector, counts in of_module.items():
            selector.rebalance(torch.stack(counts).sum(0))

    def statistics(self) -> dict[str, dict[str, float]]:
        """By name: entropy and dead fraction of the step's choices, the largest load, the fraction dropped."""
        said = {}
        for name, counts in self.counts.items():
            told = load_statistics(counts.round().long())
            pairs = float(told["pairs"])
            if not pairs:  # nothing was chosen, so nothing can be said
                continue
            numbers = {
                "dead_fraction": 1 - float(told["used_share"]),
                "largest_load": float(told["largest_load"]),
                "drop_fraction": 1 - float(self.read[name]) / pairs,
            }
            if "entropy" in told:
                numbers["entropy"] = float(told["entropy"])
            said[name] = numbers
        return said
