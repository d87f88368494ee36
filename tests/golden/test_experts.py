"""Experts seen one at a time against their formulas written out from the fused weights, in float64."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from families import (
    EXPERTS,
    EXPERTS_PER_TOKEN,
    FEED_FORWARD,
    HIDDEN,
    enliven,
    family,
    random_ids,
    tiny_model,
)
from transect.errors import InputError
from transect.view import edits
from transect.view.capture import stream
from transect.view.experts import choices, experts_of, one, without
from transect.view.view import View

SPARSE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
LAYER = 2
ATOL = 1e-10


@functools.cache
def view_of(name: str, dtype: torch.dtype = torch.float64) -> View:
    return View(tiny_model(name, dtype))


@functools.cache
def experts(name: str, layer: int = LAYER):
    return experts_of(view_of(name), layer)


def block_of(name: str, layer: int = LAYER) -> nn.Module:
    return view_of(name).layers[layer].mlp


def close(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# formulas of one expert


def gated(fused: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) * up x); the rows of gate come before those of up."""
    both, down = fused.gate_up_proj[expert], fused.down_proj[expert]
    inner = both.shape[0] // 2
    return (silu(x @ both[:inner].T) * (x @ both[inner:].T)) @ down.T


def interleaved(fused: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """gpt_oss: gate and up take turns, both are limited, gate is swish with slope 1.702, up is one more, biases."""
    both = x @ fused.gate_up_proj[expert] + fused.gate_up_proj_bias[expert]
    gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)) @ fused.down_proj[expert] + fused.down_proj_bias[expert]


def formula(name: str):
    return interleaved if name == "gpt_oss" else gated


def dense(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def beside(name: str, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the FFN adds beside the routed experts."""
    if name == "qwen2_moe":
        gate = x @ block.shared_expert_gate.weight.T
        return dense(block.shared_expert, x) / (1 + torch.exp(-gate))
    return dense(block.shared_experts, x) if name == "deepseek_v3" else torch.zeros_like(x)


def weights_of(name: str, router: nn.Module, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The weights of the chosen experts, from the router's scores."""
    if name == "deepseek_v3":  # the scale 2.5 is the configuration's
        scores = torch.sigmoid(logits).gather(1, index)
        return 2.5 * scores / scores.sum(-1, keepdim=True)
    if name in ("olmoe", "qwen2_moe"):
        return torch.softmax(logits, -1).gather(1, index)
    return torch.softmax(logits.gather(1, index), -1)


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_found(name):
    known = experts(name)
    assert (known.path, known.count) == ("mlp.experts", 6 if name == "deepseek_v3" else EXPERTS)
    assert (known.active, known.per_expert) == (EXPERTS_PER_TOKEN, False)
    assert {part: tap.key for part, tap in known.taps.items()} == {"input": 0, "index": 1, "weight": 2}
    assert known.residual <= 1e-10


@pytest.mark.parametrize("name", SPARSE)
def test_one_expert_is_its_formula(name, generator):
    x = 3 * torch.randn(7, HIDDEN, generator=generator, dtype=torch.float64)
    view = view_of(name)
    for layer in (1, 2):
        known = experts(name, layer)
        outputs = []
        with torch.no_grad():
            for expert in range(known.count):
                outputs.append(one(view, layer, expert, x, known))
                close(outputs[-1], formula(name)(block_of(name, layer).experts, expert, x))
            assert torch.equal(one(view, layer, 1, x), outputs[1])
        assert all((outputs[0] - other).abs().max() > 0.1 for other in outputs[1:])
    assert one(view, LAYER, 0, x[:0], known).shape == (0, HIDDEN)


@pytest.mark.parametrize("name", SPARSE)
def test_routed_experts_make_up_the_ffn(name, generator):
    """ffn_out = sum over choices of weight * expert, plus the shared one, all written out from the weights."""
    view, ids, block = view_of(name), random_ids((3, 11), generator), block_of(name)
    sites = ("ffn_in", "selected", "selected_weights", "router_logits", "ffn_out")
    with torch.no_grad(), view.capture(sites, [LAYER]) as seen:
        view.run(ids)
        hidden, index, weight, logits, output = (seen[site, LAYER].flatten(0, 1) for site in sites)
        total = beside(name, block, hidden)
        for token in range(33):
            for slot in range(EXPERTS_PER_TOKEN):
                row = formula(name)(block.experts, int(index[token, slot]), hidden[token : token + 1])
                total[token] += weight[token, slot] * row[0]
        close(total, output)
    router = getattr(block, "gate", None) or block.router
    expected = weights_of(name, router, logits, index)
    close(weight.double(), expected.double(), 1e-6)  # some routers compute in float32


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", SPARSE)
def test_float32_and_other_implementations(name, implementation, generator):
    model = tiny_model(name)
    model.config._experts_implementation = implementation
    view = View(model)
    known = experts_of(view, LAYER)
    assert known.residual <= 1e-5
    x = torch.randn(7, HIDDEN, generator=generator)
    with torch.no_grad():
        close(one(view, LAYER, 3, x, known), formula(name)(view.layers[LAYER].mlp.experts, 3, x), 1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_call_of_one_expert_is_no_part_of_the_pass(name, generator):
    view, ids = view_of(name), random_ids((2, 5), generator)
    alone, heard = [], []

    def use(layer, seen):
        heard.append(layer)
        alone.append(one(view, layer, 0, seen["ffn_in"].flatten(0, 1), experts(name)))

    with (
        torch.no_grad(),
        edits.remove(view, "expert", LAYER, expert=0),
        stream(view, {LAYER: ("ffn_in",)}, use),
        view.capture(("ffn_in",), [LAYER]) as capture,
    ):
        view.run(ids)
        experts_of(view, 1)
    assert heard == [LAYER]
    hidden = capture["ffn_in", LAYER].flatten(0, 1)
    close(alone[0], formula(name)(block_of(name).experts, 0, hidden).detach())
    assert alone[0].abs().max() > 0.1  # the removal does not reach it
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())


def test_gradients_are_the_callers_choice(generator):
    x = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    one(view_of("olmoe"), LAYER, 4, x).sum().backward()
    again = x.detach().clone().requires_grad_()
    gated(block_of("olmoe").experts, 4, again).sum().backward()
    close(x.grad, again.grad)
    with torch.no_grad():
        assert not one(view_of("olmoe"), LAYER, 4, x).requires_grad


# other ways to call the experts, planted into a model


class Scored(nn.Module):
    """Experts called with one score for each expert [tokens, count], by name; a choice of -1 is dropped."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.stack, self.down = fused.gate_up_proj, fused.down_proj

    def forward(self, *, scores, chosen, states):
        out = torch.zeros_like(states)
        for expert in range(len(self.stack)):
            rows = (chosen == expert).any(-1)
            gate, up = (states[rows] @ self.stack[expert].T).chunk(2, dim=-1)
            out[rows] += scores[rows, expert, None] * ((silu(gate) * up) @ self.down[expert].T)
        return out


class Inside(Scored):
    """Multiplies with the score before the activation, so that no expert has an output of its own."""

    def forward(self, *, scores, chosen, states):
        return super().forward(scores=(scores > 0).to(scores), chosen=chosen, states=states * scores.sum(-1)[:, None])


class Extra(Scored):
    def forward(self, *, scores, chosen, states, capacity):
        return super().forward(scores=scores, chosen=chosen, states=states)


class ScoredBlock(nn.Module):
    """Drops a token's second choice where the hidden states begin with a positive number."""

    def __init__(self, block: nn.Module, made: type[Scored], **more) -> None:
        super().__init__()
        self.gate, self.experts, self.more = block.gate, made(block.experts), more

    def forward(self, hidden):
        x = hidden.flatten(0, 1)
        _, weight, index = self.gate(x)
        scores = torch.zeros(len(x), len(self.experts.stack), dtype=x.dtype).scatter(1, index, weight.to(x))
        dropped = (x[:, :1] > 0) & torch.tensor([[False, True]])
        index = index.masked_fill(dropped, -1)
        return self.experts(scores=scores, chosen=index, states=x, **self.more).view(hidden.shape)


def planted(made: type[Scored], count: int = EXPERTS, **more) -> View:
    config = family("olmoe").but(num_experts=count)()
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    enliven(model, 0)
    for layer in model.model.layers:
        layer.mlp = ScoredBlock(layer.mlp, made, **more)
    return View(model)


def test_scores_for_every_expert_and_dropped_choices(generator):
    view, ids = planted(Scored), random_ids((3, 7), generator)
    known = experts_of(view, LAYER)
    assert known.per_expert
    assert (known.count, known.active) == (EXPERTS, EXPERTS_PER_TOKEN)
    assert {part: tap.key for part, tap in known.taps.items()} == {
        "input": "states",
        "index": "chosen",
        "weight": "scores",
    }
    x = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
    twin = block_of("olmoe").experts
    for expert in range(EXPERTS):
        close(one(view, LAYER, expert, x, known).detach(), gated(twin, expert, x).detach())
    seen: list[dict[str, torch.Tensor]] = []
    module = view.layers[LAYER].get_submodule(known.path)
    handle = module.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    with torch.no_grad(), handle:
        view.run(ids)
    (given,) = seen
    index, weight = choices(known, given["chosen"], given["scores"])
    dropped = (given["states"][:, :1] > 0) & torch.tensor([[False, True]])
    assert dropped.any() and not dropped[:, 1].all()
    assert torch.equal(index == -1, dropped)
    assert torch.equal(weight == 0, dropped)
    assert torch.equal(weight[~dropped], given["scores"].gather(1, index.clamp_min(0))[~dropped])
    assert weight.shape == index.shape == (21, EXPERTS_PER_TOKEN)


@pytest.mark.parametrize("expert", [0, 3])
def test_removal_with_scores_for_every_expert(expert, generator):
    view, ids = planted(Scored), random_ids((3, 7), generator)
    with torch.no_grad(), view.capture(("ffn_in", "ffn_out"), [LAYER]) as plain:
        view.run(ids)
    with torch.no_grad(), edits.remove(view, "expert", LAYER, expert=expert):
        with view.capture(("ffn_out",), [LAYER]) as removed:
            view.run(ids)
        x = plain["ffn_in", LAYER].flatten(0, 1)
        block = view.layers[LAYER].mlp
        _, weight, index = block.gate(x)
        share = torch.where((index == expert) & ((index != index[:, 1:]) | (x[:, :1] <= 0)), weight, 0).sum(-1)
        lost = share[:, None] * gated(block_of("olmoe").experts, expert, x)
    assert lost.any()
    close((plain["ffn_out", LAYER] - removed["ffn_out", LAYER]).flatten(0, 1), lost)


def test_as_many_experts_as_the_stream_is_wide(generator):
    """States and scores have one shape; only the proof tells which is which."""
    view = planted(Scored, HIDDEN)
    known = experts_of(view, LAYER)
    assert (known.taps["input"].key, known.taps["weight"].key, known.count) == ("states", "scores", HIDDEN)
    x = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
    fused = view.layers[LAYER].mlp.experts
    inner = FEED_FORWARD
    hidden = silu(x @ fused.stack[31, :inner].T) * (x @ fused.stack[31, inner:].T)
    close(one(view, LAYER, 31, x, known), hidden @ fused.down[31].T)


def test_choices():
    known = experts("mixtral")
    index = torch.tensor([[4, 0], [-1, 2], [3, EXPERTS]])
    weight = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.0, 0.5]])
    settled = (torch.tensor([[4, 0], [-1, 2], [3, -1]]), torch.tensor([[0.75, 0.25], [0.0, 0.5], [0.0, 0.0]]))
    for got, expected in zip(choices(known, index, weight), settled, strict=True):
        assert torch.equal(got, expected)


# refusals


def test_refusals_of_layers():
    for name, layer, reason in (
        ("gpt2", 0, "layer 0 of .* has no experts: dense FFN: nothing is routed; layers with experts: none"),
        ("deepseek_v3", 0, "layer 0 of .* has no experts: dense FFN: nothing is routed; layers with experts: 1, 2"),
        ("mixtral", 3, "layer 3 does not exist; .* has layers 0 to 2"),
        ("mixtral", -1, "layer -1 does not exist"),
    ):
        with pytest.raises(InputError, match=reason):
            experts_of(view_of(name), layer)


def test_refusals_of_experts(generator):
    view, known = view_of("mixtral"), experts("mixtral")
    x = torch.randn(3, HIDDEN, generator=generator, dtype=torch.float64)
    for expert in (-1, EXPERTS, None):
        with pytest.raises(InputError, match=f"expert is {expert}; layer 2 has experts 0 to 4"):
            one(view, LAYER, expert, x, known)
        with pytest.raises(InputError, match=f"expert is {expert}; layer 2 has experts 0 to 4"):
            without(known, LAYER, expert)
    for wrong in (x[0], x[:, :-1], x[None], x.float()):
        with pytest.raises(InputError, match=r"x is .*; an expert takes \[n, 40\] of torch.float64"):
            one(view, LAYER, 0, wrong, known)


def test_experts_without_an_output_of_their_own_are_refused():
    reason = r"at model\.layers\.2\.mlp\.experts the identity output = .* does not hold; residual 0\.\d+, allowed 1e-10"
    with pytest.raises(InputError, match=reason):
        experts_of(planted(Inside), LAYER)


def test_further_arguments_are_refused():
    with pytest.raises(InputError, match=r"mlp\.experts: .*called with scores, chosen, states, capacity; needed"):
        experts_of(planted(Extra, capacity=torch.ones(EXPERTS)), LAYER)
    with pytest.raises(InputError, match="called with scores, chosen, states, capacity; needed"):
        experts_of(planted(Extra, capacity=3), LAYER)
