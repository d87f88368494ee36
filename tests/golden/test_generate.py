"""Generation with the cache equals generation without, for every block, FFN and selector; and that of transformers."""

import functools

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from families import FIRST_TEXT_ID, VOCAB, enliven, random_ids
from hf_layouts import CAUSAL, LAYOUTS, apart, made, padded
from transect import registry
from transect.models import ModelConfig, TransectForCausalLM, hf
from transect.models.selectors.base import Selector

NEW = 7
DTYPES = ((torch.float64, 1e-10), (torch.float32, 1e-5))
SHORT = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
BASE = {
    "vocab_size": VOCAB,
    "width": 24,
    "layers": 2,
    "max_positions": 41,
    "attention": {"heads": 4, "kv_heads": 2},
    "ffn": {"width": 36},
}
MIXTURE = {"kind": "sparse", "blocks": 25, "block_size": 7, "active_blocks": 3}
CELLS = MIXTURE | {"block_size": 1, "active_blocks": 5}

BLOCKS: dict[str, dict] = {
    "standard": {},
    "standard, window": {"attention": {"heads": 4, "window": 3}},
    "standard, linear": {"attention": {"heads": 4, "weights": "linear"}},
    "standard, learned positions": {"positions": "learned", "norm": {"layout": "post"}},
    "standard, layers shared": {"layers": 4, "share": [0, 1]},
    "attention_only": {"block": {"kind": "attention_only", "activation": "gelu"}},
    "parallel": {"block": {"kind": "parallel", "norms": "two"}},
    "moe_before_ffn": {"block": {"kind": "moe_before_ffn", "moe": MIXTURE | {"selector": "switch"}}},
    "moe_before_ffn, parallel": {
        "block": {"kind": "moe_before_ffn", "moe": MIXTURE | {"selector": "switch"}, "place": "parallel"}
    },
    "caa, overwrite": {"block": {"kind": "caa", "outer_ratio": 0.5, "form": "overwrite"}},
    "caa, concat": {"block": {"kind": "caa", "outer_ratio": 0.5, "form": "concat"}},
    "caa, merge": {"block": {"kind": "caa", "outer_ratio": 0.0, "form": "merge"}},
    "caa, own keys, window": {
        "block": {"kind": "caa", "outer_ratio": 0.5, "shared_kv": False},
        "attention": {"heads": 4, "window": 3},
    },
    "caa, none": {"block": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "none", "inner_norm": "post"}},
    "caa, masked": {"block": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "masked"}},
    "caa, masked, sink": {"block": {"kind": "caa", "outer_ratio": 0.0, "direct_path": "masked", "empty_row": "sink"}},
    "caa, linear": {
        "block": {"kind": "caa", "outer_ratio": 0.5},
        "attention": {"heads": 4, "weights": "linear"},
    },
    "caa, sparse halves": {
        "block": {"kind": "caa", "outer_ratio": 0.5},
        "ffn": MIXTURE | {"blocks": 24, "active_blocks": 4, "selector": "avg_k"},
    },
    "caa, sparse inside": {"block": {"kind": "caa", "inner": MIXTURE | {"selector": "avg_k"}}},
}
FFNS: dict[str, dict] = {
    "dense, gated": {"width": 36, "gated": True, "activation": "silu"},
    "sparse, shared, gated": MIXTURE | {"selector": "top_k", "shared_blocks": 1, "gated": True, "bias": True},
    "top_k, groups": MIXTURE
    | {"selector": {"kind": "top_k", "scores": "sigmoid", "groups": 5, "active_groups": 2}, "active_blocks": 4},
    "gshard": MIXTURE | {"selector": {"kind": "gshard", "capacity": None}, "active_blocks": 2},
}
for _name in registry.available("transect.models.selectors"):
    _rule = registry.load("transect.models.selectors", _name, Selector)
    if _rule.causal_safe:
        FFNS[f"sparse, {_name}"] = (CELLS if _rule.cells_only else MIXTURE) | {"selector": _name}

EACH = [*((block, "dense, gated") for block in BLOCKS), *(("standard", ffn) for ffn in FFNS)]
PAIRS = [(block, ffn) for block in BLOCKS for ffn in FFNS]
SAFE = pytest.mark.parametrize(("block", "ffn"), EACH, ids=lambda name: name.replace(" ", "-"))


def settings(block: str, ffn: str) -> ModelConfig:
    """Sparse FFNs stand inside CAA whole, where the halves would have no whole number of blocks."""
    made = BASE | {"ffn": FFNS[ffn]} | BLOCKS[block]
    if made["ffn"].get("kind") == "sparse" and "outer_ratio" in made.get("block", {}) and "ffn" not in BLOCKS[block]:
        made["block"] = made["block"] | {"outer_ratio": 0.0}
    return ModelConfig.parse(made)


@functools.cache
def model(block: str, ffn: str, dtype: torch.dtype = torch.float32) -> TransectForCausalLM:
    made = TransectForCausalLM.make(settings(block, ffn)).to(dtype).eval()
    enliven(made, 4)
    return made


def rows(generator: torch.Generator) -> list[Tensor]:
    return [random_ids((length,), generator) for length in (9, 5, 2)]


def test_every_plugin_is_here() -> None:
    assert {name.partition(",")[0] for name in BLOCKS} == set(registry.available("transect.models.blocks"))
    assert len(FFNS) >= 4 + 8


# logits


@pytest.mark.parametrize(("block", "ffn"), PAIRS, ids=lambda name: name.replace(" ", "-"))
@torch.no_grad()
def test_steps_with_the_cache_give_the_logits_of_the_whole(block: str, ffn: str, generator: torch.Generator) -> None:
    """A left-padded batch in parts of 5, 3 and 1 positions; each row's real positions as if it stood alone."""
    texts = [random_ids((length,), generator) for length in (11, 8, 3)]
    ids, mask = padded(texts, "left")
    for dtype, limit in DTYPES if (block, ffn) in EACH else DTYPES[:1]:
        one = model(block, ffn, dtype)
        cache, parts, start = None, [], 0
        for count in (5, 3, 1, 1, 1):
            end = start + count
            made = one(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, start = made.past_key_values, end
            parts.append(made.logits)
        assert cache.get_seq_length() == 11
        for text, real, found in zip(texts, mask.bool(), torch.cat(parts, 1), strict=True):
            assert apart(found[real], one(text[None]).logits[0]) <= limit


@SAFE
@torch.no_grad()
def test_static_cache(block: str, ffn: str, generator: torch.Generator) -> None:
    """Room for more positions than there are."""
    one = model(block, ffn, torch.float64)
    ids = random_ids((2, 11), generator)
    cache = StaticCache(config=one.config, max_cache_len=17)
    parts = [one(ids[:, start:end], past_key_values=cache).logits for start, end in ((0, 6), (6, 10), (10, 11))]
    assert apart(torch.cat(parts, 1), one(ids).logits) <= 1e-10


# generate


@SAFE
def test_greedy_and_beams(block: str, ffn: str, generator: torch.Generator) -> None:
    texts = rows(generator)
    ids, mask = padded(texts, "left")
    one = model(block, ffn, torch.float64)
    for way in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cached = one.generate(ids, attention_mask=mask, **SHORT, **way)
        assert cached.shape[1] > ids.shape[1]
        assert torch.equal(cached, one.generate(ids, attention_mask=mask, use_cache=False, **SHORT, **way))
    static = one.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **SHORT)
    greedy = one.generate(ids, attention_mask=mask, **SHORT)
    assert torch.equal(static, greedy)
    for text, found in zip(texts, greedy, strict=True):
        alone = one.generate(text[None], attention_mask=torch.ones_like(text[None]), **SHORT)[0]
        assert torch.equal(found[ids.shape[1] :][:NEW], alone[len(text) :])
        assert (alone[len(text) :] < VOCAB).all()


@SAFE
def test_sampling_with_the_same_seed(block: str, ffn: str, generator: torch.Generator) -> None:
    ids, mask = padded(rows(generator), "left")
    one = model(block, ffn, torch.float64)
    drawn = []
    for cached, seed in ((True, 6), (False, 6), (True, 7)):
        torch.manual_seed(seed)
        way = SHORT | {"do_sample": True, "top_k": 0, "temperature": 1.5, "use_cache": cached}
        drawn.append(one.generate(ids, attention_mask=mask, **way))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@SAFE
def test_assisted(block: str, ffn: str, generator: torch.Generator) -> None:
    """Drafts that are taken back leave nothing in the cache."""
    ids = random_ids((1, 5), generator).repeat(1, 2)
    one = model(block, ffn, torch.float64)
    mask = torch.ones_like(ids)
    expected = one.generate(ids, attention_mask=mask, **SHORT)
    assert torch.equal(one.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=3, **SHORT), expected)
    assistant = model("standard", "dense, gated", torch.float64)
    assert torch.equal(one.generate(ids, attention_mask=mask, assistant_model=assistant, **SHORT), expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_are_those_of_transformers(name: str, generator: torch.Generator) -> None:
    theirs = made(LAYOUTS[name])
    ours = hf.import_model(theirs)
    ids, mask = padded(rows(generator), "left")
    assert int(ids.min()) >= FIRST_TEXT_ID
    for way in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3}):
        expected = theirs.generate(ids, attention_mask=mask, **SHORT, **way)
        assert torch.equal(ours.generate(ids, attention_mask=mask, **SHORT, **way), expected)
