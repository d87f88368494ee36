"""AdamW and Adam with L2 against a plain loop in float64, and against PyTorch's one-tensor path."""

import math

import pytest
import torch
from torch import Tensor

from own_models import own_model
from transect.train.optimizers.adamw import AdamW

FACTORS = [0.2, 0.7, 1.0, 0.4, 0.0, 0.9]
RATE, BETAS, EPS, DECAY = 3e-2, (0.83, 0.97), 1e-7, 0.11


def plain_loop(weights: list[float], gradients: list[list[float]], decay: float, l2: bool) -> list[float]:
    """The update as the papers write it, number by number."""
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    for step, (factor, row) in enumerate(zip(FACTORS, gradients, strict=True), start=1):
        rate = RATE * factor
        for place, gradient in enumerate(row):
            weight = weights[place]
            if l2:
                gradient = gradient + decay * weight
            else:
                weight = weight - rate * decay * weight
            first[place] = BETAS[0] * first[place] + (1 - BETAS[0]) * gradient
            second[place] = BETAS[1] * second[place] + (1 - BETAS[1]) * gradient**2
            mean, square = first[place] / (1 - BETAS[0] ** step), second[place] / (1 - BETAS[1] ** step)
            weights[place] = weight - rate * mean / (math.sqrt(square) + EPS)
    return weights


def gradients_of(model: torch.nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_equals_a_plain_loop(l2: bool, decay_embeddings: bool):
    model = own_model("sparse/switch", torch.float64)
    given = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "l2": l2}
    optimizer = AdamW(AdamW.Config.parse(given | {"decay_embeddings": decay_embeddings}), model)
    picked = {
        "model.embeddings.tokens.weight": DECAY if decay_embeddings else 0.0,
        "model.layers.1.attn.k.weight": DECAY,
        "model.layers.1.attn.k.bias": 0.0,
        "model.layers.2.ffn.memory.keys": DECAY,
        "model.layers.2.ffn.memory.up_bias": 0.0,
        "model.layers.0.ffn.selector.router.weight": DECAY,
        "model.layers.0.attn_residual.norm.weight": 0.0,
    }
    numbers = {name: model.get_parameter(name).flatten()[:7].tolist() for name in picked}
    seen: dict[str, list[list[float]]] = {name: [] for name in picked}
    for step, factor in enumerate(FACTORS):
        for parameter, gradient in zip(model.parameters(), gradients_of(model, step), strict=True):
            parameter.grad = gradient
        for name in picked:
            seen[name].append(model.get_parameter(name).grad.flatten()[:7].tolist())
        optimizer.step(factor)
        optimizer.zero_grad()
    for name, decay in picked.items():
        by_hand = plain_loop(numbers[name], seen[name], decay, l2)
        assert model.get_parameter(name).flatten()[:7].tolist() == pytest.approx(by_hand, abs=1e-12), name


@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_one_tensor_path(l2: bool, dtype: torch.dtype):
    ours, theirs = own_model("standard", dtype), own_model("standard", dtype)
    config = AdamW.Config.parse({"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "l2": l2})
    optimizer = AdamW(config, ours)
    assert all(group["fused"] for part in optimizer.parts for group in part.param_groups)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    kind = torch.optim.Adam if l2 else torch.optim.AdamW
    one_by_one = kind(groups, lr=RATE, betas=BETAS, eps=EPS, foreach=False, fused=False)
    for step, factor in enumerate(FACTORS):
        for model in (ours, theirs):
            for parameter, gradient in zip(model.parameters(), gradients_of(model, step), strict=True):
                parameter.grad = gradient
        optimizer.step(factor)
        for group in one_by_one.param_groups:
            group["lr"] = RATE * factor
        one_by_one.step()
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=bound, atol=bound, msg=name)


def test_l2_is_another_optimizer():
    ends = []
    for l2 in (False, True):
        model = own_model("standard", torch.float64)
        optimizer = AdamW(AdamW.Config.parse({"lr": RATE, "weight_decay": DECAY, "l2": l2}), model)
        for parameter, gradient in zip(model.parameters(), gradients_of(model, 0), strict=True):
            parameter.grad = gradient
        optimizer.step(1.0)
        ends.append(model.get_parameter("model.layers.0.attn.q.weight").detach().clone())
    assert (ends[0] - ends[1]).abs().max() > 1e-4
