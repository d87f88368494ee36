"""The router of today's mixtures of experts: top k of softmax or sigmoid affinities."""

from typing import TYPE_CHECKING

from torch import Tensor

from transect.models.selectors._routed import Routed, RoutedConfig
from transect.models.selectors._scored import Weight
from transect.models.selectors.base import Selection

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


class TopK(Routed):
    """Affinities softmax(W_r x) or sigmoid(W_r x); the b largest win and are the weights, normalised over the kept.

    With softmax and normalise this is Mixtral, without normalise OLMoE, with sigmoid Llama 4 and (with a bias, see
    `bias_balanced`) DeepSeek-V3. Normalised weights of a single block are always 1: no gradient reaches the router.
    Source: Mixtral, arXiv 2401.04088; groups DeepSeek-V3, arXiv 2412.19437. Cost: 2 d B FLOPs per token.
    """

    class Config(RoutedConfig):
        """`scores`, `normalise`, `scale`, `groups`, `active_groups`; balance loss 0.01, as in OLMoE."""

        kind: str = "top_k"
        balance: Weight = 0.01

    config: Config

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        return self.route(x, real, None)
