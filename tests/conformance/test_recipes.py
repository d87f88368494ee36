"""Every shipped recipe: it can be read, written and counted; every architecture has a tiny twin, which runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shell import command
from transect import recipes
from transect.models.budget import budget
from transect.models.build import LanguageModel, build, skeleton
from transect.models.config import ModelConfig
from transect.recipes.page import differing
from transect.recipes.reading import FOLDER, chain, documents
from transect.recipes.recipe import load
from transect.results import Table

NAMES = recipes.names()
TINY = tuple(name for name in NAMES if name.startswith("tiny-"))
LENGTH = 13


def tiny(name: str) -> LanguageModel:
    torch.manual_seed(3)
    return build(load(name).model)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_read_written_and_counted(name: str, tmp_path: Path):
    recipe = load(name)
    assert recipe.name == name and recipe.description.endswith(".") and len(recipe.description) <= 110
    assert "arXiv" in recipe.source or any(word in recipe.source for word in ("Ours", "Shape of", "As "))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load(tmp_path / "again.yaml") == recipe
    assert ModelConfig.parse(differing(recipe.model)) == recipe.model
    model = skeleton(recipe.model)
    counted = budget(model)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < counted.active_parameters <= counted.parameters and counted.flops > 0
    assert model.num_parameters() == counted.parameters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_name_is_a_file_or_a_point_of_a_grid():
    found = [document["name"] for path in FOLDER.glob("*.yaml") for document in documents(path)]
    assert sorted(found) == list(NAMES) and len(set(found)) == len(found) >= 150
    for path in FOLDER.glob("*.yaml"):
        made = documents(path)
        assert len(made) > 1 or made[0]["name"] == path.stem
    assert all(name == name.lower() and " " not in name for name in NAMES)
    texts = [text for name in NAMES for document in chain(name) for text in _texts(document)]
    assert not [text for text in texts if "{" in text]


def _texts(tree: object) -> list[str]:
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in _texts(value)]
    return [text for value in tree for text in _texts(value)] if isinstance(tree, list) else [str(tree)]


def _kinds(model: ModelConfig) -> tuple:
    """What the code, rather than a number, makes of a recipe."""

    def selector(ffn) -> str:
        return getattr(getattr(ffn, "selector", None), "kind", "")

    layers = {
        (layer.block.kind, layer.ffn.kind, selector(layer.ffn), layer.norm.layout, layer.attention.weights)
        for layer in model.layer_configs
    }
    residuals = {(layer.residual.attn == 1, isinstance(layer.residual.attn, str)) for layer in model.layer_configs}
    penalties = tuple(sorted((one.kind, str(getattr(one, "weights", ""))) for one in model.penalties))
    return model.objective, frozenset(layers), frozenset(residuals), penalties, model.positions, model.norm.type


def test_every_architecture_has_a_tiny_twin():
    twins = {_kinds(load(name).model) for name in TINY}
    alone = [name for name in NAMES if _kinds(load(name).model) not in twins]
    assert alone == []
    assert all(load(name).model.width <= 24 for name in TINY)


@pytest.mark.parametrize("name", TINY)
def test_tiny_twin_learns(name: str):
    """Forward and backward: every loss is finite and every trained parameter that a token reaches gets a gradient."""
    model = tiny(name).train()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 97, (4, LENGTH), generator=generator)
    labels = ids if model.settings.causal else ids.where(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    pairs = {"next_sentence_label": torch.tensor([0, 1, 1, 0])} if model.settings.head.next_sentence else {}
    output = model(input_ids=ids, labels=labels, **pairs)
    assert output.logits.shape == (4, LENGTH, 97)
    assert abs(output.losses["main"].item() - math.log(97)) < 0.5
    assert torch.isfinite(output.loss) and output.loss >= output.losses["main"]
    output.loss.backward()
    without = [
        path
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None and "selector" not in path
    ]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    if model.settings.penalties:
        assert len(output.losses) > 1


@pytest.mark.parametrize("name", TINY)
def test_tiny_twin_is_measured_without_an_adapter(name: str, tmp_path: Path):
    tiny(name).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(3).integers(5, 97, (23, LENGTH)))
    arguments = ["--tokens", tmp_path / "ids.npy", "--seq-len", LENGTH, "--output", tmp_path / "run"]
    done = command("measure", tmp_path / "model", *arguments, "--probe", "jump", "--probe", "similarity")
    assert (done.code, done.err) == (0, ""), done.err
    table = Table.read(tmp_path / "run")
    moved = table.where(metric="displacement", variant="pre_norm/all")
    layers = load(name).model.layers
    assert sorted(row.layer for row in moved if row.layer is not None) == list(range(layers))
    assert all(row.value is not None and 0 <= row.value <= 1 for row in moved)


def test_sizes_in_names_are_about_right():
    for name in NAMES:
        family, _, size = name.partition("-")
        if family == "llama" and size[-1:] in "mb" and size[:-1].isdigit():
            wanted = int(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
            assert 0.85 < budget(load(name).model).parameters / wanted < 1.15, name


def test_cea_is_its_wider_base_and_one_line():
    for name in NAMES:
        if name.endswith("-cea") and name.startswith(("gpt", "bert")):
            own = chain(name)[-1]
            assert set(own) == {"name", "description", "source", "extends", "model"}
            assert list(own["model"]) == ["block"] and own["extends"] == name.replace("cea", "wider")


def test_show_fits_a_terminal_for_every_kind():
    for name in ("gpt-small-cea", "moe-14b-cea", "bert-6x512-no-skip-1-3-5", "sparse-large-switch-g64-e16"):
        said = command("show", name)
        assert said.code == 0 and said.out.startswith(name)
        assert all(len(line) <= 80 for line in said.out.splitlines())
