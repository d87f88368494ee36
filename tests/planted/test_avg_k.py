"""The worked examples of the Avg-K paper's specification, by number, with a memory small enough to do by hand."""

import math

import pytest
import torch
from torch import Tensor

from transect import registry
from transect.models.memory.memory import Memory
from transect.models.selectors._balance import balance_loss, counts, load_statistics
from transect.models.selectors._capacity import within_capacity
from transect.models.selectors._product_keys import best_pairs
from transect.models.selectors.base import Selection, Selector, Shape

KEYS = [[[1, 0], [3, 0]], [[0, 2], [0, 4]], [[-1, -1], [1, 1]]]
VALUES = [[[1, 0], [0, 1]], [[1, 1], [2, 0]], [[0, 2], [1, -1]]]
X = torch.tensor([[1.0, 0.5]], dtype=torch.float64)


def selector(kind: str, shape: Shape, **options) -> Selector:
    rule = registry.load("transect.models.selectors", kind, Selector)
    return rule(rule.Config.parse({"kind": kind, **options}), shape).double()


def fixture(block_size: int = 2) -> Memory:
    """Fixture F: three blocks of two cells (or six of one, or one of six), ReLU."""
    memory = Memory(2, 6 // block_size, block_size, activation="relu").double()
    for table, numbers in ((memory.keys, KEYS), (memory.values, VALUES)):
        table.data.copy_(torch.tensor(numbers).reshape(table.shape))
    return memory


def chosen(kind: str, active: int, block_size: int = 2, **options) -> tuple[Selection, Tensor]:
    """What a selector picks for x in fixture F, and the FFN's output."""
    memory = fixture(block_size)
    shape = Shape(2, memory.blocks, block_size, active, 11, 0)
    found = selector(kind, shape, **options)(X, memory)
    return found, memory(X, found.blocks, found.weights, found.coefficients)


def close(found: Tensor, wanted: list) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), atol=1e-6, rtol=0)


def test_t1_dense() -> None:
    memory = fixture()
    before = X @ memory.keys.flatten(0, 1).t()
    close(before, [[1, 3, 1, 2, -1.5, 1.5]])
    close(before.relu() @ memory.values.flatten(0, 1), [[7.5, 2.5]])


def test_t2_scores_are_the_blocks_mean_pre_activations() -> None:
    close(fixture().keys.mean(1), [[2, 0], [0, 3], [0, 0]])
    found, _ = chosen("avg_k", 1)
    close(found.scores, [[2, 1.5, 0]])
    close(found.scores, [[(1 + 3) / 2, (1 + 2) / 2, (-1.5 + 1.5) / 2]])


@pytest.mark.parametrize(
    ("gate", "weight", "output"),
    [
        ("binary", 1, [1, 3]),
        ("softmax_all", 0.574097, [0.574097, 1.722291]),
        ("sigmoid", 0.880797, [0.880797, 2.642391]),
        ("softmax_kept", 1, [1, 3]),
        ("straight_through", 1, [1, 3]),
    ],
)
def test_t3_one_block(gate: str, weight: float, output: list[float]) -> None:
    found, y = chosen("avg_k", 1, gate=gate)
    assert found.blocks.tolist() == [[0]]
    close(found.weights, [[weight]])
    close(y, [output])


@pytest.mark.parametrize(
    ("gate", "scale", "weights"),
    [
        ("binary", "none", [1, 1]),
        ("softmax_kept", "none", [0.622459, 0.377541]),
        ("softmax_all", "none", [0.574097, 0.348207]),
        ("softmax_kept", "times_b", [1.244919, 0.755081]),
        ("softmax_all", "times_B", [1.722291, 1.044622]),
    ],
)
def test_t4_two_blocks(gate: str, scale: str, weights: list[float]) -> None:
    found, y = chosen("avg_k", 2, gate=gate, gate_scale=scale)
    assert found.blocks.tolist() == [[0, 1]]
    close(found.weights, [weights])
    first, second = found.weights[0].tolist()
    close(y, [[first + 5 * second, 3 * first + second]])
    if gate == "binary":
        close(y, [[6, 4]])


def test_t5_direct_selection_is_not_indirect_selection() -> None:
    found, y = chosen("vanilla_m", 2, block_size=1)
    assert sorted(found.blocks[0].tolist()) == [1, 3]
    close(y, [[4, 3]])
    close(found.coefficients, [[3, 2]])


@pytest.mark.parametrize("kind", ["avg_k", "random_router", "pkm_ffn", "vanilla_m", "rand_hash"])
def test_t6_everything_active_is_the_dense_ffn(kind: str) -> None:
    memory = fixture(1)
    found = selector(kind, Shape(2, 6, 1, 6, 11, 0))(X, memory, torch.tensor([7]))
    close(memory(X, found.blocks, found.weights, found.coefficients), [[7.5, 2.5]])


def test_t7_one_block_is_the_dense_ffn() -> None:
    found, y = chosen("avg_k", 1, block_size=6)
    close(y, [[7.5, 2.5]])
    assert (
        "entropy" not in found.stats and "margin" not in found.stats
    )  # one block: nothing to be uneven, none left out


@pytest.mark.parametrize(
    ("count", "pairs", "scores", "weights"),
    [
        (2, [(0, 0), (0, 1)], [5, 4.5], [0.622459, 0.377541]),
        (3, [(0, 0), (0, 1), (1, 0)], [5, 4.5, 3], [0.574097, 0.348207, 0.077696]),
    ],
)
def test_t8_product_keys(count: int, pairs: list, scores: list, weights: list) -> None:
    found = best_pairs(torch.tensor([[3.0, 1, 0]]), torch.tensor([[2, 1.5, -1]]), count)
    assert [divmod(cell, 3) for cell in found.cells[0].tolist()] == pairs
    close(found.scores, [scores])
    close(found.scores.softmax(-1), [weights])


P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])


def test_t9_balance_loss() -> None:
    load = counts(P.argmax(1, keepdim=True), 2)
    close(load / load.sum(), [0.75, 0.25])
    close(P.mean(0), [0.65, 0.35])
    close(balance_loss(load, P.mean(0)), 1.15)
    close(balance_loss(torch.tensor([3, 5, 0]), torch.full((3,), 1 / 3)), 1)
    close(balance_loss(torch.tensor([0, 9, 0, 0]), torch.tensor([0.0, 1, 0, 0])), 4)


def test_t9_balance_loss_of_a_router() -> None:
    memory = Memory(2, 2, 3)
    switch = selector("switch", Shape(2, 2, 3, 1, 11, 0)).float()
    switch.router.weight.data.copy_(torch.eye(2))
    found = switch(P.log(), memory)
    close(found.losses["balance"], 1.15)
    close(found.weights, [[0.9], [0.8], [0.6], [0.7]])
    close(found.stats["load"], [0.75, 0.25])


def test_t10_capacity() -> None:
    blocks, kept = P.argmax(1, keepdim=True), P.max(1, keepdim=True).values
    everything = torch.ones(4, 1, dtype=torch.bool)
    assert within_capacity(blocks, kept, everything, 1.0, 2, "order").tolist() == [[True], [True], [False], [True]]
    memory = Memory(2, 2, 3)
    switch = selector("switch", Shape(2, 2, 3, 1, 11, 0), capacity=1.0).float()
    switch.router.weight.data.copy_(torch.eye(2))
    found = switch(P.log(), memory)
    assert found.blocks.tolist() == [[0], [0], [-1], [1]]
    assert found.weights[2].tolist() == [0]
    assert found.stats["drop_fraction"] == 0.25
    close(found.stats["load"], [0.75, 0.25])  # what was chosen, so that balance is judged before drops
    assert memory(P, found.blocks, found.weights)[2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("load", "used", "entropy", "largest"), [([2, 1, 1, 0], 0.75, 0.75, 2), ([0, 7, 0, 0], 0.25, 0, 4)]
)
def test_t11_statistics(load: list[int], used: float, entropy: float, largest: float) -> None:
    found = load_statistics(torch.tensor(load))
    close(found["load"], [n / sum(load) for n in load])
    close(found["used_share"], used)
    close(found["entropy"], entropy)
    close(found["largest_load"], largest)
    assert found["pairs"] == sum(load)


def test_t12_hash() -> None:
    def table(layer: int, **options) -> Tensor:
        return selector("rand_hash", Shape(2, 13, 2, 5, 211, layer), **options).table

    first = table(0)
    assert torch.equal(first, table(0))
    assert all(len(set(row)) == 5 and set(row) <= set(range(13)) for row in first.tolist())
    assert not torch.equal(first, table(1))
    assert not torch.equal(first, table(0, seed=1))
    assert torch.equal(table(0, hash_per_layer=False), table(1, hash_per_layer=False))
    rule = selector("rand_hash", Shape(2, 13, 2, 5, 211, 0))
    ids = torch.arange(211)
    here, there = (rule(torch.randn(211, 2), fixture(), ids).blocks for _ in range(2))
    assert torch.equal(here, there) and torch.equal(here, first.long())


def gradients(kind: str, **options) -> tuple[Memory, Selector]:
    memory, x = fixture(), X.repeat(3, 1)
    rule = selector(kind, Shape(2, 3, 2, 1, 11, 0), **options)
    found = rule(x, memory)
    memory(x, found.blocks, found.weights).square().sum().backward()
    return memory, rule


def test_t13_binary_avg_k_trains_only_the_keys_it_reads() -> None:
    memory, _ = gradients("avg_k")
    assert memory.keys.grad[0].abs().sum() > 0
    assert memory.keys.grad[1:].abs().sum() == 0


@pytest.mark.parametrize("gate", ["softmax_all", "straight_through"])
def test_t13_softmax_over_all_blocks_trains_every_key(gate: str) -> None:
    memory, _ = gradients("avg_k", gate=gate)
    assert bool((memory.keys.grad.abs().sum(-1) > 0).all())
    stopped, _ = gradients("avg_k", gate=gate, score_grad="stop")
    assert stopped.keys.grad[1:].abs().sum() == 0


def test_t13_a_learned_router_with_binary_gate_learns_nothing() -> None:
    _, rule = gradients("switch", gate="binary", balance=0)
    assert rule.router.weight.grad is None
    _, rule = gradients("switch", gate="straight_through", balance=0)
    assert rule.router.weight.grad.abs().sum() > 0
    _, rule = gradients("random_router", gate="softmax_all")
    assert rule.router.weight.grad is None


def test_a_random_router_stays_frozen_when_everything_is_made_trainable() -> None:
    memory = fixture()
    rule = selector("random_router", Shape(2, 3, 2, 1, 11, 0), gate="softmax_all").requires_grad_(True)
    x = X.clone().requires_grad_(True)
    rule(x, memory).weights.sum().backward()
    assert rule.router.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_cea_t14_softmax_over_one_kept_score_gives_no_gradient() -> None:
    _, rule = gradients("switch", gate="softmax_kept", balance=0)
    assert rule.router.weight.grad.abs().sum() == 0
    _, rule = gradients("switch", gate="softmax_all", balance=0)
    assert rule.router.weight.grad.abs().sum() > 0
    _, rule = gradients("top_k", normalise=True, balance=0)
    assert rule.router.weight.grad.abs().max() < 1e-12  # a / a is 1 but for rounding
    _, rule = gradients("top_k", normalise=False, balance=0)
    assert rule.router.weight.grad.abs().sum() > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "total"),
    [
        # beside the active cells' own 4 d k; d = 1024, k = 4 d
        ("avg_k", {}, lambda d, k, cells, blocks: 4 * d * k + 2 * d * blocks),
        ("switch", {}, lambda d, k, cells, blocks: 4 * d * k + 2 * d * blocks),
        ("rand_hash", {}, lambda d, k, cells, blocks: 4 * d * k),
        ("avg_k", {"block_score": "mean_activation"}, lambda d, k, cells, blocks: 4 * d * k + 2 * d * cells),
    ],
)
def test_t15_flops_of_blocks(kind: str, options: dict, total) -> None:
    d, k, g = 1024, 4096, 64
    cells = 16 * 4 * d
    rule = registry.load("transect.models.selectors", kind, Selector)
    with torch.device("meta"):
        made = rule(rule.Config.parse({"kind": kind, **options}), Shape(d, cells // g, g, k // g, 11, 0))
    assert 4 * d * k + made.flops() == total(d, k, cells, cells // g)
    if kind == "avg_k" and not options:
        assert made.flops() / (4 * d * k) == 0.125


def test_t15_flops_of_cells() -> None:
    d, k, cells = 1024, 4096, 16 * 4096
    names = ("vanilla_m", "lorkm", "pkm", "pkm_ffn")
    with torch.device("meta"):
        kinds = {kind: registry.load("transect.models.selectors", kind, Selector) for kind in names}
        made = {kind: rule(rule.Config(), Shape(d, cells, 1, k, 11, 0)).flops() for kind, rule in kinds.items()}
    assert (4 * d * k + made["vanilla_m"]) / (4 * d * k) == 8.5
    assert made["lorkm"] == 2 * (d * 128 + 128 * cells)
    adds = sum(min(256, (k + 1) // i) for i in range(1, 257))  # the grid is 256 x 256
    assert made["pkm"] == 2 * d * 512 + 512 * (256 + 256) + adds
    assert made["pkm_ffn"] == made["pkm"]


def test_t16_permuting_cells_and_scaling_a_key() -> None:
    torch.manual_seed(16)
    memory, x = Memory(7, 5, 3).double(), torch.randn(23, 7, dtype=torch.float64)
    rule = selector("avg_k", Shape(7, 5, 3, 2, 11, 0))
    before = rule(x, memory).scores
    permuted = Memory(7, 5, 3).double()
    permuted.keys.data.copy_(torch.stack([block[torch.randperm(3)] for block in memory.keys.data]))
    torch.testing.assert_close(rule(x, permuted).scores, before, atol=1e-12, rtol=0)
    permuted.keys.data.copy_(memory.keys.data.flatten(0, 1).roll(1, 0).view(5, 3, 7))
    assert (rule(x, permuted).scores - before).abs().max() > 1e-3
    memory.keys.data[2, 1] *= 4
    moved = rule(x, memory).scores - before
    torch.testing.assert_close(moved[:, 2], 3 / 3 * (x @ memory.keys.data[2, 1]) / 4, atol=1e-12, rtol=0)
    assert moved[:, [0, 1, 3, 4]].abs().max() == 0


def test_a_collapsed_router_pays_the_number_of_blocks() -> None:
    rule = selector("switch", Shape(3, 5, 2, 1, 11, 0))
    rule.router.weight.data.zero_()
    rule.router.weight.data[3] = 200
    found = rule(torch.rand(17, 3, dtype=torch.float64) + 1, Memory(3, 5, 2).double())
    close(found.losses["balance"], 5)
    assert found.stats["used_share"] == pytest.approx(0.2)
    assert found.stats["largest_load"] == pytest.approx(5)


def test_z_loss_is_the_squared_log_partition() -> None:
    rule = selector("switch", Shape(2, 4, 2, 1, 11, 0), z_loss=1e-3)
    rule.router.weight.data.zero_()
    found = rule(X, Memory(2, 4, 2).double())
    close(found.losses["z_loss"], math.log(4) ** 2)
    assert rule.config.loss_weights() == {"balance": 0.01, "z_loss": 1e-3}
