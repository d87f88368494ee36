"""`final_in` and `logits`: the sites that belong to no layer."""

import pytest
import torch

from families import random_ids, tiny_model
from transect.errors import InputError
from transect.view.prove import prove
from transect.view.sites import NEXT
from transect.view.view import View


def view_of(name: str) -> View:
    """A view of a tiny model in float64."""
    return View(tiny_model(name, torch.float64), name=name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "albert", "opt/post_norm", "gpt_neo"])
def test_captured_beside_layers(name: str, generator: torch.Generator) -> None:
    view = view_of(name)
    ids = random_ids((2, 7), generator)
    with torch.no_grad(), view.capture(["ffn_out", "logits", NEXT, "final_in"]) as seen:
        logits = view.run(ids, head=True)
    last = view.num_layers - 1
    assert torch.equal(seen["logits"], logits)
    assert torch.equal(seen["final_in"], seen[NEXT, last])
    assert ("final_in", last) not in seen
    if view.final_norm is not None:
        with torch.no_grad():
            torch.testing.assert_close(view.final_norm(seen["final_in"]), view.run(ids), rtol=1e-12, atol=1e-12)


def test_only_model_sites(generator: torch.Generator) -> None:
    view = view_of("llama")
    with view.capture(["final_in"]) as seen:
        view.run(random_ids((2, 7), generator))
    assert seen.keys() == ["final_in"]
    handles = [hook for module in view.model.modules() for hook in module._forward_pre_hooks]
    assert handles == []


def test_no_head_no_logits() -> None:
    view = View(tiny_model("llama", torch.float64).base_model, name="headless")
    with pytest.raises(InputError, match="no head"), view.capture(["logits"]):
        pass


def test_a_norm_that_does_not_read_the_stream_is_refused(generator: torch.Generator) -> None:
    view = view_of("llama")
    assert any(identity.text == "final_in = resid[L]" for identity in view.proof.identities)
    view.final_norm_path = "layers.0.input_layernorm"
    with pytest.raises(InputError, match=r"layers\.0\.input_layernorm the identity final_in = resid\[L\]"):
        prove(view, random_ids((2, 7), generator))
