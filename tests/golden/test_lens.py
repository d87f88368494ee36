"""The lens at the last layer is the model's own head, whatever the head does to a state."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, VARIANTS, VOCAB, random_ids, tiny_model
from transect.errors import InputError
from transect.view import edits
from transect.view.lens import Lens
from transect.view.view import View

NAMES = [name for name in (*FAMILIES, *VARIANTS) if name != "bloom/post_norm_residual"]  # refused: no known layout
DTYPES = (torch.float32, torch.float64)


@functools.cache
def view_of(name: str, dtype: torch.dtype) -> View:
    return View(tiny_model(name, dtype))


def last_state(view: View, ids: Tensor) -> Tensor:
    """resid[L], by a capture of its own."""
    last = view.num_layers - 1
    with torch.no_grad(), view.capture(["resid_next"], [last]) as capture:
        view.run(ids)
    return capture["resid_next", last]


@pytest.fixture
def ids(generator: torch.Generator) -> Tensor:
    return random_ids((3, 11), generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_the_last_state_gives_the_models_own_logits_and_loss(name: str, dtype: torch.dtype, ids: Tensor):
    view = view_of(name, dtype)
    with torch.no_grad():
        expected = view.run(ids, head=True)
        states = last_state(view, ids)
        found = Lens(view)(states.flatten(0, 1)).unflatten(0, ids.shape)
    rounding = 100 * torch.finfo(dtype).eps
    assert (found - expected).abs().max() <= rounding * expected.abs().max()
    losses = [
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for logits in (found, expected)
    ]
    assert abs(losses[0] - losses[1]) <= rounding * losses[1]
    assert expected.std() > 0.1 and states.std() > 0.1  # there is something to be equal to


@pytest.mark.parametrize("pad", [None, 0, 1, *range(2, VOCAB, 7)])
def test_no_padding_token_is_read(pad: int | None, ids: Tensor):
    """A model that meets one without a mask warns of it."""
    model = tiny_model("gpt2")
    model.config.pad_token_id = pad
    view, read = View(model), []
    states = last_state(view, ids).flatten(0, 1)
    expected = view.run(ids, head=True).flatten(0, 1)
    handle = model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"]), with_kwargs=True)
    with handle:
        found = Lens(view)(states)
    assert [tuple(given.shape) for given in read] == [(3, 5), (15, 1), (33, 1)]
    assert not any((given == pad).any() for given in read if pad is not None)
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert", "cohere", "granite", "gemma2", "opt/post_norm"])
def test_every_state_is_read_by_itself(name: str, ids: Tensor):
    view = view_of(name, torch.float64)
    lens, states = Lens(view), last_state(view, ids).flatten(0, 1)
    whole = lens(states)
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lens(states[order]), whole[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(lens(states[7:8]), whole[7:8], rtol=0, atol=1e-12)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_scales_and_caps_of_a_head_are_the_models(ids: Tensor):
    """By hand: final norm, head, scale or cap."""
    for name, finish in {
        "gpt2": lambda logits: logits,
        "cohere": lambda logits: logits * 0.7,
        "granite": lambda logits: logits / 1.3,
        "gemma2": lambda logits: 7 * torch.tanh(logits / 7),
    }.items():
        view = view_of(name, torch.float64)
        states = torch.randn(13, view.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert view.final_norm is not None
        with torch.no_grad():
            expected = finish(view.model.lm_head(view.final_norm(states)))
        torch.testing.assert_close(Lens(view)(states), expected, rtol=0, atol=1e-10)
        assert not torch.allclose(view.model.lm_head(states), expected, atol=0.1)


def test_a_masked_models_transform_is_part_of_its_head():
    view = view_of("bert", torch.float64)
    states = torch.randn(13, view.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(Lens(view)(states), view.model.cls(states), rtol=0, atol=1e-12)


def test_earlier_states_are_read_too_and_nothing_is_left_behind(ids: Tensor):
    view = view_of("gpt2", torch.float64)
    with torch.no_grad():
        plain = view.run(ids, head=True)
    with view.capture(["resid"], [1]) as capture, torch.no_grad():
        view.run(ids)
    states = capture["resid", 1].flatten(0, 1)
    lens = Lens(view)
    with torch.no_grad():
        expected = view.model.lm_head(view.final_norm(states))
    torch.testing.assert_close(lens(states), expected, rtol=0, atol=1e-12)
    assert not lens(states).requires_grad
    assert all("forward" not in vars(layer) for layer in view.layers)
    with torch.no_grad():
        assert torch.equal(view.run(ids, head=True), plain)


def test_an_edited_layer_has_no_say_in_it(ids: Tensor):
    """The state is given as it is: what an edit would make of the layer's output is not made again."""
    view = view_of("bert", torch.float64)
    lens, states = Lens(view), last_state(view, ids).flatten(0, 1)
    with edits.replace(view, "layer", view.num_layers - 1, torch.cos), edits.remove(view, "ffn", 0):
        torch.testing.assert_close(lens(states), Lens(view)(states), rtol=0, atol=0)
        edited = last_state(view, ids).flatten(0, 1)
    torch.testing.assert_close(lens(states), view.model.cls(states), rtol=0, atol=1e-12)
    assert (edited - states).abs().max() > 1e-3


def test_a_model_without_a_head_is_refused():
    with pytest.raises(InputError, match="has no head"):
        Lens(View(tiny_model("bert").bert))


def test_a_head_that_reads_more_than_one_state_is_refused():
    model = tiny_model("gpt2")
    plain = model.forward

    def mixing(*args, **kwargs):
        output = plain(*args, **kwargs)
        return SimpleNamespace(logits=output.logits + output.logits.roll(1, dims=1))

    model.forward = mixing
    with pytest.raises(InputError, match="more than the last state of each position"):
        Lens(View(model))
