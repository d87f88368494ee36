"""Plain forward passes of three families, written out by hand, to judge edits by.

`elements` gives each element of a layer as a function of its source site alone. A composite looks its parts up when it
is called, so exchanging one entry changes every element that contains it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Elements = dict[str, Callable[[Tensor], Tensor]]
KEEP = nn.Identity()


def layers_of(model: nn.Module) -> nn.ModuleList:
    kind = model.config.model_type
    if kind == "gpt2":
        return model.transformer.h
    return model.model.layers if kind == "llama" else model.bert.encoder.layer


def hand_logits(
    model: nn.Module,
    ids: Tensor,
    order: Sequence[int] | None = None,
    changed: Mapping[int, Elements] | None = None,
    stream_weights: Mapping[int, tuple[float, float]] | None = None,
) -> Tensor:
    """Logits of the layers in the order given, with elements exchanged and residuals weighted by layer."""
    layers = layers_of(model)
    with torch.no_grad():
        stream = embed(model, ids)
        for layer in range(len(layers)) if order is None else order:
            weights = (stream_weights or {}).get(layer, (1.0, 1.0))
            parts = elements(model, layers[layer], weights)
            parts.update((changed or {}).get(layer, {}))
            stream = parts["layer"](stream)
        return finish(model, stream)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    kind = model.config.model_type
    positions = torch.arange(ids.shape[1])
    if kind == "gpt2":
        return model.transformer.wte(ids) + model.transformer.wpe(positions)
    if kind == "llama":
        return model.model.embed_tokens(ids)
    tables = model.bert.embeddings
    total = tables.word_embeddings(ids) + tables.position_embeddings(positions) + tables.token_type_embeddings.weight[0]
    return tables.LayerNorm(total)


def finish(model: nn.Module, stream: Tensor) -> Tensor:
    kind = model.config.model_type
    if kind == "bert":
        return model.cls(stream)
    return model.lm_head(model.transformer.ln_f(stream) if kind == "gpt2" else model.model.norm(stream))


def elements(model: nn.Module, layer: nn.Module, weights: tuple[float, float] = (1.0, 1.0)) -> Elements:
    """Every element of one layer, in terms of its modules with parameters."""
    kind = model.config.model_type
    make = {"gpt2": _gpt2, "llama": _llama, "bert": _bert}[kind]
    parts, down, mid_norm, next_norm = make(model, layer)
    parts["attn"] = lambda x: parts["attn_proj"](parts["attn_heads"](x))
    parts["ffn"] = lambda x: down(parts["ffn_up"](x))
    parts["attn_residual"] = lambda x: weights[0] * x + parts["attn"](parts["attn_norm"](x))
    parts["attn_sublayer"] = lambda x: mid_norm(parts["attn_residual"](x))
    parts["ffn_residual"] = lambda x: weights[1] * x + parts["ffn"](parts["ffn_norm"](x))
    parts["ffn_sublayer"] = lambda x: next_norm(parts["ffn_residual"](x))
    parts["layer"] = lambda x: parts["ffn_sublayer"](parts["attn_sublayer"](x))
    return parts


def _gpt2(model, layer):
    def heads(x):
        query, key, value = layer.attn.c_attn(x).chunk(3, dim=-1)
        return _attend(query, key, value, model.config.n_head, causal=True)

    parts: Elements = {
        "attn_norm": layer.ln_1,
        "attn_heads": heads,
        "attn_proj": layer.attn.c_proj,
        "ffn_norm": layer.ln_2,
        "activation": layer.mlp.act,
    }
    parts["ffn_up"] = lambda x: parts["activation"](layer.mlp.c_fc(x))
    return parts, layer.mlp.c_proj, KEEP, KEEP


def _llama(model, layer):
    attn, mlp = layer.self_attn, layer.mlp

    def heads(x):
        count, shared = model.config.num_attention_heads, model.config.num_key_value_heads
        query, key = _rotated(attn.q_proj(x), count, model), _rotated(attn.k_proj(x), shared, model)
        width = query.shape[-1] // count
        copies = torch.arange(shared).repeat_interleave(count // shared)
        spread = (copies[:, None] * width + torch.arange(width)).flatten()
        return _attend(query, key[..., spread], attn.v_proj(x)[..., spread], count, causal=True, single=True)

    parts: Elements = {
        "attn_norm": layer.input_layernorm,
        "attn_heads": heads,
        "attn_proj": attn.o_proj,
        "ffn_norm": layer.post_attention_layernorm,
        "activation": mlp.act_fn,
    }
    parts["ffn_up"] = lambda x: parts["activation"](mlp.gate_proj(x)) * mlp.up_proj(x)
    return parts, mlp.down_proj, KEEP, KEEP


def _bert(model, layer):
    own, out = layer.attention.self, layer.attention.output
    parts: Elements = {
        "attn_norm": KEEP,
        "attn_heads": lambda x: _attend(own.query(x), own.key(x), own.value(x), own.num_attention_heads, causal=False),
        "attn_proj": out.dense,
        "ffn_norm": KEEP,
        "activation": layer.intermediate.intermediate_act_fn,
    }
    parts["ffn_up"] = lambda x: parts["activation"](layer.intermediate.dense(x))
    return parts, layer.output.dense, out.LayerNorm, layer.output.LayerNorm


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, *, causal: bool, single: bool = False) -> Tensor:
    query, key, value = (_split(x, heads) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32 if single else None)  # Llama's are float32 in any model
    return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(-2)


def _rotated(x: Tensor, heads: int, model: nn.Module) -> Tensor:
    positions = torch.arange(x.shape[1])[None]
    cos, sin = model.model.rotary_emb(x, positions)  # their numbers only; they are float32 at heart
    x = _split(x, heads)
    first, second = x.chunk(2, dim=-1)
    turned = x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return turned.transpose(1, 2).flatten(-2)
