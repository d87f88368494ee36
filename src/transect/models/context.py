"""What all layers of one forward pass share: which positions see which, rotary angles, the cache, the token ids."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from transect.models.masks import Visible
from transect.models.positions import rotary_angles

if TYPE_CHECKING:
    from transformers import Cache

    from transect.models.config import RotaryConfig


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """One forward pass, as its layers see it.

    token_ids [batch, positions], None where embeddings were given. real [batch, positions] is False at padding; None:
    no padding. positions [batch or 1, positions] are those of the rotary angles. visible says what a query sees of the
    keys, cached ones included. cache is None outside generation. `rotary` is whether angles are used at all.
    """

    token_ids: Tensor | None
    real: Tensor | None
    positions: Tensor
    visible: Visible
    rotary: bool
    cache: "Cache | None" = None
    _angles: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def copied(self) -> "Context":
        """The same pass with what has been made for all layers so far, to which nothing is added by others."""
        return replace(self, visible=self.visible.copied(), _angles=dict(self._angles))

    def remembered(self, k: Tensor, v: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far; these go into the cache, if there is one, at a layer's place."""
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k, v, place)
        filled = self.visible.offset + self.visible.queries
        return k[:, :, :filled], v[:, :, :filled]  # a static cache gives the empty room too

    def angles(self, config: "RotaryConfig", head_width: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine [batch or 1, 1, positions, n] in the dtype of `like`; None where nothing is rotated."""
        if not self.rotary or config.fraction == 0:
            return None
        key = (config.theta, config.fraction, str(config.scaling), head_width, like.dtype)
        if key not in self._angles:
            self._angles[key] = rotary_angles(config, head_width, self.positions, like)
        return self._angles[key]
