"""Removing one expert, in every family with fused experts, against a loop over tokens and choices, in float64."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from families import EXPERTS, EXPERTS_PER_TOKEN, random_ids, tiny_model
from transect.errors import InputError
from transect.view import edits
from transect.view.experts import experts_of
from transect.view.view import View

SPARSE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
LAYERS = (1, 2)  # the first layer of deepseek_v3 is dense
ATOL = 1e-10


@functools.cache
def view_of(name: str) -> View:
    return View(tiny_model(name, torch.float64))


@pytest.fixture(params=SPARSE)
def name(request) -> str:
    return request.param


@pytest.fixture
def view(name) -> View:
    return view_of(name)


@pytest.fixture
def ids(generator) -> torch.Tensor:
    return random_ids((2, 11), generator)


class Loop(nn.Module):
    """The experts written out, one token and one choice at a time, leaving some experts out."""

    def __init__(self, fused: nn.Module, left_out: tuple[int, ...]) -> None:
        super().__init__()
        self.fused, self.left_out = fused, left_out

    def forward(self, hidden, index, weight):
        out = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                if expert not in self.left_out:
                    out[token] += weight[token, slot] * self.expert(expert, hidden[token])
        return out

    def expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        fused = self.fused
        if hasattr(fused, "gate_up_proj_bias"):  # gpt_oss
            both = x @ fused.gate_up_proj[expert] + fused.gate_up_proj_bias[expert]
            gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            return hidden @ fused.down_proj[expert] + fused.down_proj_bias[expert]
        gate, up = (fused.gate_up_proj[expert] @ x).chunk(2)
        return fused.down_proj[expert] @ (gate * torch.sigmoid(gate) * up)


def by_hand(name: str, ids: torch.Tensor, left_out: dict[int, tuple[int, ...]], order=(0, 1, 2)) -> torch.Tensor:
    """Logits of a twin whose experts are loops; its layers run in the order given, each with its own loop."""
    model = tiny_model(name, torch.float64)
    for layer, experts in left_out.items():
        block = model.model.layers[layer].mlp
        block.experts = Loop(block.experts, experts)
    model.model.layers = nn.ModuleList(model.model.layers[layer] for layer in order)
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = [model.config.layer_types[layer] for layer in order]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


class Routed(NamedTuple):
    """What the experts of one layer were given, token by token."""

    hidden: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor


def seen_in(view: View, ids: torch.Tensor, layer: int) -> Routed:
    sites = ("ffn_in", "selected", "selected_weights")
    with torch.no_grad(), view.capture(sites, [layer]) as seen:
        view.run(ids)
    return Routed(*(seen[site, layer].flatten(0, 1) for site in sites))


def favourite(view: View, ids: torch.Tensor, layer: int) -> int:
    """The expert that most tokens choose."""
    return int(seen_in(view, ids, layer).index.flatten().mode().values)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def test_the_loops_are_the_experts(name, view, ids):
    close(view.logits(ids), by_hand(name, ids, {1: (), 2: ()}))


@pytest.mark.parametrize("layer", LAYERS)
def test_remove_expert(name, view, ids, layer):
    plain, chosen = view.logits(ids), seen_in(view, ids, layer).index.flatten()
    for expert in {int(chosen.mode().values), int(chosen[0]), int(chosen[1])}:
        with edits.remove(view, "expert", layer, expert=expert):
            changed = view.logits(ids)
        close(changed, by_hand(name, ids, {layer: (expert,)}))
        assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(view.logits(ids), plain)


def test_only_its_weight_changes_and_no_token_is_routed_anew(view, ids):
    before, expert = seen_in(view, ids, 2), favourite(view, ids, 2)
    with edits.remove(view, "expert", 2, expert=expert):
        after = seen_in(view, ids, 2)
    assert torch.equal(after.index, before.index) and torch.equal(after.hidden, before.hidden)
    chosen = before.index == expert
    assert chosen.any() and not chosen.all()
    assert not after.weight[chosen].any() and before.weight[chosen].all()
    assert torch.equal(after.weight[~chosen], before.weight[~chosen])


def test_tokens_that_did_not_choose_it_keep_their_bits(view, ids):
    expert = int(seen_in(view, ids, 2).index[0, 0])
    with torch.no_grad(), view.capture(("ffn_out",), [2]) as before:
        view.run(ids)
    with torch.no_grad(), edits.remove(view, "expert", 2, expert=expert), view.capture(("ffn_out",), [2]) as after:
        view.run(ids)
    same = (before["ffn_out", 2] == after["ffn_out", 2]).all(-1).flatten()
    assert torch.equal(same, ~(seen_in(view, ids, 2).index == expert).any(-1))


def never_chosen(view: View, ids: torch.Tensor, layer: int) -> int:
    """Plant scores so low that no token of these ids chooses what was the favourite of this layer."""
    never = favourite(view, ids, layer)
    block = view.layers[layer].mlp
    router = block.router if hasattr(block, "router") else block.gate
    with torch.no_grad():
        for offset in ("bias", "e_score_correction_bias"):
            if hasattr(router, offset):
                getattr(router, offset)[never] = -1000.0
                return never
        x = seen_in(view, ids, layer).hidden  # fewer tokens than widths, so one row can give every token one score
        router.weight[never] = torch.linalg.lstsq(x, torch.full((len(x), 1), -1000.0, dtype=x.dtype)).solution[:, 0]
    return never


@pytest.mark.parametrize("layer", LAYERS)
def test_an_expert_never_chosen_changes_no_bit(name, ids, layer):
    view = View(tiny_model(name, torch.float64))
    never = never_chosen(view, ids, layer)
    plain, index = view.logits(ids), seen_in(view, ids, layer).index
    assert not (index == never).any()
    with edits.remove(view, "expert", layer, expert=never):
        assert torch.equal(view.logits(ids), plain)
    with edits.remove(view, "expert", layer, expert=int(index[0, 0])):
        assert not torch.equal(view.logits(ids), plain)


def test_removing_every_expert_leaves_what_is_beside_them(name, view, ids):
    count = experts_of(view, 2).count
    everything = {2: tuple(range(count))}
    opened = [edits.remove(view, "expert", 2, expert=expert) for expert in range(count)]
    for edit in opened:
        edit.__enter__()
    try:
        removed = view.logits(ids)
    finally:
        for edit in reversed(opened):
            edit.__exit__(None, None, None)
    close(removed, by_hand(name, ids, everything))
    with edits.remove(view, "ffn", 2):
        empty = view.logits(ids)
    assert torch.equal(removed, empty) == (name not in ("qwen2_moe", "deepseek_v3"))  # these two have a shared expert


ORDERED: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "swap": (lambda view: edits.swap(view, 1, 2), (0, 2, 1)),
    "order": (lambda view: edits.order(view, (2, 1)), (2, 1)),
}


@pytest.mark.parametrize("how", ORDERED)
def test_removal_moves_with_its_layer(name, view, ids, how):
    edit, order = ORDERED[how]
    with edit(view):
        expert = favourite(view, ids, order.index(1))
    expected = by_hand(name, ids, {1: (expert,)}, order)
    with edits.remove(view, "expert", 1, expert=expert), edit(view):
        close(view.logits(ids), expected)
    with edit(view), edits.remove(view, "expert", order.index(1), expert=expert):
        close(view.logits(ids), expected)
    with edit(view):
        assert (view.logits(ids) - expected).abs().max() > 1e-3


def test_removal_of_a_repeated_layer(name, view, ids):
    expert, twin = favourite(view, ids, 1), View(tiny_model(name, torch.float64))
    fused = twin.layers[1].mlp.experts
    fused.forward = Loop(fused, (expert,)).forward
    with edits.repeat(view, 1, 3), edits.repeat(twin, 1, 3):
        plain, expected = view.logits(ids), twin.logits(ids)
    with edits.remove(view, "expert", 1, expert=expert), edits.repeat(view, 1, 3):
        close(view.logits(ids), expected)
    assert (plain - expected).abs().max() > 1e-3


def test_nothing_is_left_after_an_exception(view, ids):
    plain = view.logits(ids)
    with pytest.raises(ZeroDivisionError), edits.remove(view, "expert", 2, expert=0):
        raise ZeroDivisionError
    assert torch.equal(view.logits(ids), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())
    assert not view.replacing


def test_float32_never_chosen(name, ids):
    """In the experts' other implementation and another dtype too."""
    model = tiny_model(name)
    model.config._experts_implementation = "batched_mm"
    view = View(model)
    never = never_chosen(view, ids, 2)
    plain = view.logits(ids)
    with edits.remove(view, "expert", 2, expert=never):
        assert torch.equal(view.logits(ids), plain)
    with edits.remove(view, "expert", 2, expert=int(seen_in(view, ids, 2).index[0, 0])):
        assert (view.logits(ids) - plain).abs().max() > 1e-3


REFUSED = {
    "dense model": ("gpt2", 0, 0, "layer 0 of .* has no experts: dense FFN: nothing is routed; .*: none"),
    "dense layer": ("deepseek_v3", 0, 0, "layer 0 of .* has no experts: .*; layers with experts: 1, 2"),
    "beyond": ("mixtral", 1, EXPERTS, "expert is 5; layer 1 has experts 0 to 4"),
    "negative": ("mixtral", 1, -1, "expert is -1; layer 1 has experts 0 to 4"),
    "not given": ("mixtral", 1, None, "expert is None; layer 1 has experts 0 to 4"),
    "no layer": ("mixtral", 3, 0, "layer 3 does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    name, layer, expert, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason), edits.remove(view_of(name), "expert", layer, expert=expert):
        pass


def test_unknown_parts_name_expert_too():
    with pytest.raises(InputError, match=r"parts are attn, ffn, head, layer, expert, ffn2, inner_ffn$"):
        edits.remove(view_of("mixtral"), "mlp", 0).__enter__()
    assert seen_in(view_of("mixtral"), torch.tensor([[7, 8, 9]]), 0).index.shape == (3, EXPERTS_PER_TOKEN)
