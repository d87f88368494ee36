"""Settings of our own models when their layers move: what stays, what is left behind, what is said."""

import json

import pytest
import torch

from families import enliven, random_ids
from own_models import _BASE as BASE
from transect.models.config import ModelConfig
from transect.models.heads import TransectForCausalLM
from transect.view import edits
from transect.view.commit import Changes, Removal, commit
from transect.view.own import heads_of, moved
from transect.view.view import View

PENALTIES = [{"weights": [0.1, 0.2, 0.7]}, {"weights": "last_k", "k": 3}, {"weights": "uniform"}]


def view_of(penalty: dict) -> View:
    torch.manual_seed(0)
    model = TransectForCausalLM.make(ModelConfig.parse(BASE | {"penalties": [{"kind": "jump", **penalty}]}))
    enliven(model, 0)
    return View(model.double(), name="own")


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_layers_of_a_model_with_penalties_can_be_removed(penalty: dict, generator: torch.Generator):
    view, ids = view_of(penalty), random_ids((2, 7), generator)
    view.model.train()
    before = view.model.config.architecture
    with edits.remove(view, "layer", 1), torch.no_grad():
        assert view.model.settings.layers == 2 and view.model.settings.penalties == []
        output = view.model(ids, labels=ids)
        assert set(output.losses) == {"main"}
    assert view.model.config.architecture == before
    with torch.no_grad():
        assert "jump" in view.model(ids, labels=ids).losses


def test_heads_are_those_of_the_layer_in_the_place():
    fewer = {"layers": [1], "set": {"attention": {"heads": 2}}}
    for share, heads in ((None, [3, 2, 3, 3]), ([0, 1, 0, 2], [3, 2, 3, 3]), ([0, 0, 1], [3, 3, 2, 3])):
        model = TransectForCausalLM.make(ModelConfig.parse(BASE | {"layers": 4, "share": share, "overrides": [fewer]}))
        assert [heads_of(model, place) for place in range(4)] == heads


def test_moved_settings_have_no_penalties():
    settings = view_of(PENALTIES[0]).model.settings
    found = moved(settings, [2, 0])
    assert (found.layers, found.penalties) == (2, [])


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_a_checkpoint_without_a_layer_says_that_the_penalties_stay_behind(penalty: dict, tmp_path):
    view = view_of(penalty)
    shorter = commit(view, Changes(removed=(Removal("layer", 1),)), tmp_path / "shorter")
    assert "penalties left behind: jump" in shorter.note
    assert json.loads((shorter.folder / "provenance.json").read_text())["note"] == shorter.note
    again = TransectForCausalLM.from_pretrained(shorter.folder)
    assert (again.settings.layers, again.settings.penalties) == (2, [])
    silent = commit(view, Changes(removed=(Removal("ffn", 1),)), tmp_path / "silent")
    assert "penalties" not in silent.note
    assert TransectForCausalLM.from_pretrained(silent.folder).settings.penalties == view.model.settings.penalties
