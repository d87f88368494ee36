"""FFNs of experts that a learned router chooses, as Mixtral, OLMoE and Qwen-MoE have them."""

from typing import Any

from transect.models.config import LayerConfig, ModelConfig
from transect.models.convert._activations import ours
from transect.models.convert._attributes import Attributes
from transect.models.convert._resolved import router
from transect.models.convert.base import Part, module
from transect.models.ffn.sparse import Sparse
from transect.models.plug import Unfit

TRUNK = (
    *module("layers.{}.ffn.selector.router", "layers.{}.mlp.gate"),
    Part(("layers.{}.ffn.memory.keys", "layers.{}.ffn.memory.up"), "layers.{}.mlp.experts.gate_up_proj", dim=1),
    Part(("layers.{}.ffn.memory.values",), "layers.{}.mlp.experts.down_proj", transposed=True),
)


def settings(
    read: Attributes, count: str, normalised: bool, size: str = "intermediate_size", dense: int = 0
) -> dict[str, Any]:
    """A sparse FFN of gated experts; `count` and `size` are the attributes for their number and their width.

    normalised: a token's weights sum to 1. dense: how many layers have no experts.

    Their balance loss, k at perfect balance whatever the depth, is in `loss` only with `output_router_logits`. Ours is
    the sum over sparse layers, each 1 at perfect balance; the weights agree there, and only there.
    """
    active, coefficient = read("num_experts_per_tok"), read("router_aux_loss_coef")
    sparse = read("num_hidden_layers") - dense
    balance = coefficient * active / sparse if read("output_router_logits") and sparse else 0.0
    return {
        "kind": "sparse",
        "blocks": read(count),
        "block_size": read(size),
        "active_blocks": active,
        "activation": ours(read, "hidden_act"),
        "gated": True,
        "bias": False,
        "selector": {"kind": "top_k", "normalise": normalised, "balance": balance},
    }


def native(settings: ModelConfig, count: str, size: str = "intermediate_size") -> dict[str, Any]:
    """The other way; raises Unfit where no layer is sparse."""
    ffn = _first(settings)
    active = ffn.active(settings)
    balance = ffn.selector.plain().get("balance", 0.0)
    sparse = sum(is_sparse(settings.layer_configs[index]) for index in settings.modules)
    weight = {"router_aux_loss_coef": balance * sparse / active} if balance else {}
    return {
        count: ffn.count(settings),
        size: ffn.cells_per_block(settings),
        "num_experts_per_tok": active,
        "output_router_logits": bool(balance),
        **weight,
    }


def normalised(settings: ModelConfig) -> bool:
    """Whether the weights of a token's experts sum to 1; raises Unfit where no layer is sparse."""
    return router(_first(settings).selector.plain()).get("normalise", False)


def is_sparse(layer: LayerConfig) -> bool:
    """Whether a layer's FFN has experts."""
    return isinstance(layer.ffn, Sparse.Config)


def _first(settings: ModelConfig) -> Any:
    found = [layer.ffn for layer in settings.layer_configs if is_sparse(layer)]
    if not found:
        raise Unfit("ffn.kind", settings.layer_configs[0].ffn.kind, "sparse")
    return found[0]
