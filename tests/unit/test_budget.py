"""Budgets: the papers' tables, counts by hand, PyTorch's own counter, the real cache."""

from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, DynamicCache, LlamaConfig

from transect import recipes
from transect.errors import InputError
from transect.models.budget import Budget, budget, keys_seen
from transect.models.build import build, skeleton
from transect.models.config import ModelConfig
from transect.models.masks import Visible

LAYERS, HEADS, WIDTH, LENGTH = 3, 4, 24, 13


def settings(**given: Any) -> ModelConfig:
    """A tiny model."""
    usual = {"vocab_size": 97, "width": WIDTH, "layers": LAYERS, "max_positions": 31, "attention": {"heads": HEADS}}
    return ModelConfig.parse(usual | given)


def of_recipe(name: str, *changes: str, context: int | None = None) -> Budget:
    return budget(recipes.load(name, changes).model, context)


VARIETY: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {"ffn": {"gated": True, "width": 41}},
    "grouped queries": {"attention": {"heads": HEADS, "kv_heads": 2, "head_width": 10}},
    "normed queries": {"attention": {"heads": HEADS, "qk_norm": "head"}},
    "window": {"attention": {"heads": HEADS, "window": 5}},
    "shared layers": {"share": [0, 1]},
    "masked": {"objective": "masked", "head": {"transform": "gelu", "bias": True}, "norm": {"layout": "post"}},
    "untied, learned positions": {"head": {"tied": False}, "positions": "learned"},
    "sandwich, learned residuals": {"norm": {"layout": "sandwich"}, "residual": {"attn": "learned"}},
    "caa": {"block": {"kind": "caa", "outer_ratio": 0.25, "form": "overwrite"}},
    "caa, all inside": {"block": {"kind": "caa", "outer_ratio": 0, "form": "overwrite"}},
    "caa, own maps": {"block": {"kind": "caa", "outer_ratio": 0.25, "shared_kv": False, "form": "overwrite"}},
    "caa, masked": {"block": {"kind": "caa", "outer_ratio": 0.25, "direct_path": "masked"}},
    "caa, masked, raw row": {"block": {"kind": "caa", "direct_path": "masked", "empty_row": "raw"}},
    "caa, none": {"block": {"kind": "caa", "outer_ratio": 0.25, "direct_path": "none"}},
    "attention only": {"block": "attention_only"},
    "parallel": {"block": "parallel"},
    "moe before": {
        "block": {
            "kind": "moe_before_ffn",
            "moe": {"kind": "sparse", "blocks": 5, "block_size": 24, "active_blocks": 2},
        }
    },
    "shared blocks": {"ffn": {"kind": "sparse", "expansion": 4, "block_size": 8, "shared_blocks": 1}},
} | {
    name: {"ffn": {"kind": "sparse", "expansion": 4, "block_size": 8, "selector": name}}
    for name in ("avg_k", "switch", "rand_hash", "random_router", "top_k", "bias_balanced")
}


def _grouped(given: Any) -> Any:
    """Sparse FFNs computed block by block, which does the work that is chosen and no other."""
    if isinstance(given, dict):
        inner = {key: _grouped(value) for key, value in given.items()}
        return inner | ({"backend": "grouped"} if inner.get("kind") == "sparse" else {})
    return given


def counted_by_torch(model: nn.Module, length: int = LENGTH) -> float:
    """FLOPs per token of PyTorch's counter, which sees no fused kernel on the CPU and takes every key as seen."""
    ids = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(5))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("name", VARIETY)
def test_parameters_add_up_to_the_real_count(name: str):
    model = build(settings(**VARIETY[name]))
    found = budget(model)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert budget(model.settings) == found
    assert 0 < found.active_parameters <= found.parameters
    assert all(part.parameters >= part.active >= 0 <= part.flops for part in found.parts)


@pytest.mark.parametrize("name", VARIETY)
def test_flops_are_those_of_torchs_counter(name: str):
    model = build(settings(**_grouped(VARIETY[name]))).eval()
    assert budget(model, LENGTH, keys="all").flops == counted_by_torch(model)


@pytest.mark.parametrize("name", ["vanilla_m", "lorkm", "pkm", "pkm_ffn"])
def test_cells_differ_from_torchs_counter_by_gathered_values_and_adds(name: str):
    k, cells = 4 * WIDTH, 16 * WIDTH
    sparse = {"kind": "sparse", "expansion": 4, "block_size": 1, "selector": name, "backend": "grouped"}
    model = build(settings(ffn=sparse)).eval()
    missing = budget(model, LENGTH, keys="all").flops - counted_by_torch(model)
    values = 0 if name == "pkm_ffn" else 2 * WIDTH * k
    rows = max(side for side in range(1, 100) if cells % side == 0 and side * side <= cells)
    adds = sum(i * j <= k + 1 for i in range(1, rows + 1) for j in range(1, cells // rows + 1))
    assert missing == LAYERS * (values + (adds if name.startswith("pkm") else 0))


def test_a_causal_position_sees_half_and_a_window_less():
    def scores(context: int, keys: Literal["seen", "all"] = "seen", window: int | None = None) -> float:
        given = settings(attention={"heads": HEADS, "window": window})
        return budget(given, context, keys=keys).part("scores").flops / (4 * WIDTH * LAYERS)

    assert scores(LENGTH, "all") == LENGTH and scores(LENGTH) == (LENGTH + 1) / 2
    assert scores(LENGTH, window=5) == pytest.approx((1 + 2 + 3 + 4 + 5 * (LENGTH - 4)) / LENGTH, rel=1e-12)
    assert "scores" not in [part.name for part in budget(settings(), 0).parts]


def test_a_window_counts_in_each_layer_that_uses_the_weights():
    narrow = {"layers": [1], "set": {"attention": {"heads": HEADS, "window": 5}}}
    found = budget(settings(share=[0, 0, 1], overrides=[narrow]), LENGTH).part("scores").flops
    seen = 2 * keys_seen(LENGTH, None, True) + keys_seen(LENGTH, 5, True)
    assert found == pytest.approx(4 * WIDTH * seen, rel=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 13, 40])
def test_keys_seen_is_what_the_mask_says(causal: bool, window: int | None):
    for context in (1, 2, 13):
        mask = Visible(context, 0, causal, torch.device("cpu")).dense(context, window).expand(1, 1, context, context)
        assert keys_seen(context, window, causal) == pytest.approx(float(mask.sum()) / context, rel=1e-12)
    assert keys_seen(0, window, causal) == 0


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt-small-vanilla", 6_302_464),
        ("gpt-large-vanilla", 108_593_664),
        ("gpt-small-wider", 17_355_520),
        ("gpt-large-wider", 505_213_440),
        ("bert-base", 109_514_298),
    ],
)
def test_totals_of_the_papers(name: str, total: int):
    assert of_recipe(name).parameters == total


@pytest.mark.parametrize(("size", "width", "layer"), [("small", 128, 1_119_360), ("large", 768, 40_139_520)])
def test_layers_of_the_ffn_wider_paper(size: str, width: int, layer: int):
    def of_layers(*changes: str) -> float:
        found = of_recipe(f"gpt-{size}-wider", *changes)
        outside = ("embedding", "head")
        return sum(part.parameters for part in found.parts if part.name not in outside) / 12

    assert of_layers() == layer
    for ratio, norm, more in ((0.125, "post", 3), (0.125, "none", 1), (0, "none", -2), (0, "post", 0), (1, "post", 0)):
        block = f"model.block={{kind: caa, outer_ratio: {ratio}, inner_norm: {norm}}}"
        assert of_layers(block) - layer == more * width, (ratio, norm)


def test_raw_pairs_cost_four_d_squared_and_masked_ones_nothing():
    wide = of_recipe("gpt-large-wider", context=0)
    for path, more in (("raw", 4 * 768**2), ("masked", 0), ("none", 0)):
        found = of_recipe("gpt-large-cea", f"model.block.direct_path={path}", context=0)
        assert found.flops - wide.flops == 12 * more
    layer = (wide.flops - wide.part("head").flops) / 12
    assert 4 * 768**2 / layer == pytest.approx(0.029, abs=5e-4)


def test_the_14b_mixtures():
    dense = of_recipe("moe-14b-dense")
    matrices = sum(dense.part(name).parameters for name in ("embedding", "attention", "ffn"))
    assert matrices == 6 * 12 * 4096**2 + 32_000 * 4096 == 1_339_031_552
    for name, experts in (("moe-14b-before-ffn", "ffn"), ("moe-14b-cea", "inner_ffn")):
        found = of_recipe(name)
        assert found.part(experts).parameters == 6 * 64 * 2 * 4096**2
        assert found.part(experts).active == 6 * 2 * 4096**2
        assert found.part("selector").parameters == 6 * 64 * 4096
        rest = found.part("selector").parameters + found.part("norm").parameters
        assert found.parameters - rest == 14_223_933_440
    assert of_recipe("moe-14b-cea", context=0).flops == of_recipe("moe-14b-before-ffn", context=0).flops


def test_totals_of_native_models():
    llama = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    )
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(llama), AutoModelForMaskedLM.from_config(BertConfig())
    for name, model in zip(("llama-1b", "bert-base"), theirs, strict=True):
        assert of_recipe(name).parameters == model.num_parameters()


def sparse_at(block_size: int, expansion: float, selector: str = "avg_k", layers: str = ":", depth: int = 1) -> Budget:
    """d = 1024 with k = 4d active cells, attention's products left out."""
    ffn = {"kind": "sparse", "expansion": expansion, "block_size": block_size, "selector": selector}
    given = {"vocab_size": 50_257, "width": 1024, "layers": depth, "attention": {"heads": 16, "bias": False}}
    given |= {"ffn": {"bias": False}, "overrides": [{"layers": layers, "set": {"ffn": ffn}}]}
    return budget(ModelConfig.parse(given), 0)


@pytest.mark.parametrize("expansion", [4, 16])
@pytest.mark.parametrize("block_size", [4096, 1024, 256, 64, 16, 1])
def test_share_of_selection_in_the_sparse_ffn_paper(expansion: int, block_size: int):
    for selector in ("avg_k", "switch"):
        found = sparse_at(block_size, expansion, selector)
        assert found.part("selector").flops / found.part("ffn").flops == expansion / (2 * block_size)


@pytest.mark.parametrize(
    ("selector", "flops", "parameters"),
    [
        ("vanilla_m", lambda d, m, k: 2 * d * m + 2 * d * k, lambda d, m: 2 * d * m),
        ("lorkm", lambda d, m, k: 2 * (d * d / 8 + d / 8 * m) + 2 * d * k, lambda d, m: d * d / 8 + d / 8 * m + d * m),
        ("rand_hash", lambda d, m, k: 4 * d * k, lambda d, m: 2 * d * m),
    ],
)
def test_formulas_of_single_cells(selector: str, flops: Any, parameters: Any):
    d, m, k = 1024, 64 * 1024, 4096
    found = sparse_at(1, 16, selector)
    parts = [part for part in found.parts if part.name in ("ffn", "selector")]
    assert sum(part.flops for part in parts) == flops(d, m, k)
    assert sum(part.parameters for part in parts) == parameters(d, m)
    if selector == "vanilla_m":
        assert sum(part.flops for part in parts) / (4 * d * k) == 8.5


@pytest.mark.parametrize(("block_size", "layers", "more"), [(64, "::6", 0.0119), (256, "::2", 0.0089)])
def test_what_selection_adds_to_a_whole_model(block_size: int, layers: str, more: float):
    dense, sparse = (sparse_at(block_size, 16, layers=where, depth=24) for where in ("0:0", layers))
    assert dense.flops == pytest.approx(0.707e9, abs=0.5e6)
    assert sparse.flops / dense.flops - 1 == pytest.approx(more, abs=5e-5)


@pytest.mark.parametrize("name", ["standard", "grouped queries", "shared layers", "caa", "caa, masked", "window"])
def test_cache_is_what_decoding_keeps(name: str):
    model = build(settings(**VARIETY[name])).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(0, 97, (1, LENGTH)), past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # pyright: ignore
    found = budget(model, LENGTH, "float32")
    assert found.cache_bytes == kept / LENGTH
    assert found.cache_bytes_full == kept
    assert budget(model, LENGTH).cache_bytes == kept / LENGTH / 2


def test_a_masked_model_has_no_cache():
    found = budget(settings(**VARIETY["masked"]))
    assert found.cache_bytes is None and found.cache_bytes_full is None


def test_bytes_of_one_decoded_token():
    """Matrices, norms and biases once, of a table one row, and the head's whole table."""
    found = budget(settings(positions="learned", head={"tied": False}), LENGTH, "float32")
    layer = 4 * WIDTH**2 + 4 * WIDTH + 8 * WIDTH**2 + 5 * WIDTH + 4 * WIDTH
    assert found.weight_bytes == 4 * (2 * WIDTH + LAYERS * layer + 2 * WIDTH + 97 * WIDTH)
    assert found.step_bytes == found.parameters * (3 * 4 + 28)
    assert found.training_flops == 3 * found.flops


def test_shared_layers_are_stored_once_and_read_every_time():
    one, own = (budget(settings(share=share), LENGTH) for share in ([0], None))
    assert one.flops == own.flops and one.weight_bytes == own.weight_bytes and one.cache_bytes == own.cache_bytes
    layers = [own.part(name).parameters for name in ("attention", "ffn")]
    assert [one.part(name).parameters for name in ("attention", "ffn")] == [number / LAYERS for number in layers]


@pytest.mark.parametrize("selector", ["avg_k", "switch", "rand_hash", "vanilla_m"])
def test_a_token_reads_its_blocks_and_what_choosing_reads(selector: str):
    size, blocks, active = (1, 64, 7) if selector == "vanilla_m" else (8, 11, 3)
    ffn = {"kind": "sparse", "blocks": blocks, "block_size": size, "active_blocks": active, "selector": selector}
    found = budget(settings(ffn=ffn), LENGTH)
    assert found.part("ffn").active == found.part("ffn").read == LAYERS * 2 * WIDTH * size * active
    scored = {"rand_hash": 0, "vanilla_m": blocks - active}.get(selector, blocks)
    reads = [part.read for part in found.parts if part.name == "selector"] or [0]
    assert reads == [LAYERS * WIDTH * scored]
    whole = budget(settings(ffn={"bias": False}), LENGTH)
    own = found.parameters - found.part("ffn").parameters + found.part("ffn").active - found.active_parameters
    assert own == 0 and found.active_parameters < whole.parameters + 64 * WIDTH * LAYERS


class Bilinear(nn.Module):
    """A map that is no linear layer and does not say what it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 5))


def test_work_that_nobody_counts_is_refused():
    model = skeleton(settings())
    model.trunk.layers[1].extra = Bilinear()
    with pytest.raises(
        InputError, match=r"^Bilinear\.table is a matrix nobody counts; give Bilinear a method flops\(\)$"
    ):
        budget(model)


def test_wrong_questions_are_refused():
    with pytest.raises(InputError, match=r"^dtype is 'int8'; known are float32, bfloat16, float16, float64$"):
        budget(settings(), dtype="int8")
    with pytest.raises(InputError, match=r"^context is -1; it must be 0 or more$"):
        budget(settings(), -1)
    with pytest.raises(InputError, match=r"^keys is 'some'; it must be seen or all$"):
        budget(settings(), keys="some")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"^cannot count a Recipe; give a ModelConfig \(of a recipe: its model\) or a "
    ):
        budget(recipes.load("llama-1m"))  # type: ignore[arg-type]
