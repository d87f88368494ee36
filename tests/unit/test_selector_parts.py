"""Parts and options of the selectors that the paper's worked examples leave open."""

import math

import pytest
import torch
from torch import Tensor

from copies import Copies
from transect import registry
from transect.errors import InputError
from transect.models.memory.memory import Memory
from transect.models.plug import Unfit
from transect.models.selectors._balance import load_statistics, statistics
from transect.models.selectors._capacity import within_capacity
from transect.models.selectors._product_keys import _staircase, best_pairs, grid, log_partition, pair_odds
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Selector, Shape

WIDTH, BLOCKS, SIZE, ACTIVE, VOCAB, TOKENS = 11, 13, 3, 5, 211, 17


def made(kind: str, shape: Shape | None = None, **options) -> Selector:
    rule = registry.load("transect.models.selectors", kind, Selector)
    return rule(rule.Config.parse({"kind": kind, **options}), shape or Shape(WIDTH, BLOCKS, SIZE, ACTIVE, VOCAB, 0))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def brute_best(scores: Tensor, count: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda i: (-row[i], i))[:count] for row in scores.tolist()]


# --- the best of a row ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 31])
def test_best_of_a_row_with_many_ties(dtype: torch.dtype, count: int) -> None:
    scores = (2 * noise(53, 31)).round().to(dtype) / 2
    scores[0], scores[1] = 0, -0.0
    scores[2, ::2], scores[2, 1::2] = 0.0, -0.0
    found = best(scores, count)
    assert found.indices.tolist() == brute_best(scores, count)
    if count == 31:
        assert found.margin is None
    else:
        ordered = scores.sort(descending=True).values
        torch.testing.assert_close(found.margin.to(dtype), ordered[:, count - 1] - ordered[:, count])


def test_best_of_a_row_at_the_ends_of_the_numbers() -> None:
    inf = float("inf")
    scores = torch.tensor([[-inf, 1e-45, inf, -1e-45, 0.0, -3e38, 3e38, inf, -inf]])
    assert best(scores, 8).indices.tolist() == brute_best(scores, 8)


def test_best_of_more_rows_than_are_held_at_a_time() -> None:
    scores = noise(2003, 131).mul(4).round()
    assert best(scores, 17).indices.tolist() == brute_best(scores, 17)
    assert best(scores[:0], 17).indices.shape == (0, 17)


def test_labels_stand_in_place_of_indices() -> None:
    scores, labels = torch.zeros(2, 5), torch.tensor([[9, 4, 7, 1, 3], [5, 6, 2, 8, 0]])
    for dtype in (torch.float32, torch.float64):
        assert best(scores.to(dtype), 3, labels).indices.tolist() == [[1, 3, 4], [0, 2, 5]]


# --- product keys ---


@pytest.mark.parametrize(("first", "second"), [(1, 13), (5, 7), (13, 13), (17, 3)])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("ties", [False, True])
def test_product_keys_equal_brute_force(first: int, second: int, count: int, ties: bool) -> None:
    left, right = noise(29, first, seed=1, dtype=torch.float64), noise(29, second, seed=2, dtype=torch.float64)
    if ties:
        left, right = left.round(), right.round()
    every = (left[:, :, None] + right[:, None, :]).flatten(1)
    found = best_pairs(left, right, count)
    assert found.cells.tolist() == brute_best(every, count)
    torch.testing.assert_close(found.scores, every.gather(1, found.cells), rtol=0, atol=0)
    ordered = every.sort(descending=True).values
    if count < first * second:
        torch.testing.assert_close(found.margin, ordered[:, count - 1] - ordered[:, count])


def test_odds_of_product_keys_are_those_of_softmax_over_all_pairs() -> None:
    left, right = noise(7, 3, dtype=torch.float64), noise(7, 5, seed=1, dtype=torch.float64)
    real = torch.arange(7) % 3 != 0
    every = (left[:, :, None] + right[:, None, :]).flatten(1)
    found = pair_odds(left, right, real)
    torch.testing.assert_close(found.probability, every.softmax(-1)[real].mean(0))
    torch.testing.assert_close(log_partition(left, right), every.logsumexp(-1))


@pytest.mark.parametrize(("cells", "sides"), [(12, (3, 4)), (49, (7, 7)), (13, (1, 13)), (12288, (96, 128))])
def test_grid_of_product_keys(cells: int, sides: tuple[int, int]) -> None:
    assert grid(cells) == sides


def test_pkm_uses_both_halves_and_either_coefficient() -> None:
    memory = Memory(8, 15, 1, activation="relu", with_keys=False)
    x = noise(TOKENS, 8)
    for option in ("softmax_kept", "activation"):
        rule = made("pkm", Shape(8, 15, 1, 4, VOCAB, 0), pkm_dim=6, pkm_coefficient=option)
        query = rule.keys.query(x)
        every = (query[:, :3] @ rule.keys.first.t())[:, :, None] + (query[:, 3:] @ rule.keys.second.t())[:, None]
        kept = every.flatten(1).topk(4)
        found = rule(x, memory)
        assert found.blocks.tolist() == kept.indices.tolist()
        wanted = kept.values.softmax(-1) if option == "softmax_kept" else kept.values.relu()
        torch.testing.assert_close(found.coefficients, wanted)
        assert bool((found.weights == 1).all())


@pytest.mark.parametrize(
    ("gate", "scale", "factor"),
    [
        ("softmax_all", "none", 1),
        ("softmax_all", "times_B", 15),
        ("softmax_kept", "times_b", 4),
        ("sigmoid", "none", 1),
    ],
)
def test_gates_of_pkm_ffn_are_those_of_all_pairs(gate: str, scale: str, factor: int) -> None:
    rule = made("pkm_ffn", Shape(8, 15, 1, 4, VOCAB, 0), pkm_dim=6, gate=gate, gate_scale=scale)
    for half in (rule.keys.first, rule.keys.second):
        half.data.copy_(noise(*half.shape))  # the first scores would be nearly equal
    x = noise(TOKENS, 8)
    first, second = rule.keys(x)
    every = (first[:, :, None] + second[:, None]).flatten(1)
    kept = every.topk(4)
    weights = {
        "softmax_all": every.softmax(-1).gather(1, kept.indices),
        "softmax_kept": kept.values.softmax(-1),
        "sigmoid": kept.values.sigmoid(),
    }[gate]
    found = rule(x, Memory(8, 15, 1))
    assert found.blocks.tolist() == kept.indices.tolist()
    torch.testing.assert_close(found.weights, factor * weights)


def test_lorkm_scores_with_the_product_of_two_thin_maps() -> None:
    memory = Memory(WIDTH, BLOCKS, 1, with_keys=False)
    rule = made("lorkm", Shape(WIDTH, BLOCKS, 1, ACTIVE, VOCAB, 0), lork_rank=2)
    x = noise(TOKENS, WIDTH)
    scores = x @ rule.project.weight.t() @ rule.keys.weight.t()
    found = rule(x, memory)
    torch.testing.assert_close(found.scores, scores)
    torch.testing.assert_close(found.coefficients, torch.nn.functional.gelu(scores.topk(ACTIVE).values))
    assert made("lorkm", Shape(64, BLOCKS, 1, ACTIVE, VOCAB, 0)).rank == 8


# --- scores from the key table ---


def test_block_scores() -> None:
    memory = Memory(WIDTH, BLOCKS, SIZE, bias=True).double()
    memory.key_bias.data.normal_()
    x = noise(TOKENS, WIDTH, dtype=torch.float64)
    keys, bias = memory.keys, memory.key_bias

    def scores(**options) -> Tensor:
        return made("avg_k", **options).double()(x, memory).scores

    before = torch.einsum("nd,bgd->nbg", x, keys)
    torch.testing.assert_close(scores(), before.mean(-1))
    torch.testing.assert_close(scores(score_bias=True), (before + bias).mean(-1))
    torch.testing.assert_close(scores(block_score="mean_activation"), torch.nn.functional.gelu(before).mean(-1))
    with_bias = torch.nn.functional.gelu(before + bias).mean(-1)
    torch.testing.assert_close(scores(block_score="mean_activation", score_bias=True), with_bias)
    largest = keys.norm(dim=-1).argmax(-1)
    torch.testing.assert_close(
        scores(block_score="max_norm_key"), before.gather(2, largest.expand(TOKENS, -1)[..., None])[..., 0]
    )
    torch.testing.assert_close(scores(normalise_keys=True), (before / keys.norm(dim=-1)).mean(-1))
    drawn = scores(block_score="random_key")
    matches = (before - drawn[..., None]).abs().amax(0) < 1e-12
    assert bool((matches.sum(-1) == 1).all())
    assert len(set(matches.int().argmax(-1).tolist())) > 1  # not the same place in every block
    torch.testing.assert_close(drawn, scores(block_score="random_key"))
    assert (drawn - scores(block_score="random_key", seed=1)).abs().max() > 1e-3


def test_drawn_cells_differ_from_layer_to_layer() -> None:
    def drawn(layer: int) -> Tensor:
        return made("avg_k", Shape(WIDTH, BLOCKS, SIZE, ACTIVE, VOCAB, layer), block_score="random_key").drawn

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_vanilla_ranks_by_what_it_is_told() -> None:
    """With GELU -3 has the smaller pre-activation but the larger coefficient than -0.75, and -0.75 the larger size."""
    memory = Memory(1, 3, 1)
    memory.keys.data.copy_(torch.tensor([-3.0, -0.75, 0.1])[:, None, None])
    x = torch.ones(1, 1)
    picked = {
        by: made("vanilla_m", Shape(1, 3, 1, 2, VOCAB, 0), rank_by=by)(x, memory).blocks.tolist()
        for by in ("preactivation", "coefficient", "abs_coefficient")
    }
    assert picked == {"preactivation": [[2, 1]], "coefficient": [[2, 0]], "abs_coefficient": [[1, 2]]}


def test_vanilla_leaves_gated_cells_and_noisy_ones_to_the_memory() -> None:
    shape, x = Shape(WIDTH, BLOCKS, 1, ACTIVE, VOCAB, 0, gated=True), noise(TOKENS, WIDTH)
    gated = made("vanilla_m", shape)
    assert gated(x, Memory(WIDTH, BLOCKS, 1, gated=True)).coefficients is None
    assert gated.flops() == 2 * WIDTH * BLOCKS
    noisy, plain = made("vanilla_m", shape, router_noise=0.1), Memory(WIDTH, BLOCKS, 1, bias=True)
    plain.key_bias.data.normal_()
    assert noisy(x, plain).coefficients is None
    found = noisy.eval()(x, plain)
    apart = plain(x, found.blocks, found.weights)
    torch.testing.assert_close(plain(x, found.blocks, found.weights, found.coefficients), apart)


# --- routers ---


def test_noise_is_in_training_only() -> None:
    rule, memory, x = made("switch", router_noise=0.5), Memory(WIDTH, BLOCKS, SIZE), noise(TOKENS, WIDTH)
    torch.manual_seed(0)
    first, second = rule(x, memory).scores, rule(x, memory).scores
    assert (first - second).abs().max() > 1e-3
    rule.eval()
    torch.testing.assert_close(rule(x, memory).scores, x @ rule.router.weight.t())
    rule.train()
    rule.router.weight.data.copy_(torch.eye(BLOCKS, WIDTH))
    ratio = rule(torch.ones(997, WIDTH), memory).scores[:, :WIDTH]
    assert 0.5 <= ratio.min() < 0.51 and 1.49 < ratio.max() <= 1.5


@pytest.mark.parametrize("kind", ["switch", "top_k", "gshard", "bias_balanced", "random_router"])
def test_routers_stay_in_float32_under_autocast_and_in_bfloat16(kind: str) -> None:
    rule, memory = made(kind, Shape(WIDTH, BLOCKS, SIZE, 2, VOCAB, 0)), Memory(WIDTH, BLOCKS, SIZE)
    x = noise(TOKENS, WIDTH)
    wanted = rule.eval()(x, memory)
    with torch.autocast("cpu", torch.bfloat16):
        found = rule(x, memory)
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.scores, wanted.scores)
    half = rule.bfloat16()(x.bfloat16(), memory.bfloat16())
    assert half.scores.dtype == half.weights.dtype == torch.float32


FROM_KEYS = [
    ("avg_k", {}),
    ("avg_k", {"normalise_keys": True, "score_bias": True}),
    ("avg_k", {"block_score": "max_norm_key"}),
    ("avg_k", {"block_score": "random_key"}),
    ("lorkm", {"balance": 0.1}),
    ("pkm", {"balance": 0.1}),
    ("pkm_ffn", {"balance": 0.1}),
]


@pytest.mark.parametrize(("kind", "options"), FROM_KEYS, ids=str)
def test_scores_of_keys_have_as_many_digits_as_those_of_routers(kind: str, options: dict) -> None:
    """Close scores, as keys of a fresh model give them: bfloat16 would make many of them equal."""
    size = SIZE if kind == "avg_k" else 1
    rule = made(kind, Shape(64, 503, size, 11, VOCAB, 0), **options).eval()
    memory = Memory(64, 503, size, bias=True)
    torch.nn.init.normal_(memory.key_bias)
    x = noise(101, 64)
    wanted = rule(x, memory)
    with torch.autocast("cpu", torch.bfloat16):
        found = rule(x, memory)
    assert torch.equal(found.blocks, wanted.blocks)
    assert found.losses == wanted.losses
    if wanted.scores is not None:
        assert torch.equal(found.scores, wanted.scores)
    half = rule.bfloat16()(x.bfloat16(), memory.bfloat16())
    assert half.scores is None or half.scores.dtype == torch.float32
    assert half.coefficients is None or half.coefficients.dtype == torch.float32


@pytest.mark.parametrize(("first", "second", "count"), [(1, 1, 1), (3, 5, 4), (5, 3, 15), (16, 16, 65), (7, 2, 9)])
def test_the_staircase_of_pairs_is_made_where_it_is_used(first: int, second: int, count: int) -> None:
    i, j = _staircase(first, second, count, torch.device("cpu"))
    pairs = [(i, j) for i in range(first) for j in range(second) if (i + 1) * (j + 1) <= count]
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == pairs
    with Copies() as seen:
        _staircase(first, second, count, torch.device("meta"))
    assert not seen.copies


@pytest.mark.parametrize(
    ("blocks", "groups", "active_groups", "active", "scale"), [(12, 3, 2, 4, 2.5), (16, 8, 4, 8, 1.0)]
)
def test_bias_balanced_equals_the_router_of_deepseek_v3(
    blocks: int, groups: int, active_groups: int, active: int, scale: float
) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=WIDTH,
            n_routed_experts=blocks,
            num_experts_per_tok=active,
            n_group=groups,
            topk_group=active_groups,
            routed_scaling_factor=scale,
            norm_topk_prob=True,
        )
    )
    theirs.weight.data.copy_(noise(blocks, WIDTH))
    theirs.e_score_correction_bias.copy_(noise(blocks, seed=1) / 3)
    shape = Shape(WIDTH, blocks, SIZE, active, VOCAB, 0)
    ours = made("bias_balanced", shape, scale=scale, groups=groups, active_groups=active_groups)
    ours.router.weight.data.copy_(theirs.weight)
    ours.bias.copy_(theirs.e_score_correction_bias)
    x = noise(101, WIDTH, seed=2)
    _, weights, experts = theirs(x)
    found = ours(x, Memory(WIDTH, blocks, SIZE))
    order, place = found.blocks.sort(1), experts.sort(1)
    assert torch.equal(order.values, place.values)
    torch.testing.assert_close(found.weights.gather(1, order.indices), weights.gather(1, place.indices))
    used = found.blocks.div(blocks // groups, rounding_mode="floor")
    assert all(len(set(row)) <= active_groups for row in used.tolist())
    ours.bias.zero_()
    assert not torch.equal(ours(x, Memory(WIDTH, blocks, SIZE)).blocks.sort(1).values, order.values)  # it mattered


def test_top_k_equals_mixtral_and_olmoe() -> None:
    x, memory = noise(TOKENS, WIDTH), Memory(WIDTH, BLOCKS, SIZE)
    for normalise in (True, False):
        rule = made("top_k", normalise=normalise)
        values, indices = (x @ rule.router.weight.t()).softmax(-1).topk(ACTIVE)
        found = rule(x, memory)
        assert torch.equal(found.blocks, indices)
        torch.testing.assert_close(found.weights, values / values.sum(-1, keepdim=True) if normalise else values)


def test_sigmoid_balance_loss_counts_normalised_affinities() -> None:
    rule, memory = made("top_k", scores="sigmoid", balance=0.1), Memory(WIDTH, BLOCKS, SIZE)
    rule.router.weight.data.zero_()
    assert rule(noise(TOKENS, WIDTH), memory).losses["balance"].item() == pytest.approx(1)


# --- bias balancing ---


def test_rebalance_follows_the_published_rule() -> None:
    rule = made("bias_balanced", Shape(WIDTH, 4, SIZE, 1, VOCAB, 0), rate=0.5)
    rule.rebalance(torch.tensor([6, 1, 1, 0]))  # mean 2
    assert rule.bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    rule.rebalance(torch.tensor([0.25, 0.25, 0.5, 0.0]))  # shares do as well; at the mean nothing moves
    assert rule.bias.tolist() == [-0.5, 0.5, 0.0, 1.0]
    centred = made("bias_balanced", Shape(WIDTH, 4, SIZE, 1, VOCAB, 0), rate=0.5, centred=True)
    centred.rebalance(torch.tensor([6, 1, 1, 0]))
    assert centred.bias.tolist() == [-0.75, 0.25, 0.25, 0.25]
    assert "bias" in rule.state_dict() and not any(name == "bias" for name, _ in rule.named_parameters())


def test_rebalance_brings_a_skewed_router_to_balance() -> None:
    """Planted: every token prefers blocks 0 and 1 by far; the bias alone must spread the load over all eight."""
    rule, memory = made("bias_balanced", Shape(WIDTH, 8, SIZE, 2, VOCAB, 0), rate=0.01), Memory(WIDTH, 8, SIZE)
    rule.router.weight.data.copy_(noise(8, WIDTH) / 3)
    rule.router.weight.data[:, 0] = torch.tensor([2.0, 2, 0, 0, 0, 0, -1, -1])
    stream = torch.Generator().manual_seed(5)

    def batch() -> Selection:
        x = torch.randn(512, WIDTH, generator=stream)
        x[:, 0] = 1.5
        return rule(x, memory)

    start = batch()
    assert start.stats["largest_load"] > 3
    loads = []
    for _ in range(300):
        found = batch()
        rule.rebalance(found.stats["load"] * found.stats["pairs"])
        loads.append(found.stats["load"])
    late = 8 * torch.stack(loads[-50:]).mean(0)
    assert late.min() > 0.95 and late.max() < 1.05
    torch.testing.assert_close(found.weights.sum(1), torch.ones(512))  # unbiased affinities, normalised
    assert rule.bias[0] < -0.1 and rule.bias[7] > 0.1


def test_small_steps_of_the_bias_are_not_lost_in_a_bfloat16_model() -> None:
    rule = made("bias_balanced", Shape(WIDTH, 2, SIZE, 1, VOCAB, 0), rate=0.001).bfloat16()
    for _ in range(1000):
        rule.rebalance(torch.tensor([3, 1]))
    torch.testing.assert_close(rule.bias, torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-3)


def test_weights_do_not_know_the_bias() -> None:
    rule, memory, x = made("bias_balanced", normalise=False), Memory(WIDTH, BLOCKS, SIZE), noise(TOKENS, WIDTH)
    rule.bias[3] = 100.0
    found = rule(x, memory)
    assert bool((found.blocks[:, 0] == 3).all())
    torch.testing.assert_close(found.weights[:, 0], (x @ rule.router.weight.t()).sigmoid()[:, 3])


# --- capacity ---


def brute_capacity(blocks: Tensor, scores: Tensor, wanted: Tensor, room: int, drop: str) -> list[list[bool]]:
    tokens, active = blocks.shape
    pairs = [(n, s) for n in range(tokens) for s in range(active)]
    if drop == "choice":
        pairs.sort(key=lambda pair: pair[1])
    if drop == "score":
        pairs.sort(key=lambda pair: -scores[pair].item())
    kept, taken = torch.zeros_like(wanted), {}
    for pair in pairs:
        block = int(blocks[pair])
        if wanted[pair] and taken.get(block, 0) < room:
            kept[pair], taken[block] = True, taken.get(block, 0) + 1
    return kept.tolist()


def test_a_capacity_loses_no_token_to_rounding() -> None:
    blocks = torch.zeros(200, 1, dtype=torch.long)
    everything = torch.ones(200, 1, dtype=torch.bool)
    assert int(within_capacity(blocks, blocks.double(), everything, 1.15, 2, "order").sum()) == 115


@pytest.mark.parametrize("drop", ["order", "choice", "score"])
@pytest.mark.parametrize("factor", [1.0, 1.3, 20.0])
def test_capacity_equals_a_plain_loop(drop: str, factor: float) -> None:
    scores = noise(41, 7).mul(2).round()
    scores[:, :3] += 1
    blocks = best(scores, 3).indices
    kept_scores = scores.gather(1, blocks)
    wanted = torch.ones_like(blocks, dtype=torch.bool)
    wanted[5], wanted[11], wanted[2, 1] = False, False, False
    room = int(factor * math.ceil(39 * 3 / 7))
    found = within_capacity(blocks, kept_scores, wanted, factor, 7, drop)
    assert found.tolist() == brute_capacity(blocks, kept_scores, wanted, room, drop)
    assert (found.sum() < wanted.sum()) == (factor < 20)


def test_capacity_in_training_and_outside() -> None:
    memory, x = Memory(WIDTH, BLOCKS, SIZE), noise(TOKENS, WIDTH)

    def dropped(training: bool, **options) -> bool:
        return bool(made("switch", capacity=1.0, **options).train(training)(x, memory).stats["drop_fraction"] > 0)

    assert dropped(True) and dropped(False)
    assert dropped(True, eval_capacity=None) and not dropped(False, eval_capacity=None)
    assert not dropped(False, eval_capacity=50.0)


def test_balance_is_judged_before_drops() -> None:
    """Blocks that are cut to equal size would hide how uneven the choice was."""
    memory, x = Memory(WIDTH, BLOCKS, SIZE), noise(TOKENS, WIDTH)
    cut, whole = made("switch", capacity=1.0), made("switch")
    cut.router.weight.data.copy_(whole.router.weight)
    found, wanted = cut(x, memory), whole(x, memory)
    assert found.stats["drop_fraction"] > 0
    assert torch.equal(found.losses["balance"], wanted.losses["balance"])


# --- gshard ---


def test_gshard_reads_the_second_block_by_chance_in_training() -> None:
    rule = made("gshard", Shape(2, 2, SIZE, 2, VOCAB, 0), capacity=None)
    memory, share = Memory(2, 2, SIZE), 0.2
    rule.router.weight.data.copy_(torch.eye(2))
    x = torch.tensor([1 - share, share]).log().expand(4001, 2)
    torch.manual_seed(3)
    found = rule(x, memory)
    assert bool((found.blocks[:, 0] == 0).all())
    read = (found.blocks[:, 1] == 1).float().mean().item()
    assert abs(read - 2 * share) < 4 * math.sqrt(0.4 * 0.6 / 4001)
    assert found.stats["drop_fraction"].item() == pytest.approx((1 - read) / 2, abs=1e-6)
    torch.testing.assert_close(found.weights[:, 0], torch.full((4001,), 1 - share))  # not normalised anew
    after = rule.eval()(x, memory)
    assert torch.equal(after.blocks, torch.tensor([0, 1]).expand(4001, 2))
    everyone = made("gshard", Shape(2, 2, SIZE, 2, VOCAB, 0), second="all", capacity=None)(x, memory)
    assert everyone.stats["drop_fraction"] == 0


def test_gshard_gives_second_choices_what_first_ones_leave() -> None:
    """Three blocks, three tokens, two places each: token 0's second choice is what tokens 1 and 2 choose first."""
    rule = made("gshard", Shape(3, 3, SIZE, 2, VOCAB, 0), second="all")
    rule.router.weight.data.copy_(torch.eye(3))
    x = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 2, 1]])
    found = rule(x, Memory(3, 3, SIZE))
    assert found.blocks.tolist() == [[0, -1], [1, 2], [1, 2]]
    in_order = made("gshard", Shape(3, 3, SIZE, 2, VOCAB, 0), second="all", drop="order")
    in_order.router.weight.data.copy_(torch.eye(3))
    assert in_order(x, Memory(3, 3, SIZE)).blocks.tolist() == [[0, 1], [1, 2], [-1, 2]]


def test_gshard_balances_first_choices() -> None:
    rule = made("gshard", Shape(3, 3, SIZE, 2, VOCAB, 0), second="all", capacity=None)
    rule.router.weight.data.copy_(torch.eye(3))
    x = torch.tensor([[3.0, 1, 0], [3, 0, 1]])
    pbar = x.softmax(-1).mean(0)
    assert rule(x, Memory(3, 3, SIZE)).losses["balance"].item() == pytest.approx(3 * pbar[0].item(), abs=1e-6)


# --- expert choice ---


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.0, 50.0])
def test_every_block_takes_equally_many_tokens(capacity: float) -> None:
    rule = made("expert_choice", capacity=capacity, accept_leak=True)
    x = noise(TOKENS, WIDTH)
    found = rule(x, Memory(WIDTH, BLOCKS, SIZE))
    each = min(TOKENS, math.ceil(capacity * TOKENS * ACTIVE / BLOCKS))
    assert torch.bincount(found.blocks[found.blocks >= 0], minlength=BLOCKS).tolist() == [each] * BLOCKS
    probability = (x @ rule.router.weight.t()).softmax(-1)
    tops = probability.topk(each, dim=0).indices
    for block in range(BLOCKS):
        assert set((found.blocks == block).any(1).nonzero().flatten().tolist()) == set(tops[:, block].tolist())
    kept = found.blocks >= 0
    torch.testing.assert_close(found.weights, probability.gather(1, found.blocks.clamp_min(0)) * kept)
    assert found.blocks.shape[1] == kept.sum(1).max()
    assert found.stats["largest_load"].item() == pytest.approx(1)


def test_noise_of_expert_choice_is_in_training_only() -> None:
    rule, memory = made("expert_choice", router_noise=0.5, accept_leak=True), Memory(WIDTH, BLOCKS, SIZE)
    rule.router.weight.data.copy_(torch.eye(BLOCKS, WIDTH))
    ones = torch.ones(997, WIDTH)
    drawn = rule(ones, memory).scores[:, :WIDTH]
    assert 0.5 <= drawn.min() < 0.51 and 1.49 < drawn.max() <= 1.5
    assert bool((rule.eval()(ones, memory).scores[:, :WIDTH] == 1).all())


def test_ties_of_expert_choice_go_to_the_earlier_token() -> None:
    rule = made("expert_choice", accept_leak=True)
    found = rule(torch.zeros(TOKENS, WIDTH), Memory(WIDTH, BLOCKS, SIZE))
    each = math.ceil(TOKENS * ACTIVE / BLOCKS)
    assert found.blocks[:each].tolist() == [list(range(BLOCKS))] * each
    assert bool((found.blocks[each:] == -1).all())


# --- hashing ---


def test_hash_is_uniform_over_blocks() -> None:
    """Chi-squared of 13 equal cells: its 0.1 % and 99.9 % points are 2.2 and 32.9 for independent draws."""
    table = made("rand_hash", Shape(2, 13, 2, 1, 10007, 0)).table
    expected = 10007 / 13
    chi = float(((torch.bincount(table.flatten(), minlength=13) - expected) ** 2 / expected).sum())
    assert 2.2 < chi < 32.9
    pairs = made("rand_hash", Shape(2, 7, 2, 2, 10007, 0)).table.sort(1).values
    counted = torch.bincount(pairs[:, 0] * 7 + pairs[:, 1]).tolist()
    expected = 10007 / 21
    chi = sum((n - expected) ** 2 / expected for n in counted if n)
    assert sum(n > 0 for n in counted) == 21
    assert 6 < chi < 45.3  # 20 degrees of freedom


def test_a_balanced_hash_carries_equal_shares_of_the_text() -> None:
    frequency = (1e6 / torch.arange(1, 2001, dtype=torch.float64) ** 0.9).round()
    frequency[1500:] = 0
    shape = Shape(2, 32, 2, 4, 2000, 3)
    rule = made("rand_hash", shape, hash_balanced=True)
    ids = torch.arange(2000)
    with pytest.raises(InputError, match="balance_by"):
        rule(torch.zeros(2000, 2), None, ids)
    rule.balance_by(frequency)

    def load(selector: Selector) -> Tensor:
        return torch.bincount(selector.table.flatten(), frequency.repeat_interleave(4), minlength=32)

    found = load(rule) / load(rule).mean()
    assert found.min() > 0.9 and found.max() < 1.1
    plain = made("rand_hash", shape)
    assert (load(plain) / load(plain).mean()).max() > 1.5
    assert torch.equal(rule.table[1500:], plain.table[1500:])  # ids that never occur keep their draw
    assert all(len(set(row)) == 4 for row in rule.table.tolist())
    loaded = made("rand_hash", shape, hash_balanced=True)
    loaded.load_state_dict(rule.state_dict())
    assert torch.equal(loaded(torch.zeros(2000, 2), None, ids).blocks, rule.table.long())
    again = made("rand_hash", shape, hash_balanced=True)
    again.balance_by(frequency)
    assert torch.equal(again.table, rule.table)
    with pytest.raises(InputError, match="2000 token ids"):
        rule.balance_by(frequency[:7])


def test_hash_refuses_embeddings() -> None:
    with pytest.raises(InputError, match="token ids") as error:
        made("rand_hash")(noise(TOKENS, WIDTH), Memory(WIDTH, BLOCKS, SIZE))
    assert "\n" not in str(error.value)


# --- statistics ---


def test_statistics_of_nothing_are_zero_and_say_so() -> None:
    found = load_statistics(torch.zeros(5, dtype=torch.long))
    assert found["pairs"] == 0 and all(bool((value == 0).all()) for value in found.values())


def test_statistics_of_a_choice() -> None:
    kept = torch.tensor([[True, False], [True, True], [False, False]])
    weights = torch.tensor([[0.5, 9.0], [0.25, 0.75], [9.0, 9.0]])
    real, margin = torch.tensor([True, True, False]), torch.tensor([0.5, float("inf"), 7.0])
    found = statistics(torch.tensor([2, 1, 1]), kept, weights, margin, real)
    assert found["drop_fraction"] == 0.25
    assert found["mean_gate"] == 0.5
    assert found["margin"] == 0.5
    assert not any(value.requires_grad for value in found.values())


# --- refusals ---


@pytest.mark.parametrize(
    ("kind", "options", "shape", "where", "given", "allowed"),
    [
        ("expert_choice", {}, (8, 2), "ffn.selector.accept_leak", False, "accept_leak: true"),
        ("gshard", {}, (8, 2), "ffn.selector.accept_leak", False, "drop: order"),
        ("switch", {"capacity": 1.0, "drop": "score"}, (8, 2), "ffn.selector.accept_leak", False, "drop: order"),
        ("gshard", {"capacity": None}, (8, 3), "ffn.active_blocks", 3, "give 2"),
        ("top_k", {"groups": 3}, (8, 2), "ffn.selector.groups", 3, "must divide the 8 blocks"),
        ("top_k", {"groups": 4, "active_groups": 1}, (8, 3), "ffn.selector.active_groups", 1, "2 blocks for 3"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: str, options: dict, shape: tuple[int, int], where: str, given: object, allowed: str
) -> None:
    rule = registry.load("transect.models.selectors", kind, Selector)
    settings = rule.Config.parse({"kind": kind, **options})
    sizes = Shape(WIDTH, shape[0], SIZE, shape[1], VOCAB, 0)
    with pytest.raises(Unfit) as error:
        settings.check_shape(sizes, True, "ffn.selector")
    assert (error.value.where, error.value.given) == (where, given)
    assert allowed in error.value.why
    if where.endswith("accept_leak"):
        settings.check_shape(sizes, False, "ffn.selector")
        settings.but(accept_leak=True).check_shape(sizes, True, "ffn.selector")


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("avg_k", {"gate_scale": "times_b"}, "goes with gate: softmax_kept"),
        ("switch", {"gate": "sigmoid", "gate_scale": "times_B"}, "goes with gate: softmax_all"),
        ("switch", {"capacity": 0.5}, "capacity"),
        ("switch", {"router_noise": 1.0}, "router_noise"),
        ("switch", {"balance": -1}, "balance"),
        ("pkm", {"pkm_dim": 7}, "pkm_dim"),
        ("top_k", {"groups": 2, "active_groups": 3}, "groups is 2"),
        ("avg_k", {"capacty": 1.0}, "did you mean 'capacity'"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(kind: str, options: dict, line: str) -> None:
    rule = registry.load("transect.models.selectors", kind, Selector)
    with pytest.raises(InputError, match=line) as error:
        rule.Config.parse({"kind": kind, **options})
    assert "\n" not in str(error.value)
