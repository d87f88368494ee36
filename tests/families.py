"""Tiny random models of many Hugging Face model types, built from their configurations.

Nothing is downloaded. ``FAMILIES`` has one plain layout for each model type; ``VARIANTS`` has further layouts of the
same types, named ``type/layout``. Either table maps a name to a ``Family``, which called with a number of layers
(or with none, for its usual number) gives the configuration. ``tiny_model`` gives the model.

Sizes are small and mutually distinct, so that a swapped axis shows as a wrong shape. Weights are drawn so that every
part does something: activations are of order one, norm weights differ from one, and biases differ from zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

VOCAB = 97
HIDDEN = 40
HEADS = 4
KEY_VALUE_HEADS = 2
WIDE_HEAD = 14  # where the head width need not be HIDDEN // HEADS
FEED_FORWARD = 53
FACTOR = 22  # width of factorised embeddings
POSITIONS = 64
WINDOW = 4
EXPERTS = 5
EXPERTS_PER_TOKEN = 2
EXPERT_FEED_FORWARD = 23
SHARED_FEED_FORWARD = 29
FIRST_TEXT_ID = 5  # ids below are special: padding 0, beginning 1, end 2

SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class PerLayer:
    """A setting whose value depends on the number of layers."""

    of: Callable[[int], Any]


@dataclass(frozen=True)
class Family:
    """How to configure one model type at a tiny size."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    layers: int = 3
    layers_key: str = "num_hidden_layers"
    masked: bool = False

    def __call__(self, layers: int | None = None) -> PreTrainedConfig:
        count = self.layers if layers is None else layers
        settings = {k: v.of(count) if isinstance(v, PerLayer) else v for k, v in self.settings.items()}
        return AutoConfig.for_model(
            self.model_type, vocab_size=VOCAB, **SPECIAL_IDS, **{self.layers_key: count}, **settings
        )

    def but(self, **settings: Any) -> "Family":
        """The same type with some settings changed."""
        return Family(self.model_type, self.settings | settings, self.layers, self.layers_key, self.masked)


def _rope(**extra: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **extra}


def _layer_types(pattern: str) -> PerLayer:
    """Layer kinds by repeating a pattern of s (sliding window) and f (full)."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return PerLayer(lambda count: [names[pattern[i % len(pattern)]] for i in range(count)])


def _global_and_local(count: int) -> list[list[Any]]:
    """GPT-Neo's way of writing global, local, global, ..."""
    return [[[("global", "local")[i % 2]], 1] for i in range(count)]


_HIDDEN = {"hidden_size": HIDDEN, "num_attention_heads": HEADS}
_GPT2_HIDDEN = {"n_embd": HIDDEN, "n_head": HEADS, "n_positions": POSITIONS, "n_inner": FEED_FORWARD}
_GPT2_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_COMMON = _HIDDEN | {"intermediate_size": FEED_FORWARD, "max_position_embeddings": POSITIONS}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED = _COMMON | {"num_key_value_heads": KEY_VALUE_HEADS, "attention_dropout": 0.0}
_WIDE = _GROUPED | {"head_dim": WIDE_HEAD}
_QWEN_MOE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
    "moe_intermediate_size": EXPERT_FEED_FORWARD,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", _COMMON | _NO_DROPOUT, masked=True),
        # RoBERTa counts positions from pad_token_id + 1
        Family("roberta", _COMMON | _NO_DROPOUT | {"max_position_embeddings": POSITIONS + 1}, masked=True),
        Family(
            "distilbert",
            {
                "dim": HIDDEN,
                "n_heads": HEADS,
                "hidden_dim": FEED_FORWARD,
                "max_position_embeddings": POSITIONS,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "qa_dropout": 0.0,
                "seq_classif_dropout": 0.0,
            },
            layers_key="n_layers",
            masked=True,
        ),
        Family("electra", _COMMON | _NO_DROPOUT | {"embedding_size": FACTOR, "summary_last_dropout": 0.0}, masked=True),
        Family(
            "albert", _COMMON | _NO_DROPOUT | {"embedding_size": FACTOR, "classifier_dropout_prob": 0.0}, masked=True
        ),
        Family(
            "modernbert",
            _COMMON
            | {
                "local_attention": 2 * WINDOW,
                "layer_types": _layer_types("fss"),
                "cls_token_id": 1,
                "sep_token_id": 2,
            },
            layers=5,
            masked=True,
        ),
        Family("gpt2", _GPT2_HIDDEN | _GPT2_NO_DROPOUT | {"summary_first_dropout": 0.0}, layers_key="n_layer"),
        Family("gpt_neox", _COMMON | {"classifier_dropout": 0.0, "rope_parameters": _rope(partial_rotary_factor=0.6)}),
        Family("gptj", _GPT2_HIDDEN | _GPT2_NO_DROPOUT | {"rotary_dim": 6}, layers_key="n_layer"),
        Family(
            "gpt_neo",
            {
                "hidden_size": HIDDEN,
                "num_heads": HEADS,
                "intermediate_size": FEED_FORWARD,
                "max_position_embeddings": POSITIONS,
                "window_size": WINDOW,
                "attention_types": PerLayer(_global_and_local),
                "classifier_dropout": 0.0,
            },
            layers=5,
            layers_key="num_layers",
        ),
        Family("opt", _HIDDEN | {"ffn_dim": FEED_FORWARD, "max_position_embeddings": POSITIONS, "dropout": 0.0}),
        # BLOOM's feed-forward is always four times as wide as its residual stream
        Family("bloom", {"hidden_size": HIDDEN, "n_head": HEADS}, layers_key="n_layer"),
        Family("falcon", _HIDDEN | {"ffn_hidden_size": FEED_FORWARD, "max_position_embeddings": POSITIONS}),
        Family("llama", _GROUPED),
        Family("mistral", _WIDE | {"sliding_window": None}),
        Family("qwen2", _GROUPED),
        Family("qwen3", _WIDE),
        Family(
            "gemma2",
            _WIDE
            | {
                "query_pre_attn_scalar": 11,
                "sliding_window": WINDOW,
                "layer_types": _layer_types("sf"),
                "attn_logit_softcapping": 5.0,
                "final_logit_softcapping": 7.0,
            },
        ),
        Family(
            "gemma3_text",
            _WIDE | {"query_pre_attn_scalar": 11, "sliding_window": WINDOW, "layer_types": _layer_types("ssf")},
            layers=5,
        ),
        Family("phi", _GROUPED | {"rope_parameters": _rope(partial_rotary_factor=0.6)}),
        Family("phi3", _GROUPED | {"original_max_position_embeddings": POSITIONS}),
        Family("olmo", _GROUPED),
        Family("olmo2", _GROUPED),
        Family("stablelm", _GROUPED | {"use_qkv_bias": True, "rope_parameters": _rope(partial_rotary_factor=0.6)}),
        Family("starcoder2", _GROUPED | {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
        Family("cohere", _GROUPED | {"logit_scale": 0.7}),
        Family(
            "granite",
            _GROUPED
            | {
                "embedding_multiplier": 1.7,
                "residual_multiplier": 0.8,
                "attention_multiplier": 0.4,
                "logits_scaling": 1.3,
            },
        ),
        Family("smollm3", _GROUPED | {"no_rope_layer_interval": 2}, layers=5),
        Family(
            "mixtral",
            _WIDE | {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "sliding_window": None},
        ),
        Family("olmoe", _GROUPED | {"num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN}),
        Family("qwen2_moe", _GROUPED | _QWEN_MOE | {"shared_expert_intermediate_size": SHARED_FEED_FORWARD}),
        Family("qwen3_moe", _WIDE | _QWEN_MOE | {"norm_topk_prob": True}),
        Family(
            "deepseek_v3",
            _COMMON
            | {
                "num_key_value_heads": HEADS,  # latent attention: every head has its own keys and values
                "q_lora_rank": 19,
                "kv_lora_rank": 17,
                "qk_nope_head_dim": 9,
                "qk_rope_head_dim": 6,
                "v_head_dim": 13,
                "moe_intermediate_size": EXPERT_FEED_FORWARD,
                "n_routed_experts": 6,
                "n_shared_experts": 1,
                "num_experts_per_tok": 2,
                "n_group": 3,
                "topk_group": 2,
                "first_k_dense_replace": 1,
            },
        ),
        Family(
            "gpt_oss",
            _WIDE
            | {
                "num_local_experts": EXPERTS,
                "num_experts_per_tok": EXPERTS_PER_TOKEN,
                "sliding_window": WINDOW,
                "layer_types": _layer_types("sf"),
                "rope_parameters": _rope(),
            },
        ),
    )
}

_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _layer_types("fs")}

VARIANTS: dict[str, Family] = {
    # encoders
    "albert/two_groups": FAMILIES["albert"].but(num_hidden_groups=2),
    "albert/two_inner": FAMILIES["albert"].but(inner_group_num=2),
    # parallel and sequential layers, norm before and after
    "gpt_neox/sequential": FAMILIES["gpt_neox"].but(use_parallel_residual=False),
    "falcon/new_decoder": FAMILIES["falcon"].but(new_decoder_architecture=True, num_kv_heads=KEY_VALUE_HEADS),
    "falcon/new_decoder_one_norm": FAMILIES["falcon"].but(
        new_decoder_architecture=True, num_kv_heads=KEY_VALUE_HEADS, num_ln_in_parallel_attn=1
    ),
    "falcon/sequential": FAMILIES["falcon"].but(parallel_attn=False, multi_query=False, bias=True),
    "falcon/alibi": FAMILIES["falcon"].but(alibi=True),
    "opt/post_norm": FAMILIES["opt"].but(do_layer_norm_before=False, word_embed_proj_dim=FACTOR),
    "bloom/post_norm_residual": FAMILIES["bloom"].but(apply_residual_connection_post_layernorm=True),
    "stablelm/parallel": FAMILIES["stablelm"].but(use_parallel_residual=True),
    # norms of queries and keys, limits, biases
    "stablelm/qk_norm": FAMILIES["stablelm"].but(qk_layernorm=True),
    "phi/qk_norm": FAMILIES["phi"].but(qk_layernorm=True),
    "cohere/qk_norm": FAMILIES["cohere"].but(use_qk_norm=True),
    "olmo/clip_qkv": FAMILIES["olmo"].but(clip_qkv=0.8),
    "llama/biases": FAMILIES["llama"].but(attention_bias=True, mlp_bias=True),
    "llama/tied": FAMILIES["llama"].but(tie_word_embeddings=True),
    "gpt2/scaled_by_layer": FAMILIES["gpt2"].but(scale_attn_by_inverse_layer_idx=True),
    # sliding windows; a Mistral model has one on every layer or on none
    "mistral/sliding": FAMILIES["mistral"].but(sliding_window=WINDOW),
    "qwen2/sliding": FAMILIES["qwen2"].but(**_SLIDING),
    "qwen3/sliding": FAMILIES["qwen3"].but(**_SLIDING),
    "gemma2/full_first": FAMILIES["gemma2"].but(layer_types=_layer_types("fs")),
    # dense and sparse layers together
    "qwen2_moe/mixed": FAMILIES["qwen2_moe"].but(mlp_only_layers=[1]),
    "qwen3_moe/mixed": FAMILIES["qwen3_moe"].but(decoder_sparse_step=2),
    "deepseek_v3/all_sparse": FAMILIES["deepseek_v3"].but(first_k_dense_replace=0),
    "deepseek_v3/plain_query": FAMILIES["deepseek_v3"].but(q_lora_rank=None),
}

GAIN = 0.9
SPREAD = 0.3
TABLE = 0.5


def _spread(owner: nn.Module, name: str, parameter: nn.Parameter) -> tuple[float, float]:
    """The mean and standard deviation to draw a parameter with."""
    if "Norm" in type(owner).__name__ and "bias" not in name:
        # one, or zero where the norm multiplies by one more than its weight, as Gemma's does
        return round(parameter.detach().double().mean().item()), SPREAD
    if parameter.ndim < 2 or "bias" in name:
        return 0.0, SPREAD
    if isinstance(owner, nn.Embedding):
        # Gemma multiplies the rows by a scale kept in the model's dtype: round, so that the draw is the same in each
        return 0.0, TABLE / round(float(getattr(owner, "embed_scale", 1.0)), 1)
    inputs_first = type(owner).__name__ == "Conv1D" or getattr(owner, "is_transposed", False)
    return 0.0, GAIN / parameter.shape[-2 if inputs_first else -1] ** 0.5


@torch.no_grad()
def enliven(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter, each tied one once; buffers stay as they are.

    Draws are made in float64 on the CPU in the order of the parameters, so a float32 model is the rounding of the
    float64 model of the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    tied_to_table = {id(module.weight): module for module in model.modules() if isinstance(module, nn.Embedding)}
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            mean, spread = _spread(tied_to_table.get(id(parameter), module), name, parameter)
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread + mean
            parameter.copy_(drawn)


def loss_error(name: str) -> float:
    """How far losses of one family in float64, computed in batches and one by one, may lie apart.

    GPT-2 and BERT compute all of themselves in float64. The others compute norms, rotary angles or router scores in
    float32 whatever their type; its rounding changes with the shape of a batch and with the CPU's vectors (2e-9 seen).
    """
    return 1e-10 if name in ("gpt2", "bert") else 1e-8


def family(name: str) -> Family:
    return FAMILIES[name] if name in FAMILIES else VARIANTS[name]


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int | None = None
) -> PreTrainedModel:
    """A tiny random model with its language-model head, in evaluation mode, eager in attention and experts."""
    chosen = family(name)
    auto = AutoModelForMaskedLM if chosen.masked else AutoModelForCausalLM
    config = chosen(layers)
    config._experts_implementation = "eager"  # the grouped kernels refuse float64; dense models ignore this
    model = auto.from_config(config, dtype=dtype, attn_implementation="eager")
    enliven(model, seed)
    return model.eval()


def random_ids(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ids of text, without special ones."""
    return torch.randint(FIRST_TEXT_ID, VOCAB, shape, generator=generator)
