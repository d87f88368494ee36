"""Recipe files: what they extend, grids, settings from outside, and what is refused in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

import transect as tx
from shell import ENVIRONMENT, command
from transect import recipes
from transect.errors import InputError
from transect.recipes.reading import documents
from transect.recipes.recipe import load

OWN = """
description: "My model."
source: "Ours"
extends: tiny-gpt-small-wider
model:
  layers: 3
  norm: {eps: 1e-6}
  block: {kind: caa, outer_ratio: 0.25}
"""


def written(folder: Path, text: str = OWN, name: str = "mine.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_a_file_changes_what_it_says_of_what_it_extends(tmp_path: Path):
    mine, base = load(written(tmp_path)), load("tiny-gpt-small-wider")
    assert mine.name == "mine" and mine.description == "My model."
    changed = {
        "layers": 3,
        "norm": base.model.norm.but(eps=1e-6).plain(),
        "block": {"kind": "caa", "outer_ratio": 0.25},
    }
    assert mine.model == base.model.but(**changed)
    assert mine.model.norm.layout == "post" and mine.model.ffn.multiple == 32


def test_files_extend_files_beside_them_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written(tmp_path, "description: Last.\nsource: Ours\nextends: below/mine.yaml\nmodel: {width: 48}\n", "last.yml")
    written(tmp_path / "below", OWN.replace("tiny-gpt-small-wider", "../base.json"))
    base = load("tiny-gpt-small-vanilla").but(name="base")
    (tmp_path / "base.json").write_text(base.model_dump_json())
    monkeypatch.chdir(tmp_path.parent)
    found = load(f"{tmp_path.name}/last.yml")
    assert (found.name, found.model.width, found.model.layers, found.model.ffn.multiple) == ("last", 48, 3, 4)


def test_settings_come_last_and_reach_into_short_forms(tmp_path: Path):
    mine = tx.recipes.load(written(tmp_path), ["model.width=48", "model.block.direct_path=none", "name=other"])
    assert (mine.name, mine.model.width, mine.model.block.direct_path) == ("other", 48, "none")
    chosen = ["model.block=standard", "model.ffn=sparse", "model.ffn.selector=switch", "model.ffn.selector.balance=0"]
    assert load("tiny-gpt-small-cea", chosen).model.ffn.selector.balance == 0


def test_a_grid_is_one_recipe_for_each_point(tmp_path: Path):
    text = """
name: "{host}-w{width}{mark}"
description: "{host}, {width} wide{mark}."
source: Ours
extends: tiny-{host}
grid:
  host: [gpt-small-vanilla, llama-10m]
  width: [24, 48]
  mark: {"": null, -learned: learned}
model: {width: "{width}", residual: {attn: "{mark}"}, share: ["{width}", "x{width}"]}
"""
    found = documents(written(tmp_path, text))
    assert len(found) == 8 and len({document["name"] for document in found}) == 8
    assert found[5] == {
        "name": "llama-10m-w24-learned",
        "description": "llama-10m, 24 wide-learned.",
        "source": "Ours",
        "extends": "tiny-llama-10m",
        "model": {"width": 24, "residual": {"attn": "learned"}, "share": [24, "x{width}"]},
    }
    with pytest.raises(InputError, match="is a grid of 8 recipes; write one recipe for each, without grid"):
        load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (OWN.replace("layers: 3", "layers: 0"), "model.layers is 0: should be greater than or equal to 1"),
        (OWN.replace("layers: 3", "layer: 3"), "model.layer is not a setting; did you mean 'layers'?"),
        (OWN.replace("0.25", "1.25"), "model.block.outer_ratio is 1.25: should be less than or equal to 1"),
        (OWN.replace("model:", "modle:"), "modle is not a setting; did you mean 'model'?"),
        (OWN.replace("description", "note"), "note is not a setting; known are name, description, source, model"),
        (
            OWN.replace("tiny-gpt-small-wider", "tiny-gpt-small-wide"),
            "no recipe is called 'tiny-gpt-small-wide'; did you ",
        ),
        (OWN.replace("tiny-gpt-small-wider", "absent.yaml"), "no recipe file "),
        (OWN.replace("tiny-gpt-small-wider", "mine.yaml"), "recipes extend each other: "),
        (
            OWN.replace("tiny-gpt-small-wider", "[a, b]"),
            "extends is ['a', 'b']; it must be the name or the file of one ",
        ),
        (OWN + "grid: {a: 3}\n", "grid is {'a': 3}; it must give each key a list, or values by label"),
        (OWN.replace("model:", "model: ["), "cannot read "),
        ("model: {}\n", "description is not given and has no default"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path: Path, text: str, line: str):
    written(tmp_path, text)
    with pytest.raises(InputError) as refused:
        load(tmp_path / "mine.yaml")
    assert line in str(refused.value) and "\n" not in str(refused.value)
    shown = command("show", tmp_path / "mine.yaml")
    assert shown.code == 2 and shown.err.count("\n") == 1 and shown.out == ""


def test_unknown_names_and_settings_of_other_things_are_one_line():
    for arguments, line in (
        (["gpt-small-ce"], "nothing is called 'gpt-small-ce'; did you mean 'gpt-small-cea'?"),
        (["jump", "--set", "ridge=0"], "--set and --context are for recipes; 'jump' is none"),
        (
            ["gpt-small-cea", "--set", "model.attention.heads=3"],
            "recipe gpt-small-cea: model.attention.heads is 3: must ",
        ),
        (["gpt-small-cea", "--context", "-1"], "context is -1; it must be 0 or more"),
        (["gpt-small-cea", "--dtype", "int8"], "dtype is 'int8'; known are float32"),
    ):
        done = command("show", *arguments)
        assert done.code == 2 and line in done.err and done.err.count("\n") == 1, done.err


def test_show_prints_settings_totals_and_bytes():
    said = command("show", "gpt-small-cea", "--context", "64", "--dtype", "float32").out
    for words in (
        "block: {kind: caa, outer_ratio: 0.125}",
        "budget, forward pass, among 64 positions",
        "17,360,128",
        "694 MB of weights\nand AdamW state moved per step",
        "12.3 kB per position, 786 kB at 64 positions",
        "+4,608 parameters (+0.03%,\nbiases and norms) and +786,432 FLOPs per token (+2.3%",
    ):
        assert words in said, said
    assert "dropout: 0.1" in said and "classifier_dropout" not in said
    masked = command("show", "bert-base").out
    assert "109,514,298" in masked and "no decoding and no cache" in masked and "note:" not in masked


@pytest.mark.parametrize(
    ("selector", "note"),
    [
        ("{kind: switch, gate: binary, balance: 0}", "its own weights get no gradient"),
        ("{kind: switch, gate: binary}", None),
        ("{kind: switch, balance: 0}", None),
        ("pkm_ffn", "its own weights get no gradient"),
        ("random_router", None),
        ("avg_k", None),
        ("{kind: expert_choice, accept_leak: true}", "leaks: blocks choose among all tokens"),
    ],
)
def test_show_warns_of_traps(selector: str, note: str | None):
    size = 1 if selector == "pkm_ffn" else 8
    ffn = f"model.ffn={{kind: sparse, expansion: 4, block_size: {size}, selector: {selector}}}"
    said = " ".join(command("show", "tiny-sparse-baseline", "--set", ffn).out.split())
    assert (note in said) if note else ("note:" not in said), said


def test_listing_recipes_imports_no_torch():
    code = (
        "import sys, transect; assert transect.recipes.described()['gpt-small-cea'];"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout == "[]\n"
    assert set(recipes.names()) == set(recipes.described()) and "colour" not in dir(recipes)
    with pytest.raises(AttributeError, match="'colour'"):
        _ = recipes.colour  # type: ignore[attr-defined]
