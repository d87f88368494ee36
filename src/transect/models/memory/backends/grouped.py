"""Only the rows that chose a block meet it: in tiles on a CPU, with `grouped_mm` elsewhere."""

from torch import Tensor

from transect.models.memory.backends import grouped_mm, tiles
from transect.models.memory.backends.tables import Tables


def mix(x: Tensor, blocks: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """The reference's numbers; blocks that nothing chose are never read. See `tiles.mix` and `grouped_mm.mix`."""
    way = tiles.mix if x.device.type == "cpu" else grouped_mm.mix
    return way(x, blocks, weights, tables)
