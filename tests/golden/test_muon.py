"""Muon against a plain loop with matrices of its own, against the bounds of its iteration, and against PyTorch's."""

import math

import pytest
import torch
from torch import Tensor, nn

from own_models import own_model
from transect.train.optimizers._newton_schulz import orthogonalised
from transect.train.optimizers._orthogonal import Orthogonal, scaled
from transect.train.optimizers.muon import Muon

SHAPES = [(29, 67), (67, 29), (31, 31), (1, 13)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_are_within_the_bounds_of_the_quintic(shape, dtype, generator: torch.Generator):
    given = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    made = orthogonalised(given.to(dtype), 5, dtype).double()
    left, before, right = torch.linalg.svd(given, full_matrices=False)
    relative = before / before.norm(dim=1, keepdim=True)
    values = torch.linalg.svdvals(made)
    large, seen = relative > 0.01, relative > 0.0016
    assert large.any(1).all()
    inside = left.mT @ made @ right.mT  # the same singular vectors: diagonal
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert (inside - torch.diag_embed(diagonal)).abs().max() < (1e-10 if dtype == torch.float64 else 2e-4)
    assert diagonal[seen].min() > 0.681 and diagonal[large].max() < 1.135 and values.max() < 1.203


def test_the_bounds_are_those_of_the_polynomial():
    """On a fine grid of singular values relative to the norm, as the docstring states them."""
    start = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    end = start.clone()
    for _ in range(5):
        end = 3.4445 * end - 4.7750 * end**3 + 2.0315 * end**5
    assert 0.6818 < end[start >= 0.0016].min() < 0.6819
    assert 1.202 < end.max() < 1.203
    assert 1.134 < end[start >= 0.01].max() < 1.135
    assert (end[1:] / start[1:]).max() == pytest.approx(3.4445**5, rel=1e-3)


def test_each_singular_value_goes_the_way_of_the_polynomial():
    sizes = torch.tensor([1e-4, 2e-3, 0.03, 0.1, 0.3, 0.6], dtype=torch.float64)
    sizes = sizes / sizes.norm()
    generator = torch.Generator().manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(17, 6, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(11, 6, generator=generator, dtype=torch.float64))
    made = orthogonalised((left * (7 * sizes) @ right.T)[None], 5, torch.float64)[0]
    for place in range(6):
        value = float(sizes[place])
        for _ in range(5):
            value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
        assert float(left[:, place] @ made @ right[:, place]) == pytest.approx(value, abs=1e-10)


def test_scale_and_zeros(generator: torch.Generator):
    given = torch.randn(3, 13, 7, generator=generator)
    given[1] = 0
    made = orthogonalised(given, 5, torch.float32)
    assert (made[1] == 0).all()
    torch.testing.assert_close(orthogonalised(1000 * given, 5, torch.float32), made, rtol=0, atol=1e-5)
    assert orthogonalised(given[:0], 5, torch.float32).shape == (0, 13, 7)
    before = given.clone()
    orthogonalised(given, 5, torch.bfloat16)
    assert torch.equal(given, before)


def test_scales_by_hand():
    assert scaled("moonlight", 12, 25, False) == scaled("moonlight", 25, 12, True) == 1.0
    assert scaled("keller", 36, 4, False) == scaled("keller", 4, 36, True) == 3.0
    assert scaled("keller", 4, 36, False) == scaled("keller", 36, 4, True) == 1.0


def plain_twin(weight: Tensor, gradients: list[Tensor], given: dict, factors: list[float], turned: bool) -> Tensor:
    """One matrix alone, with the definition's words."""
    weight, momentum = weight.clone(), torch.zeros_like(weight)
    for gradient, factor in zip(gradients, factors, strict=True):
        momentum = given["momentum"] * momentum + (1 - given["momentum"]) * gradient
        seen = momentum
        if given["nesterov"]:
            seen = (1 - given["momentum"]) * gradient + given["momentum"] * momentum
        x = seen / math.sqrt(float((seen**2).sum()))
        for _ in range(given["iterations"]):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        rows, columns = (weight.shape[1], weight.shape[0]) if turned else tuple(weight.shape)
        size = {"keller": math.sqrt(max(1, rows / columns)), "moonlight": 0.2 * math.sqrt(max(rows, columns))}
        rate = given["lr"] * factor
        weight = weight - rate * given["weight_decay"] * weight - rate * size[given["scale"]] * x
    return weight


@pytest.mark.parametrize("scale", ["keller", "moonlight"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_a_plain_twin(scale: str, nesterov: bool, generator: torch.Generator):
    model = own_model("sparse/switch", torch.float64)
    given = {"lr": 3e-2, "momentum": 0.9, "nesterov": nesterov, "scale": scale, "weight_decay": 0.13, "iterations": 5}
    optimizer = Muon(Muon.Config.parse(given | {"adamw_lr": 1e-9}), model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    factors = [0.3, 1.0, 0.6]
    for factor in factors:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gradients[name].append(parameter.grad)
        optimizer.step(factor)
    matrices = [name for group in optimizer.taken if group.label == "muon" for name in group.names]
    for name in matrices:
        after, start, turned = model.get_parameter(name).detach(), before[name], name.endswith("values")
        for block in range(len(start)) if start.ndim == 3 else [...]:
            twin = plain_twin(start[block], [g[block] for g in gradients[name]], given, factors, turned)
            assert (after[block] - twin).abs().max() < 1e-12, name
    for name in before.keys() - set(matrices):
        assert (model.get_parameter(name) - before[name]).abs().max() < 1e-8, name


def test_many_matrices_at_once_are_the_same_as_one_at_a_time(monkeypatch, generator: torch.Generator):
    ends = []
    for together in (1 << 26, 2000, 1):
        monkeypatch.setattr("transect.train.optimizers._orthogonal.TOGETHER", together)
        model = own_model("sparse/top_k", torch.float64)
        optimizer = Muon(Muon.Config.parse({"lr": 0.01}), model)
        for parameter in model.parameters():
            parameter.grad = torch.cos(torch.arange(parameter.numel(), dtype=torch.float64)).view(parameter.shape)
        optimizer.step(1.0)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    for others in ends[1:]:
        assert all((a - b).abs().max() < 1e-13 for a, b in zip(ends[0], others, strict=True))


@pytest.mark.parametrize(("scale", "theirs"), [("keller", "original"), ("moonlight", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_equals_the_one_of_pytorch(scale, theirs, nesterov, shape, generator: torch.Generator):
    """PyTorch's iterates in bfloat16 only, so products may round in another order: 1 % of the update's size."""
    start = torch.randn(shape, generator=generator)
    own, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [own], "lr": 0.02, "weight_decay": 0.1, "transposed": False}
    ours = Orthogonal([group], 0.95, nesterov, 5, scale, torch.bfloat16)
    pytorch = torch.optim.Muon([other], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=theirs)
    for _ in range(4):
        own.grad = torch.randn(shape, generator=generator)
        other.grad = own.grad.clone()
        ours.step()
        pytorch.step()
    moved = (other - start).norm()
    assert (own - other).norm() < 0.01 * moved
