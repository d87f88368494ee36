"""What every back end owes, through a sparse FFN: planted values, independence of the batch, equality with dense."""

from typing import get_args

import pytest
import torch
from torch.nn import functional

from transect.models.activations import ActivationName
from transect.models.config import ModelConfig
from transect.models.ffn.base import build
from transect.models.ffn.dense import Dense
from transect.models.ffn.sparse import Sparse
from transect.models.memory.backends import MIXES, READS
from transect.models.memory.choice import Picker
from transect.models.memory.memory import Memory

WIDTH, TOKENS = 12, 23

every_backend = pytest.mark.parametrize("backend", MIXES)


def sparse(**settings) -> Sparse:
    settings = {"kind": "sparse", "expansion": 4, "block_size": 8, "active_blocks": 5} | settings
    config = ModelConfig.parse(
        {"vocab_size": 53, "width": WIDTH, "layers": 1, "attention": {"heads": 2}, "ffn": settings}
    )
    made = build(config.layer_configs[0].ffn, config, 0)
    assert isinstance(made, Sparse)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return made.double()


def stream(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


def test_the_setting_names_every_backend():
    named = set(get_args(Sparse.Config.model_fields["backend"].annotation))
    assert named == {"auto", *MIXES} == {"auto", *READS}


@pytest.fixture
def hand_made() -> Memory:
    """The fixture of the specification: width 2, 3 blocks of 2 cells."""
    memory = Memory(2, 3, 2, activation="relu").double()
    keys = [[[1.0, 0], [3, 0]], [[0, 2], [0, 4]], [[-1, -1], [1, 1]]]
    values = [[[1.0, 0], [0, 1]], [[1, 1], [2, 0]], [[0, 2], [1, -1]]]
    with torch.no_grad():
        memory.keys.copy_(torch.tensor(keys))
        memory.values.copy_(torch.tensor(values))
    return memory


@every_backend
@pytest.mark.parametrize(
    ("blocks", "weights", "expected"),
    [
        ([0, 1, 2], [1, 1, 1], (7.5, 2.5)),
        ([0, -1], [1, 1], (1, 3)),
        ([0], [0.574097], (0.574097, 1.722291)),
        ([0], [0.880797], (0.880797, 2.642391)),
        ([1, 0], [1, 1], (6, 4)),
    ],
    ids=["T1 dense", "T3 binary", "T3 softmax", "T3 sigmoid", "T4"],
)
def test_planted_values(backend, blocks, weights, expected, hand_made):
    hand_made.picker = Picker(backend)
    x = torch.tensor([[1, 0.5]], dtype=torch.float64)
    found = hand_made(x, torch.tensor([blocks]), torch.tensor([weights], dtype=torch.float64))
    assert torch.allclose(found, torch.tensor([expected], dtype=torch.float64), atol=1e-6)


@every_backend
@pytest.mark.parametrize("selector", ["avg_k", {"kind": "switch", "gate": "sigmoid"}], ids=["binary", "gate"])
def test_batch_and_order_of_tokens_do_not_matter(backend, selector, generator):
    """T17."""
    ffn = sparse(backend=backend, selector=selector, bias=True)
    x = stream(generator, 1, TOKENS)
    whole = ffn(x, None, None).hidden
    cut = torch.cat([ffn(part, None, None).hidden for part in x.split([1, 7, 15], dim=1)], dim=1)
    order = torch.randperm(TOKENS, generator=generator)
    shuffled = ffn(x[:, order], None, None).hidden
    assert torch.allclose(cut, whole, rtol=0, atol=1e-11)
    assert torch.allclose(shuffled, whole[:, order], rtol=0, atol=1e-11)


@every_backend
@pytest.mark.parametrize("activation", get_args(ActivationName))
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_with_every_block_active_it_is_the_dense_ffn(backend, activation, gated, generator):
    """T6; the dense FFN has the same tables as weights."""
    ffn = sparse(backend=backend, active_blocks=24, activation=activation, gated=gated, bias=True)
    x = stream(generator, 2, 11)
    memory = ffn.memory
    cells = memory.activation(functional.linear(x, memory.keys.flatten(0, 1), memory.key_bias.flatten()))
    if gated:
        cells = cells * functional.linear(x, memory.up.flatten(0, 1), memory.up_bias.flatten())
    dense = cells @ memory.values.flatten(0, 1) + ffn.out_bias
    assert torch.allclose(ffn(x, None, None).hidden, dense, rtol=1e-10, atol=1e-10)


@every_backend
def test_one_block_is_the_dense_ffn(backend, generator):
    """T7."""
    ffn = sparse(backend=backend, expansion=1, block_size=48, active_blocks=1)
    config = ModelConfig.parse({"vocab_size": 5, "width": WIDTH, "layers": 1, "attention": {"heads": 2}})
    dense = Dense(Dense.Config(bias=False), config, 0).double()
    with torch.no_grad():
        dense.up.weight.copy_(ffn.memory.keys[0])
        dense.down.weight.copy_(ffn.memory.values[0].T)
    x = stream(generator, 3, 5)
    assert torch.allclose(ffn(x, None, None).hidden, dense(x, None, None).hidden, rtol=0, atol=1e-11)


@every_backend
def test_coefficients_of_the_selector_give_what_the_memory_would(backend, generator):
    """vanilla_m computes f(x k) itself; the memory given no coefficients must agree, in gradients too."""
    ffn = sparse(backend=backend, selector="vanilla_m", block_size=1, active_blocks=17, bias=True, activation="silu")
    x = stream(generator, TOKENS).requires_grad_()
    chosen = ffn.selector(x, ffn.memory)
    products = torch.einsum("nd,nbd->nb", x, ffn.memory.keys[chosen.blocks, 0])
    coefficients = ffn.memory.activation(products + ffn.memory.key_bias[chosen.blocks, 0])
    given = [x, *ffn.memory.parameters()]
    own = ffn.memory(x, chosen.blocks, chosen.weights)
    other = ffn.memory(x, chosen.blocks, chosen.weights, coefficients)
    assert torch.allclose(own, other, rtol=1e-10, atol=1e-10)
    above = stream(generator, TOKENS)
    for one, two in zip(torch.autograd.grad(own, given, above), torch.autograd.grad(other, given, above), strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-9)
    assert torch.allclose(ffn(x[None], None, None).hidden[0], own + ffn.out_bias, rtol=1e-10, atol=1e-10)


def test_a_gated_memory_has_keys_and_takes_no_coefficients():
    with pytest.raises(ValueError, match="a gated memory needs keys"):
        Memory(WIDTH, 5, 1, gated=True, with_keys=False)
    x, blocks, ones = torch.zeros(3, WIDTH), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(ValueError, match="memories that are not gated"):
        Memory(WIDTH, 5, 1, gated=True)(x, blocks, ones, ones)


@pytest.mark.parametrize("selector", ["avg_k", "vanilla_m", "pkm"])
def test_a_forward_on_meta(selector):
    """The device of shapes alone knows no autocast."""
    cells = {} if selector == "avg_k" else {"block_size": 1, "active_blocks": 17}
    ffn = sparse(selector=selector, backend="reference", **cells).float().to("meta")
    x = torch.empty(2, 5, WIDTH, device="meta")
    assert ffn(x, None, None).hidden.shape == x.shape


@every_backend
@pytest.mark.parametrize("selector", ["lorkm", "pkm", {"kind": "pkm", "pkm_coefficient": "activation"}], ids=str)
def test_selectors_with_keys_of_their_own(backend, selector, generator):
    ffn = sparse(backend=backend, selector=selector, block_size=1, active_blocks=17)
    x = stream(generator, TOKENS).requires_grad_()
    assert ffn.memory.keys is None
    chosen = ffn.selector(x, ffn.memory)
    by_hand = torch.einsum("nb,nb,nbd->nd", chosen.weights, chosen.coefficients, ffn.memory.values[chosen.blocks, 0])
    made = ffn(x[None], None, None).hidden[0]
    assert torch.allclose(made, by_hand, rtol=1e-10, atol=1e-12)
    assert all(
        gradient.abs().sum() > 0 for gradient in torch.autograd.grad(made.square().sum(), [x, *ffn.parameters()])
    )


@every_backend
def test_autocast_makes_products_in_its_type(backend, generator):
    ffn = sparse(backend=backend, bias=True, selector={"kind": "switch"}).float()
    x = stream(generator, 1, TOKENS).float()
    with torch.autocast("cpu", torch.bfloat16):
        made = ffn(x, None, None).hidden
    made.float().square().sum().backward()
    exact = ffn(x, None, None).hidden
    assert ffn.memory.keys.grad.dtype == ffn.memory.keys.dtype == torch.float32
    assert 1e-5 < (made - exact).norm() / exact.norm() < 3e-2
