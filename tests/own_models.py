"""Tiny models of our own architectures by name: every block, selector, layout and kind of layer of recipes."""

from typing import Any

import torch

from families import SPECIAL_IDS, VOCAB, enliven
from transect.models.config import ModelConfig, merged
from transect.models.heads import TransectForCausalLM, TransectForMaskedLM
from transect.models.transformer import TransectPreTrainedModel

WIDTH = 29
HEADS = 3
HEAD_WIDTH = 10
FEED_FORWARD = 40
BLOCKS = 7
ACTIVE = 2
BLOCK_SIZE = 11
CELLS = 36  # memory blocks of one cell, a square for product keys
LAYERS = 3

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "width": WIDTH,
    "layers": LAYERS,
    "max_positions": 64,
    "attention": {"heads": HEADS, "head_width": HEAD_WIDTH},
    "ffn": {"kind": "dense", "width": FEED_FORWARD},
    "pad_token_id": SPECIAL_IDS["pad_token_id"],
}

_MASKED = {"objective": "masked", "positions": "learned"}
_POST = {"norm": {"layout": "post"}}
_BERT = _MASKED | _POST


def _sparse(selector: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    sizes = {"blocks": BLOCKS, "active_blocks": ACTIVE, "block_size": BLOCK_SIZE}
    return {"ffn": {"kind": "sparse", "selector": selector} | sizes | changes}


def _cells(selector: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    return _sparse(selector, **{"blocks": CELLS, "active_blocks": 5, "block_size": 1} | changes)


def _caa(ratio: float | None = None, **options: Any) -> dict[str, Any]:
    return {"block": {"kind": "caa", **options} | ({} if ratio is None else {"outer_ratio": ratio})}


_MOE = {"kind": "sparse", "blocks": BLOCKS, "active_blocks": 1, "block_size": BLOCK_SIZE, "selector": "switch"}

OWN: dict[str, dict[str, Any]] = {
    # the standard block in every layout
    "standard": {},
    "standard/post": _POST,
    "standard/sandwich": {"norm": {"layout": "sandwich", "type": "rms"}},
    "standard/branch": {"norm": {"layout": "branch"}},
    "standard/none": {"norm": {"layout": "none"}},
    "standard/masked": _BERT,
    "standard/gated": {"ffn": {"gated": True, "activation": "silu", "bias": False}, "head": {"tied": False}},
    "standard/square": {"ffn": {"width": WIDTH}, "residual": {"ffn": 0.0}},
    "standard/linear_ffn": {"ffn": {"activation": "identity"}},
    # positions and attention
    "positions/learned": {"positions": "learned"},
    "positions/none": {"positions": "none"},
    "attention/gqa": {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": "head"}},
    "attention/linear": {"attention": {"weights": "linear", "qk_norm": "full"}},
    "attention/window": {
        "attention": {"window": 4},
        "overrides": [{"layers": [1], "set": {"attention": {"window": 2}}}],
    },
    "attention/more_heads": {"overrides": [{"layers": [1], "set": {"attention": {"heads": 2, "head_width": 14}}}]},
    # residuals with a number
    "residual/cancelled": {"residual": {"attn": 0.0, "ffn": 0.0}},
    "residual/cancelled_attn": {"residual": {"attn": 0.0}},
    "residual/cancelled_ffn": {"residual": {"ffn": 0.0}},
    "residual/cancelled_post": _BERT | {"residual": {"attn": 0.0, "ffn": 0.0}},
    "residual/cancelled_ffn_post": _BERT | {"residual": {"ffn": 0.0}},
    "residual/cancelled_attn_post": _BERT | {"residual": {"attn": 0.0}},
    "residual/cancelled_sandwich": {"norm": {"layout": "sandwich"}, "residual": {"attn": 0.0, "ffn": 0.0}},
    "residual/cancelled_branch": {"norm": {"layout": "branch"}, "residual": {"attn": 0.0, "ffn": 0.0}},
    "residual/number": {"residual": {"attn": 0.7, "ffn": -1.3}},
    "residual/number_post": _BERT | {"residual": {"attn": 0.7, "ffn": 1.9}},
    "residual/learned": {"residual": {"attn": "learned", "ffn": "learned"}},
    "residual/learned_attn_post": _POST | {"residual": {"attn": "learned"}},
    # attention only
    "attention_only": {"block": "attention_only"},
    "attention_only/gelu": {"block": {"kind": "attention_only", "activation": "gelu"}},
    "attention_only/gelu_post": _BERT | {"block": {"kind": "attention_only", "activation": "gelu"}},
    "attention_only/cancelled": {
        "block": {"kind": "attention_only", "activation": "gelu"},
        "residual": {"attn": 0.0},
    },
    "attention_only/cancelled_post": _BERT
    | {"block": {"kind": "attention_only", "activation": "gelu"}, "residual": {"attn": 0.0}},
    # parallel
    "parallel": {"block": "parallel"},
    "parallel/two_norms": {"block": {"kind": "parallel", "norms": "two"}},
    "parallel/post": _POST | {"block": "parallel"},
    "parallel/sandwich": {"norm": {"layout": "sandwich"}, "block": "parallel"},
    "parallel/branch": {"norm": {"layout": "branch"}, "block": "parallel"},
    "parallel/number": {"block": "parallel", "residual": {"attn": 0.4, "ffn": 0.4}},
    "parallel/sparse": {"block": "parallel"} | _sparse("top_k"),
    # part of the FFN inside attention
    "caa": _caa(),
    "caa/masked": _BERT | _caa(),
    "caa/r0": _caa(0.0),
    "caa/r0_post": _POST | _caa(0.0),
    "caa/r0_post_kept_norm": _POST | _caa(0.0, drop_outer_norm_at_r0=False),
    "caa/r1": _caa(1.0),
    "caa/half_masked_path": _caa(0.5, direct_path="masked"),
    "caa/sink": _caa(0.5, direct_path="masked", empty_row="sink"),
    "caa/no_direct_path": _BERT | _caa(0.5, direct_path="none"),
    "caa/no_inner_residual": _caa(0.5, inner_residual=False, inner_norm="none"),
    "caa/inner_post": _caa(0.5, inner_norm="post"),
    "caa/own_kv": _caa(0.5, shared_kv=False),
    "caa/cancelled": _caa(0.5) | {"residual": {"attn": 0.0, "ffn": 0.5}},
    "caa/sandwich": {"norm": {"layout": "sandwich"}} | _caa(0.5),
    "caa/branch": {"norm": {"layout": "branch"}} | _caa(0.5),
    "caa/sparse": _caa(0.5) | _sparse("top_k", blocks=14, active_blocks=4),
    "caa/moe_inside": _caa(inner=_MOE),
    "caa/expert_choice_inside": _BERT | _caa(inner=_MOE | {"selector": "expert_choice", "active_blocks": 2}),
    # a mixture before the FFN
    "moe_before_ffn": {"block": {"kind": "moe_before_ffn", "moe": _MOE}},
    "moe_before_ffn/post": _BERT | {"block": {"kind": "moe_before_ffn", "moe": _MOE}},
    "moe_before_ffn/parallel": {"block": {"kind": "moe_before_ffn", "moe": _MOE, "place": "parallel"}},
    "moe_before_ffn/parallel_post": _POST | {"block": {"kind": "moe_before_ffn", "moe": _MOE, "place": "parallel"}},
    "moe_before_ffn/number": {
        "block": {"kind": "moe_before_ffn", "moe": _MOE},
        "residual": {"attn": 0.6, "ffn": "learned"},
    },
    "moe_before_ffn/cancelled": {"block": {"kind": "moe_before_ffn", "moe": _MOE}, "residual": {"ffn": 0.0}},
    "moe_before_ffn/two_sparse": {"block": {"kind": "moe_before_ffn", "moe": _MOE}} | _sparse("avg_k"),
    # selectors
    "sparse/avg_k": _sparse("avg_k"),
    "sparse/switch": _sparse("switch", gated=True, bias=True),
    "sparse/rand_hash": _sparse("rand_hash"),
    "sparse/vanilla_m": _cells("vanilla_m"),
    "sparse/vanilla_m_gated": _cells("vanilla_m", gated=True),
    "sparse/lorkm": _cells("lorkm"),
    "sparse/pkm": _cells("pkm"),
    "sparse/pkm_ffn": _cells("pkm_ffn"),
    "sparse/top_k": _sparse("top_k", bias=True),
    "sparse/gshard": _BERT | _sparse({"kind": "gshard", "eval_capacity": "as_training"}),
    "sparse/gshard_in_order": _sparse({"kind": "gshard", "eval_capacity": "as_training", "drop": "order"}),
    "sparse/expert_choice": _BERT | _sparse("expert_choice"),
    "sparse/bias_balanced": _sparse("bias_balanced"),
    "sparse/random_router": _sparse("random_router"),
    "sparse/shared": _sparse("top_k", shared_blocks=1, gated=True),
    "sparse/all_active": _sparse("top_k", active_blocks=BLOCKS),
    "sparse/one_cell_avg_k": _cells("avg_k"),
    # layers that differ or share their weights
    "mixed": {"overrides": [{"layers": "1::2", "set": _sparse("avg_k")}]},
    "mixed/blocks": {
        "layers": 4,
        "overrides": [
            {"layers": [1], "set": _caa(0.5)},
            {"layers": [2], "set": {"block": "attention_only"}},
            {"layers": [3], "set": {"block": "parallel"}},
        ],
    },
    "share/all": {"share": [0]},
    "share/two": {"share": [0, 1], "layers": 4, "overrides": [{"layers": [1], "set": _sparse("top_k")}]},
}


def settings(name: str, layers: int | None = None) -> ModelConfig:
    """The settings of a model by name."""
    chosen = merged(_BASE, OWN[name])
    return ModelConfig.parse(chosen if layers is None else chosen | {"layers": layers})


def own_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> TransectPreTrainedModel:
    """A tiny random model of ours with its head, in evaluation mode."""
    chosen = settings(name)
    kind = TransectForCausalLM if chosen.causal else TransectForMaskedLM
    ends = {key: number for key, number in SPECIAL_IDS.items() if key != "pad_token_id"}
    model = kind.make(chosen, **ends).to(dtype)
    enliven(model, seed)
    return model.eval()
