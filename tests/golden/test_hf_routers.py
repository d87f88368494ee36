"""Routers and sparse FFNs of transformers whose models ours cannot be as a whole, against our selectors."""

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hf_layouts import apart
from transect.models import ModelConfig
from transect.models.ffn.base import build
from transect.models.ffn.sparse import Sparse

WIDTH, UNITS, TOKENS = 40, 23, 37


def sparse(blocks: int, active: int, selector: dict, **options) -> Sparse:
    """Our sparse FFN, alone."""
    ffn = {"kind": "sparse", "blocks": blocks, "block_size": UNITS, "active_blocks": active, "selector": selector}
    settings = ModelConfig.parse(
        {"vocab_size": 97, "width": WIDTH, "layers": 1, "attention": {"heads": 4}, "ffn": ffn | options}
    )
    made = build(settings.ffn, settings, 0)
    assert isinstance(made, Sparse)
    return made.eval()


GROUPS = {
    "no groups": {"n_group": 1, "topk_group": 1},
    "two of four groups": {"n_group": 4, "topk_group": 2},
    "one of three groups": {"n_group": 3, "topk_group": 1},
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_router_of_deepseek_v3(groups: str, normalise: bool, biased: bool, generator: torch.Generator) -> None:
    """Sigmoid scores, a bias that chooses and does not weigh, groups, weights normalised and scaled."""
    number = GROUPS[groups]
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=12,
        num_experts_per_tok=3,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
        **number,
    )
    router = DeepseekV3TopkRouter(config)
    chosen_by = {"scores": "sigmoid", "normalise": normalise, "scale": 2.5}
    chosen_by |= {"groups": number["n_group"], "active_groups": number["topk_group"]}
    selector = sparse(12, 3, {"kind": "bias_balanced" if biased else "top_k", **chosen_by}).selector
    with torch.no_grad():
        router.weight.copy_(torch.randn(12, WIDTH, generator=generator) / WIDTH**0.5)
        selector.router.weight.copy_(router.weight)
        if biased:
            router.e_score_correction_bias.copy_(torch.randn(12, generator=generator) * 0.3)
            selector.bias.copy_(router.e_score_correction_bias)
    x = torch.randn((TOKENS, WIDTH), generator=generator)
    _, weights, indices = router(x)
    found = selector(x, None)
    assert torch.equal(found.blocks.sort(-1).values, indices.sort(-1).values)
    assert apart(by_block(found.blocks, found.weights), by_block(indices, weights)) <= 1e-6
    probe = torch.randn((TOKENS, 12), generator=generator)
    gradients = []
    for one, chosen, weight in ((router, indices, weights), (selector.router, found.blocks, found.weights)):
        (by_block(chosen, weight) * probe).sum().backward()
        gradients.append(one.weight.grad)
    assert apart(gradients[1], gradients[0]) <= 1e-5


def by_block(blocks: Tensor, weights: Tensor) -> Tensor:
    """[tokens, blocks]: each block's weight, 0 where it is not chosen."""
    return weights.new_zeros((len(blocks), 12)).scatter(1, blocks, weights)


def switch_pair(capacity: int, factor: float | None) -> tuple[SwitchTransformersSparseMLP, Sparse]:
    """Their layer with a capacity of tokens, ours with a factor, and the same weights."""
    config = SwitchTransformersConfig(
        d_model=WIDTH, d_ff=UNITS, num_experts=5, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    ours = sparse(5, 1, {"kind": "switch", "capacity": factor}, activation="relu")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        ours.selector.router.weight.copy_(theirs.router.classifier.weight)
        for block in range(5):
            expert = theirs.experts[f"expert_{block}"]
            ours.memory.keys[block].copy_(expert.wi.weight)
            ours.memory.values[block].copy_(expert.wo.weight.T)
    return theirs, ours


@pytest.mark.parametrize(("capacity", "factor"), [(TOKENS, None), (10, 1.25), (8, 1.0)])
def test_ffn_of_switch(capacity: int, factor: float | None, generator: torch.Generator) -> None:
    """One sequence: N = 37 tokens and B = 5 give int(c ceil(N / B)) = 10 and 8; full experts drop later tokens."""
    theirs, ours = switch_pair(capacity, factor)
    x = torch.randn((1, TOKENS, WIDTH), generator=generator)
    dropped = int((~theirs.router(x)[0].any(-1)).sum())
    assert (dropped > 0) == (factor is not None)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = theirs(one), ours(other, None, None).hidden
    assert apart(found, expected) <= 1e-6
    assert int((found.abs().sum(-1) == 0).sum()) == dropped
    probe = torch.randn(x.shape, generator=generator)
    (expected * probe).sum().backward()
    (found * probe).sum().backward()
    assert apart(other.grad, one.grad) <= 1e-5
    gradient = ours.selector.router.weight.grad
    assert apart(gradient, theirs.router.classifier.weight.grad) <= 1e-5
    for block in range(5):
        expert = theirs.experts[f"expert_{block}"]
        if expert.wi.weight.grad is not None:
            assert apart(ours.memory.keys.grad[block], expert.wi.weight.grad) <= 1e-5
            assert apart(ours.memory.values.grad[block], expert.wo.weight.grad.T) <= 1e-5


@torch.no_grad()
def test_capacity_of_switch_is_theirs_by_sequence_and_ours_by_batch(generator: torch.Generator) -> None:
    theirs, ours = switch_pair(8, 1.0)
    x = torch.randn((2, TOKENS, WIDTH), generator=generator)
    expected = theirs(x)
    alone = torch.cat([ours(row[None], None, None).hidden for row in x])
    assert apart(alone, expected) <= 1e-6
    assert apart(ours(x, None, None).hidden, expected) > 1e-2
