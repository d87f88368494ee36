"""Tiny Hugging Face models that ours can be, and how near the two must come."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from families import EXPERTS, FAMILIES, HIDDEN, VARIANTS, WINDOW, Family, enliven

LONG_WINDOW = 61
ORIGINAL = 11  # positions before a context extension; texts are longer


def _rope(**numbers: float | None) -> dict:
    return {"rope_parameters": {"rope_theta": 523.0, **numbers}}


_LLAMA, _OLMOE = FAMILIES["llama"], FAMILIES["olmoe"]
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}

LAYOUTS: dict[str, Family] = {
    **{name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "mixtral", "olmoe")},
    "qwen3_moe": FAMILIES["qwen3_moe"],
    **{name: VARIANTS[name] for name in ("llama/biases", "llama/tied", "mistral/sliding", "qwen2/sliding")},
    **{name: VARIANTS[name] for name in ("qwen3/sliding", "gpt2/scaled_by_layer", "qwen3_moe/mixed")},
    "llama/all_heads": _LLAMA.but(num_key_value_heads=4),
    "llama/one_key_head": _LLAMA.but(num_key_value_heads=1),
    "llama/gelu": _LLAMA.but(hidden_act="gelu_pytorch_tanh"),
    "llama/linear": _LLAMA.but(**_rope(rope_type="linear", factor=3.0)),
    "llama/llama3": _LLAMA.but(**_rope(rope_type="llama3", factor=7.0, **_LLAMA3)),
    "llama/yarn": _LLAMA.but(**_rope(rope_type="yarn", factor=5.0, original_max_position_embeddings=ORIGINAL)),
    "llama/yarn_by_ratio": _LLAMA.but(
        **_rope(rope_type="yarn", factor=None, original_max_position_embeddings=ORIGINAL)
    ),
    "qwen3/yarn_all_numbers": FAMILIES["qwen3"].but(
        **_rope(
            rope_type="yarn",
            factor=5.0,
            original_max_position_embeddings=ORIGINAL,
            beta_fast=17.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=0.4,
            truncate=False,
        )
    ),
    "qwen3/biases": FAMILIES["qwen3"].but(attention_bias=True),
    "mistral/long_window": FAMILIES["mistral"].but(sliding_window=LONG_WINDOW),
    "mixtral/sliding": FAMILIES["mixtral"].but(sliding_window=WINDOW),
    "mixtral/one_expert": FAMILIES["mixtral"].but(num_experts_per_tok=1),
    "mixtral/all_experts": FAMILIES["mixtral"].but(num_experts_per_tok=EXPERTS),
    "olmoe/normalised_biases": _OLMOE.but(norm_topk_prob=True, attention_bias=True),
    "olmoe/as_switch": _OLMOE.but(num_experts_per_tok=1, norm_topk_prob=False),
    "gpt2/unscaled": FAMILIES["gpt2"].but(scale_attn_weights=False),
    "gpt2/untied_relu": FAMILIES["gpt2"].but(tie_word_embeddings=False, activation_function="relu", n_inner=None),
    "bert/gelu_new": FAMILIES["bert"].but(hidden_act="gelu_new", type_vocab_size=3),
}
CAUSAL = [name for name, family in LAYOUTS.items() if not family.masked]
LENGTHS = (23, 17, 5)
"""Real tokens of the rows of a batch; windows are shorter and longer."""


def tolerance(name: str, dtype: torch.dtype) -> float:
    """What `apart` may be: the families beside GPT-2 and BERT compute norms, angles and softmax in float32 anyway."""
    if dtype == torch.float32:
        return 1e-5
    return 1e-10 if name.startswith(("gpt2", "bert")) else 1e-6


def apart(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest expected number."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def made(family: Family, dtype: torch.dtype = torch.float32, auto: Callable | None = None) -> PreTrainedModel:
    """A model of a layout with lively weights, in evaluation mode, eager."""
    config = family()
    config._experts_implementation = "eager"  # the grouped kernels refuse float64 and odd strides
    kind = auto or (AutoModelForMaskedLM if family.masked else AutoModelForCausalLM)
    model = kind.from_config(config, dtype=dtype, attn_implementation="eager")
    enliven(model, 3)
    return model.eval()


def eager_experts(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its experts computed one by one."""
    model.config._experts_implementation = "eager"
    return model


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of one batch with random tokens as padding, and the mask."""
    longest = max(map(len, rows))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, HIDDEN, (len(rows), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[place, real], mask[place, real] = row, 1
    return ids, mask
