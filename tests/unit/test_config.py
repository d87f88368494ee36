"""Settings: what is refused and in which words, how they are written, changed and told apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from pydantic import Field

from transect.config import Config, read_mapping, read_yaml, with_settings
from transect.errors import InputError
from transect.models.build import build
from transect.models.config import ModelConfig, merged

SIZES: dict[str, Any] = {"vocab_size": 97, "width": 24, "layers": 4, "max_positions": 31, "attention": {"heads": 4}}


def parse(*changes: str, **given: Any) -> ModelConfig:
    return ModelConfig.parse(with_settings(merged(SIZES, given), changes), "model")


SPARSE = "ffn={kind: sparse, block_size: 8, blocks: 12, active_blocks: 3}"
WRONG: list[tuple[tuple[str, ...], str]] = [
    (("width=25",), "model.attention.heads is 4: must divide width 25, or give attention.head_width"),
    (("width=20",), "model.rotary.fraction is 1.0: of head width 5 must be an even whole number"),
    (("attention.heads=5",), "model.attention.heads is 5: must divide width 24, or give attention.head_width"),
    (("attention.kv_heads=3",), "model.attention.kv_heads is 3: must divide heads 4"),
    (("attention.dropout=1",), "model.attention.dropout is 1: should be less than 1"),
    (("attention.scale=0",), "model.attention.scale is 0: should be greater than 0"),
    (("layers=0",), "model.layers is 0: should be greater than or equal to 1"),
    (("layers=2.5",), "model.layers is 2.5: should be a valid integer, got a number with a fractional part"),
    (("pad_token_id=97",), "model.pad_token_id is 97: the vocabulary has ids 0 to 96"),
    (("objective=both",), "model.objective is 'both': should be 'causal' or 'masked'"),
    (("norm.layout=front",), "model.norm.layout is 'front': should be 'pre', 'post', 'sandwich', 'branch' or 'none'"),
    (("with=3",), "model.with is not a setting; did you mean 'width'?"),
    (("attention.head=3",), "model.attention.head is not a setting; did you mean 'heads'?"),
    (("ffn.multipl=3",), "model.ffn.multipl is not a setting; did you mean 'multiple'?"),
    (("colour=red",), "model.colour is not a setting; known are block, attention, ffn, "),
    (("ffn=spars",), "model.ffn is 'spars': unknown ffn 'spars'; known are "),
    (("ffn=3",), "model.ffn is 3: give a name or settings with a kind; known are "),
    (("ffn.multiple=0.3",), "model.ffn.multiple is 0.3: times width 24 must be a whole number; or give ffn.width"),
    (("width=null",), "model.width is None: should be a valid integer"),
    ((SPARSE, "ffn.active_blocks=13"), "model.ffn.active_blocks is 13: more than there are; a memory of 12 blocks "),
    (
        (SPARSE, "ffn.selector=average"),
        "model.ffn.selector is 'average': unknown selector 'average'; known are avg_k, ",
    ),
    (("ffn={kind: sparse, width: 64, block_size: 7, active_blocks: 2}",), "model.ffn.width is 64: must give a whole "),
    (("ffn={kind: sparse, block_size: 7}",), "model.ffn.block_size is 7: does not divide 4 x width = 96 active cells"),
    (("ffn={kind: sparse, width: 64, blocks: 4}",), "model.ffn.blocks is 4: width is given too; give one of "),
    ((SPARSE, "ffn.selector=pkm"), "model.ffn.block_size is 8: selector pkm picks single cells; give block_size: 1"),
    (
        (SPARSE, "ffn.selector=expert_choice"),
        "model.ffn.selector.accept_leak is False: blocks choose among all tokens, later ones too; in a causal model",
    ),
    (
        (SPARSE, "ffn.selector=avg_k", "ffn.selector.gait=binary"),
        "model.ffn.selector.gait is not a setting; did you mean 'gate'?",
    ),
    (("block={kind: caa, outer_ratio: 1.5}",), "model.block.outer_ratio is 1.5: should be less than or equal to 1"),
    (("block={kind: caa, outer_ratio: -0.5}",), "model.block.outer_ratio is -0.5: should be greater than or equal to"),
    (("block={kind: caa, outer_ratio: 0.3}",), "model.block.outer_ratio is 0.3: 96 units cannot be split at 0.3; "),
    (("block=cea",), "model.block is 'cea': unknown block 'cea'; known are attention_only, caa, "),
    (
        ("overrides=[{layers: [4], set: {}}]",),
        "model.overrides.0.layers is 4: this layer does not exist; layers are 0 to 3",
    ),
    (("overrides=[{layers: odd, set: {}}]",), "model.overrides.0.layers is 'odd': give a list of layers or a slice "),
    (("overrides=[{layers: [1], set: {width: 3}}]",), "model.overrides.0.set.width is 3: a layer has block, attention"),
    (
        ("overrides=[{layers: [1], set: {attention: {heads: 5}}}]",),
        "model.attention.heads is 5: must divide width 24, or give attention.head_width (layer 1)",
    ),
    (
        ("share=[1, 0]",),
        "model.share is [1, 0]: give numbers that first appear in order 0, 1, 2, ..., as in [0, 0, 1, 1]",
    ),
    (("share=[]",), "model.share is []: give numbers that first appear in order"),
    (("init.rules={a: {std: 1}}",), "model.init.rules.a is {"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG, ids=[" ".join(changes) for changes, _ in WRONG])
def test_a_wrong_setting_is_one_line_with_path_value_and_what_is_allowed(changes: tuple[str, ...], line: str):
    with pytest.raises(InputError) as refused:
        parse(*changes)
    said = str(refused.value)
    assert said.startswith(line) and "\n" not in said, said


def test_without_a_needed_size_nothing_is_assumed():
    for name in ("vocab_size", "width", "layers"):
        with pytest.raises(InputError, match=rf"^model\.{name} is not given and has no default$"):
            ModelConfig.parse({key: value for key, value in SIZES.items() if key != name}, "model")


def test_consent_lets_expert_choice_into_a_causal_model_and_a_masked_one_needs_none():
    causal = parse(SPARSE, "ffn.selector={kind: expert_choice, accept_leak: true}")
    masked = parse(SPARSE, "ffn.selector=expert_choice", "objective=masked")
    assert causal.ffn.selector.accept_leak and not masked.ffn.selector.accept_leak


def test_set_reads_numbers_words_lists_and_makes_what_is_not_there():
    changed = with_settings(
        {"model": {"ffn": "sparse", "width": 3}},
        [
            "model.width=256",
            "model.norm.eps=1e-5",
            "model.ffn.selector=switch",
            "model.share=[0, 1]",
            "model.head.tied=false",
            "model.penalties=",
            "text=a=b",
        ],
    )
    assert changed == {
        "model": {
            "ffn": {"kind": "sparse", "selector": "switch"},
            "width": 256,
            "norm": {"eps": 1e-5},
            "share": [0, 1],
            "head": {"tied": False},
            "penalties": None,
        },
        "text": "a=b",
    }
    assert isinstance(changed["model"]["norm"]["eps"], float)


def test_set_leaves_what_it_was_given_alone():
    before = {"a": {"b": [1]}}
    with_settings(before, ["a.b=2", "a.c=3"])
    assert before == {"a": {"b": [1]}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("width", "--set 'width' does not fit; write path=value"),
        ("=3", "--set '=3' does not fit"),
        ("width.more=3", "'width' is 24 and has no settings below it"),
        ("norm=[1", "cannot read --set norm=[1, line 1"),
    ],
)
def test_a_setting_that_cannot_be_applied_is_one_line(setting: str, words: str):
    with pytest.raises(InputError) as refused:
        with_settings(SIZES, [setting])
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E3", 1000.0), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("7", 7), ("1::2", "1::2")],
)
def test_numbers_of_yaml_are_the_ones_people_mean(text: str, value: Any):
    found = read_yaml(text, "here")
    assert found == value and type(found) is type(value)


@drawn(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_as_it_was_written(number: float):
    assert read_yaml(f"{number!r}", "here") == number


def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path):
    for text, words in (("- 1\n", "holds a list; it must hold settings"), ("a: [1\nb", "cannot read .*line 2")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            read_mapping(tmp_path / "x.yaml")
    with pytest.raises(InputError, match=r"cannot read .*absent\.yaml"):
        read_mapping(tmp_path / "absent.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"cannot read .*x\.yaml: "):
        read_mapping(tmp_path / "x.yaml")


RICH = {
    "norm": {"layout": "post", "eps": 1e-12},
    "overrides": [{"layers": "1::2", "set": {"ffn": {"kind": "sparse", "block_size": 8, "expansion": 4}}}],
    "block": {"kind": "caa", "outer_ratio": 0.25},
    "penalties": [{"kind": "jump", "alpha": 0.25}],
    "init": {"rules": {"*.out.weight": {"draw": "uniform", "std": 0.01}}},
}


def test_yaml_and_json_give_the_same_settings_back(tmp_path: Path):
    whole = parse(**RICH)
    (tmp_path / "x.yaml").write_text(whole.to_yaml())
    (tmp_path / "x.json").write_text(json.dumps(whole.plain()))
    for name in ("x.yaml", "x.json"):
        again = ModelConfig.parse(read_mapping(tmp_path / name))
        assert again == whole and again.fingerprint() == whole.fingerprint()


def test_fingerprints_tell_settings_apart_and_nothing_else():
    whole = parse(**RICH)
    assert parse(*["layers=4", "norm.type=layer"], **RICH).fingerprint() == whole.fingerprint()
    assert ModelConfig.parse(dict(reversed(whole.plain().items()))).fingerprint() == whole.fingerprint()
    assert parse().fingerprint() == parse("ffn=dense").fingerprint() == parse("ffn={kind: dense}").fingerprint()
    others = ["width=32", "norm.eps=1e-11", "penalties=[]", "block.outer_ratio=0.5", "init.std=0.03"]
    prints = {whole.fingerprint(), *(parse(other, **RICH).fingerprint() for other in others)}
    assert len(prints) == 1 + len(others) and all(len(one) == 16 and int(one, 16) >= 0 for one in prints)


def test_settings_cannot_be_changed_and_but_checks_again():
    whole = parse()
    with pytest.raises(ValueError, match="frozen"):
        whole.width = 32  # type: ignore[misc]
    assert whole.but(width=32).width == 32 and whole.width == 24
    with pytest.raises(InputError, match="must divide width 25"):
        whole.but(width=25)


def test_overrides_hold_by_list_and_by_slice_and_the_last_one_wins():
    sparse = {"kind": "sparse", "block_size": 8, "expansion": 4}
    whole = parse(
        layers=5,
        overrides=[
            {"layers": "1::2", "set": {"ffn": sparse, "attention": {"window": 7}}},
            {"layers": [3, 4], "set": {"ffn": {"activation": "relu"}, "dropout": 0.2}},
            {"layers": "-1:", "set": {"attention": {"heads": 2}}},
        ],
    )
    layers = whole.layer_configs
    assert [layer.ffn.kind for layer in layers] == ["dense", "sparse", "dense", "sparse", "dense"]
    assert [layer.ffn.activation for layer in layers] == ["gelu", "gelu", "gelu", "relu", "relu"]
    assert [layer.attention.window for layer in layers] == [None, 7, None, 7, None]
    assert [layer.attention.heads for layer in layers] == [4, 4, 4, 4, 2]
    assert [layer.dropout for layer in layers] == [0, 0, 0, 0.2, 0.2]


@pytest.mark.parametrize(
    ("share", "modules"),
    [
        (None, (0, 1, 2, 3, 4)),
        ([0], (0, 0, 0, 0, 0)),
        ([0, 1], (0, 1, 0, 1, 0)),
        ([0, 0, 1, 1], (0, 0, 1, 1, 0)),
        ([0, 1, 2, 2, 2, 3], (0, 1, 2, 2, 2)),
    ],
)
def test_shared_weights_follow_the_pattern(share: list[int] | None, modules: tuple[int, ...]):
    whole = parse(layers=5, share=share)
    assert whole.modules == modules and len(whole.layer_configs) == max(modules) + 1
    model = build(whole)
    assert len(model.trunk.layers) == max(modules) + 1
    seen: list[int] = []
    for index, layer in enumerate(model.trunk.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: seen.append(index))
    with torch.no_grad():
        model(torch.arange(7)[None])
    assert tuple(seen) == modules


def test_an_override_of_shared_layers_counts_the_weights():
    whole = parse(layers=4, share=[0, 1], overrides=[{"layers": [1], "set": {"dropout": 0.5}}])
    assert [layer.dropout for layer in whole.layer_configs] == [0, 0.5]
    with pytest.raises(
        InputError, match=r"overrides\.0\.layers is 2: this set of weights does not exist; sets are 0 to 1"
    ):
        parse(layers=4, share=[0, 1], overrides=[{"layers": [2], "set": {}}])


def test_merging_goes_level_by_level_and_another_kind_starts_anew():
    base = {"ffn": {"kind": "dense", "multiple": 8}, "norm": {"layout": "post", "eps": 1}, "share": [0, 1]}
    changes = {"ffn": {"kind": "sparse", "blocks": 3}, "norm": {"eps": 2}, "share": [0]}
    assert merged(base, changes) == {
        "ffn": {"kind": "sparse", "blocks": 3},
        "norm": {"layout": "post", "eps": 2},
        "share": [0],
    }
    assert merged(base, {"ffn": {"multiple": 2}})["ffn"] == {"kind": "dense", "multiple": 2}
    assert merged(base, {"ffn": "dense"})["ffn"] == {"kind": "dense", "multiple": 8}
    assert merged(base, {"ffn": "sparse"})["ffn"] == {"kind": "sparse"}
    assert base["norm"] == {"layout": "post", "eps": 1}


class Inner(Config):
    size: int = 3


class Outer(Config):
    inner: Inner = Inner()
    many: dict[str, Inner] = Field(default_factory=dict)


def test_paths_lead_through_nested_settings():
    for given, line in (
        ({"inner": {"size": "x"}}, "run.inner.size is 'x': should be a valid integer, unable to parse string"),
        ({"inner": {"sise": 1}}, "run.inner.sise is not a setting; did you mean 'size'?"),
        ({"many": {"a": {"size": [1]}}}, "run.many.a.size is [1]: should be a valid integer"),
        ({"inner": 3}, "run.inner is 3: should be a valid dictionary or instance of Inner"),
    ):
        with pytest.raises(InputError) as refused:
            Outer.parse(given, "run")
        assert str(refused.value).startswith(line), refused.value


def test_the_short_form_of_a_plug_in_keeps_its_kind_when_options_are_added():
    assert merged({"selector": "switch"}, {"selector": {"balance": 0}}) == {
        "selector": {"kind": "switch", "balance": 0}
    }
    assert with_settings({"selector": "switch"}, ["selector.balance=0"]) == {
        "selector": {"kind": "switch", "balance": 0}
    }


def test_another_kind_leaves_the_old_options_behind():
    base = {"ffn": {"kind": "dense", "multiple": 32}}
    assert with_settings(base, ["ffn.kind=sparse"]) == merged(base, {"ffn": "sparse"}) == {"ffn": {"kind": "sparse"}}
    assert with_settings(base, ["ffn.kind=dense"]) == base
