"""Matching: the integer nearest the baseline, by every number and every size, and refusal when none is near."""

from typing import Any

import pytest

from transect import recipes
from transect.errors import InputError
from transect.models.budget import budget
from transect.models.config import ModelConfig
from transect.models.match import match


def settings(**given: Any) -> ModelConfig:
    usual = {"vocab_size": 97, "width": 24, "layers": 3, "max_positions": 31, "attention": {"heads": 4}}
    return ModelConfig.parse(usual | given)


def test_cea_at_equal_flops_gives_up_a_width_of_d():
    """Raw pairs cost 4 d^2, a unit of FFN 4 d: the exact answer is m - d."""
    wider, cea = (recipes.load(f"gpt-small-{name}").model for name in ("wider", "cea"))
    found = match(cea, wider, by="flops")
    assert found.changes == {"ffn.width": 32 * 128 - 128} and found.difference == 0
    assert found.value == budget(found.settings).flops == found.target
    assert found.settings.ffn.width == 3968 and found.settings.block == cea.block


def test_cea_at_equal_parameters_is_the_wider_model():
    """It has 3 d vectors more in each layer, less than one split in eight can take away."""
    wider, cea = (recipes.load(f"gpt-small-{name}").model for name in ("wider", "cea"))
    found = match(cea, wider)
    assert found.changes == {"ffn.width": 4096} and found.value - found.target == 12 * 3 * 128


@pytest.mark.parametrize("by", ["parameters", "active", "flops"])
@pytest.mark.parametrize("free", ["ffn", "width", "layers"])
def test_the_nearest_of_all_sizes_is_found(by: Any, free: Any):
    variant, baseline = settings(ffn={"gated": True}), settings(layers=5, ffn={"multiple": 6})
    found = match(variant, baseline, by, free, tolerance=0.2)

    def number(size: int) -> float:
        changed = {"ffn": {"gated": True, "width": size}} if free == "ffn" else {free: size}
        counted = budget(variant.but(**changed), 31)
        return {"parameters": counted.parameters, "active": counted.active_parameters, "flops": counted.flops}[by]

    (size,) = found.changes.values()
    step = 8 if free == "width" else 1
    candidates = range(max(step, size - 6 * step), size + 7 * step, step)
    assert min(candidates, key=lambda s: abs(number(s) - found.target)) == size
    assert number(size) == found.value and found.difference == found.value / found.target - 1


def test_of_two_equally_near_sizes_the_smaller_is_taken():
    """Three rows of the embedding are half a unit of three layers: 3 d of 6 d."""
    variant = settings(ffn={"bias": False})
    found = match(variant, variant.but(vocab_size=100))
    one_more = budget(variant.but(ffn={"bias": False, "width": 97})).parameters
    assert found.changes == {"ffn.width": 96} and one_more - found.target == found.target - found.value == 3 * 24


def test_the_context_is_the_baselines_unless_given():
    variant, baseline = settings(max_positions=7, layers=2), settings()
    found = match(variant, baseline, by="flops")
    assert found.target == budget(baseline, 31).flops and found.value == budget(found.settings, 31).flops
    assert match(variant, baseline, by="flops", context=13).target == budget(baseline, 13).flops


def test_a_width_is_divided_by_heads_and_blocks():
    """A quarter of it must be whole in twelve heads of even width, and blocks of 32 must divide four times it."""
    sparse = {"kind": "sparse", "block_size": 32, "expansion": 4}
    variant = settings(width=48, attention={"heads": 12}, ffn=sparse)
    found = match(variant, settings(width=200, ffn={"multiple": 16}), free="width", tolerance=0.2)
    width = found.settings.width
    assert width % 24 == 0 and 4 * width % 32 == 0
    for other in (width - 24, width + 24):
        there = budget(variant.but(width=other)).parameters
        assert abs(there - found.target) > abs(found.value - found.target)


def test_blocks_of_a_sparse_ffn():
    ffn = {"kind": "sparse", "block_size": 8, "blocks": 16, "active_blocks": 3}
    baseline = settings(ffn={"multiple": 10, "bias": False})
    by_all = match(settings(ffn=ffn), baseline)
    assert by_all.changes["ffn.blocks"] == by_all.settings.ffn.blocks == 30  # 240 units of 8
    assert by_all.settings.ffn.active_blocks == 3 and by_all.difference == 0
    active = match(settings(ffn=ffn | {"blocks": 90}), baseline, by="active")
    assert active.changes == {"ffn.active_blocks": 30} and active.settings.ffn.blocks == 90
    flops = match(settings(ffn=ffn | {"blocks": 90}), baseline, by="flops", tolerance=0.02)
    assert flops.changes["ffn.active_blocks"] == 24  # choosing among 90 costs 2 d 90, a block 4 d 8


def test_a_memory_given_by_its_width_is_matched_by_its_blocks():
    ffn = {"kind": "sparse", "block_size": 8, "width": 128, "active_blocks": 3}
    found = match(settings(ffn=ffn), settings(ffn={"multiple": 10, "bias": False}))
    assert (found.settings.ffn.blocks, found.settings.ffn.width, found.difference) == (30, None, 0)


def test_ffns_of_overrides_are_the_ones_that_change():
    sparse = {"kind": "sparse", "block_size": 8, "expansion": 4}
    variant = settings(layers=4, overrides=[{"layers": "1::2", "set": {"ffn": sparse}}])
    found = match(variant, settings(layers=4, ffn={"multiple": 9}), tolerance=0.02)
    first, second = (layer.ffn.kind for layer in found.settings.layer_configs[:2])
    assert (first, second) == ("dense", "sparse")
    assert found.changes["overrides.0.set.ffn.blocks"] == found.settings.layer_configs[3].ffn.blocks
    assert found.settings.layer_configs[0] == variant.layer_configs[0]
    short = settings(layers=4, overrides=[{"layers": [2], "set": {"ffn": "sparse"}}], ffn={"multiple": 2})
    again = match(short.but(width=32), settings(width=32, layers=4, ffn={"multiple": 5}), by="active", tolerance=0.02)
    assert set(again.changes) == {"overrides.0.set.ffn.active_blocks"}


def test_what_cannot_be_matched_is_one_line():
    variant, baseline = settings(), settings(layers=9, width=32)
    with pytest.raises(InputError) as refused:
        match(variant, baseline, free="layers", tolerance=1e-6)
    said = str(refused.value)
    assert said.startswith("no layers brings parameters within 0.0001 % of ") and "\n" not in said
    assert "layers=16 comes nearest with" in said and said.endswith("free another size or allow more")
    with pytest.raises(InputError, match="layers=1 comes nearest"):
        match(settings(), settings(layers=1, ffn={"multiple": 0.5}), free="layers")
    for blocks in (16, 23):
        sparse = {"kind": "sparse", "block_size": 8, "blocks": blocks}
        with pytest.raises(InputError, match=f"active_blocks={blocks} comes nearest"):
            match(settings(ffn=sparse), settings(layers=40), by="active")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"by": "params"}, "by is 'params'; allowed are parameters, active, flops"),
        ({"free": "heads"}, "free is 'heads'; allowed are ffn, width, layers"),
        ({"variant": "llama-1m"}, "variant is a str; give a ModelConfig (of a recipe: its model)"),
        ({"baseline": {"width": 24}}, "baseline is a dict; give a ModelConfig (of a recipe: its model)"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_wrong_arguments_are_one_line(given: dict[str, Any], line: str):
    with pytest.raises(InputError) as refused:
        match(**{"variant": settings(), "baseline": settings()} | given)
    assert str(refused.value) == line


def test_large_models_take_no_memory_and_little_time():
    dense, mixture = (recipes.load(name).model for name in ("moe-14b-dense", "moe-14b-before-ffn"))
    found = match(dense, mixture, by="parameters", tolerance=1e-3)
    assert found.settings.ffn.width * 2 * 4096 * 6 == pytest.approx(12_884_901_888 + 805_306_368, rel=1e-3)
