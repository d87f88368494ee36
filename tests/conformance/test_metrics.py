"""Every declared metric keeps each of its claims, and what it does not claim is really not so."""

import importlib
import inspect
import itertools
import math
import pkgutil

import pytest
import torch

import transect.metrics
from transect.metrics.declare import METRICS

for found in pkgutil.iter_modules(transect.metrics.__path__):
    importlib.import_module(f"transect.metrics.{found.name}")

NAMES = sorted(METRICS)
INVARIANCES = ("scale", "rotate", "rotate_each", "shift", "order")
IMPLIED = {"rotate_each": ("rotate",)}
SAMPLES, WIDTH = 13, 7


def arguments(name: str) -> int:
    """How many tensors the metric takes."""
    parameters = inspect.signature(METRICS[name][0]).parameters.values()
    return sum(parameter.default is inspect.Parameter.empty for parameter in parameters)


def claims(name: str) -> set[str]:
    said = set(METRICS[name][1].invariant)
    said |= {weaker for claim in said for weaker in IMPLIED.get(claim, ())}
    if arguments(name) == 1 and "rotate" in said:
        said.add("rotate_each")  # the same thing for one argument
    return said


def inputs(name: str, generator: torch.Generator) -> list[torch.Tensor]:
    """Samples off the origin, so that no metric is trivial."""
    shape = (arguments(name), SAMPLES, WIDTH)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7)


def orthogonal(generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).Q


def changed(kind: str, tensors: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """The arguments after a change that an invariance speaks of."""
    if kind == "scale":
        return [tensor * factor for tensor, factor in zip(tensors, (3.1, 0.017), strict=False)]
    if kind == "rotate":
        turn = orthogonal(generator)
        return [tensor @ turn for tensor in tensors]
    if kind == "rotate_each":
        return [tensor @ orthogonal(generator) for tensor in tensors]
    if kind == "shift":
        return [tensor + torch.randn(WIDTH, generator=generator, dtype=torch.float64) for tensor in tensors]
    order = torch.randperm(SAMPLES, generator=generator)
    return [tensor[order] for tensor in tensors]


def hard_inputs(generator: torch.Generator) -> list[torch.Tensor]:
    """Equal, opposite and nearly equal vectors, and extreme lengths."""
    plain = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    return [plain, -plain, plain * (1 + 1e-9), plain * 1e-4, plain * 1e8, torch.ones_like(plain) + 1e-6 * plain]


def test_every_module_of_metrics_was_looked_at():
    assert {"displacement", "angular_distance", "block_influence", "update_ratio", "cka", "mean_cosine"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_declaration_is_well_formed(name: str):
    function, declared = METRICS[name]
    assert function.__doc__
    assert declared.unit
    assert declared.range[0] < declared.range[1]
    assert set(declared.invariant) <= set(INVARIANCES)
    assert arguments(name) in (1, 2)
    assert not (declared.symmetric and arguments(name) == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_range(name: str, dtype: torch.dtype, generator: torch.Generator):
    function, declared = METRICS[name]
    # a metric that sums over samples may leave its range by the rounding of that sum
    slack = 16 * torch.finfo(dtype).eps if function(*inputs(name, generator)).ndim == 0 else 0.0
    values = []
    for chosen in itertools.product(hard_inputs(generator), repeat=arguments(name)):
        value = function(*[tensor.to(dtype) for tensor in chosen])
        assert value.dtype == dtype
        assert torch.isfinite(value).all()
        values.append(value.flatten())
    seen = torch.cat(values)
    assert float(seen.min()) >= declared.range[0] - slack
    assert float(seen.max()) <= declared.range[1] + slack
    if math.isfinite(declared.range[1]):  # the upper end is reached, so the range is no wider than the truth
        assert float(seen.max()) == pytest.approx(declared.range[1], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if arguments(name) == 2])
def test_symmetry(name: str, generator: torch.Generator):
    function, declared = METRICS[name]
    left, right = inputs(name, generator)
    same = torch.allclose(function(left, right), function(right, left), rtol=1e-12, atol=1e-14)
    assert same is declared.symmetric


@pytest.mark.parametrize("kind", INVARIANCES)
@pytest.mark.parametrize("name", NAMES)
def test_invariance_holds_exactly_where_it_is_claimed(name: str, kind: str, generator: torch.Generator):
    function = METRICS[name][0]
    tensors = inputs(name, generator)
    before, after = function(*tensors), function(*changed(kind, tensors, generator))
    if kind in claims(name):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)
    else:
        assert float((after - before).abs().max()) > 1e-3
