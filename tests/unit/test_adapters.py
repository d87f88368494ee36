"""Adapters: at first they change nothing, and only they, the norms and the classifier move."""

import pytest
import torch

from labelled_texts import items, view
from transect.tasks._adapters import Adapters
from transect.tasks._fine_tune import Settings, fine_tune, restored
from transect.tasks._sequences import padded, states
from transect.view import edits
from transect.view.kinds import is_norm

# post-norm, pre-norm, parallel, the branch's own output norm, one module for all layers, sparse, two kinds of our own
MODELS = ("bert", "gpt2", "gpt_neox", "olmo2", "albert", "own/standard", "own/attention_only")
SETTINGS = Settings(lr=1e-2, epochs=1, batch_size=16, adapters=7, patience=None)


@pytest.mark.parametrize("name", MODELS)
def test_new_adapters_leave_the_model_as_it_is(name: str, generator: torch.Generator):
    v = view(name, torch.float64)
    batch = padded(v, items(v, 7, 1).sequences)
    adapters = Adapters(v, 7, 0)
    with torch.no_grad():
        plain = states(v, batch)
        with adapters.within(v):
            assert torch.equal(states(v, batch), plain)
        count = sum(len(known.sublayers) for known in v.maps)
        assert len(adapters.adapters) == count > 0
        for adapter in adapters.adapters:
            torch.nn.init.normal_(adapter[2].bias, generator=generator)
            with adapters.within(v):
                changed = states(v, batch)
            torch.nn.init.zeros_(adapter[2].bias)
            assert not torch.allclose(changed, plain)  # each of them is read
        assert torch.equal(states(v, batch), plain)


@pytest.mark.parametrize("name", ["gpt2", "bert", "granite"])
def test_an_adapter_stands_behind_its_sublayer(name: str):
    v = view(name, torch.float64)
    batch = padded(v, items(v, 7, 1).sequences)
    adapters = Adapters(v, 7, 0)
    with torch.no_grad():
        with v.capture(["attn_out", "ffn_out"], [0]) as plain:
            states(v, batch)
        torch.nn.init.normal_(adapters.adapters[1][2].weight)
        with adapters.within(v), v.capture(["attn_out", "ffn_out"], [0]) as adapted:
            states(v, batch)
        before = plain["ffn_out", 0]
        assert torch.allclose(adapted["attn_out", 0], plain["attn_out", 0])
        assert torch.allclose(adapted["ffn_out", 0], before + adapters.adapters[1](before), atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "own/standard"])
def test_only_adapters_norms_and_classifier_move(name: str):
    v = view(name)
    before = [p.detach().clone() for p in v.model.parameters()]
    norms = {id(p) for module in v.base.modules() if is_norm(module) for p in module.parameters()}
    with restored(v):
        tuned = fine_tune(v, items(v, 61, 1), None, SETTINGS, 0)
        for parameter, old in zip(v.model.parameters(), before, strict=True):
            assert torch.equal(parameter, old) == (id(parameter) not in norms)
        ups = [adapter[2].weight for adapter in tuned.classifier.adapters.adapters]
        assert all(bool(up.abs().max() > 0) for up in ups)
    assert all(torch.equal(p, old) for p, old in zip(v.model.parameters(), before, strict=True))


def test_adapters_move_with_their_layers():
    v = view("gpt2", torch.float64)
    batch = padded(v, items(v, 7, 1).sequences)
    adapters = Adapters(v, 7, 0)
    torch.nn.init.normal_(adapters.adapters[0][2].weight)  # behind the attention of layer 0 as loaded
    with torch.no_grad(), edits.swap(v, 0, 1):
        with v.capture(["attn_out"]) as plain:
            states(v, batch)
        with adapters.within(v), v.capture(["attn_out"]) as adapted:
            states(v, batch)
    assert torch.equal(adapted["attn_out", 0], plain["attn_out", 0])
    assert not torch.allclose(adapted["attn_out", 1], plain["attn_out", 1])
