"""Every registered selector keeps the contract of a selector; a new file is tested here before its author does."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transect import registry
from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.memory.memory import Memory
from transect.models.selectors.base import Selection, Selector, Shape

PACKAGE = "transect.models.selectors"
KINDS = registry.available(PACKAGE)
RULES = {kind: registry.load(PACKAGE, kind, Selector) for kind in KINDS}
WIDTH, BLOCKS, ACTIVE, VOCAB, TOKENS = 11, 15, 2, 101, 23
BLOCK_CHOOSES = ("expert_choice",)  # tokens get as many blocks as choose them
NO_GRADIENT = ("rand_hash",)
STATISTICS = {"pairs", "load", "used_share", "largest_load", "entropy", "drop_fraction", "mean_gate"}
EVERY = [(kind, {}) for kind in KINDS] + [
    (kind, options)
    for kind, options in [
        ("avg_k", {"gate": "softmax_all", "balance": 0.1, "z_loss": 0.1, "gate_scale": "times_B"}),
        ("avg_k", {"block_score": "mean_activation", "gate": "softmax_kept"}),
        ("avg_k", {"block_score": "max_norm_key", "normalise_keys": True, "gate": "sigmoid"}),
        ("avg_k", {"block_score": "random_key", "gate": "straight_through"}),
        ("vanilla_m", {"rank_by": "abs_coefficient", "balance": 0.1}),
        ("lorkm", {"lork_rank": 3, "z_loss": 0.1, "balance": 0.1}),
        ("pkm", {"pkm_coefficient": "activation", "balance": 0.1, "z_loss": 0.1}),
        ("pkm_ffn", {"gate": "softmax_all", "pkm_dim": 4}),
        ("rand_hash", {"hash_per_layer": False, "seed": 5}),
        ("top_k", {"scores": "sigmoid", "groups": 5, "active_groups": 2, "z_loss": 0.1}),
        ("bias_balanced", {"scores": "softmax", "normalise": False, "scale": 2.5, "balance": 0.1}),
        ("gshard", {"second": "all", "capacity": None}),
        ("expert_choice", {"capacity": 2.0, "z_loss": 0.1}),
    ]
]
IDS = [kind + "".join(f"-{value}" for value in options.values()) for kind, options in EVERY]
every = pytest.mark.parametrize(("kind", "options"), EVERY, ids=IDS)
each = pytest.mark.parametrize("kind", KINDS)


def settings_of(kind: str, options: dict | None = None):
    rule = RULES[kind]
    consent = {} if rule.causal_safe else {"accept_leak": True}
    return rule.Config.parse({"kind": kind} | consent | (options or {}))


def shape_of(kind: str, active: int = ACTIVE) -> Shape:
    return Shape(WIDTH, BLOCKS, 1 if RULES[kind].cells_only else 3, active, VOCAB, 0)


def pair(kind: str, options: dict | None = None, dtype: torch.dtype = torch.float32) -> tuple[Selector, Memory]:
    """A selector, not in training, and a memory for it, the same in every call."""
    torch.manual_seed(7)
    shape = shape_of(kind)
    memory = Memory(WIDTH, BLOCKS, shape.block_size, bias=True, with_keys=not RULES[kind].provides_keys)
    rule = RULES[kind](settings_of(kind, options), shape)
    for parameter in [*memory.parameters(), *rule.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    return rule.to(dtype).eval(), memory.to(dtype)


def tokens(count: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(count)
    return torch.randn(count, WIDTH, generator=source).to(dtype), torch.randint(VOCAB, (count,), generator=source)


def numbers(found: Selection) -> dict[str, Tensor]:
    """Every number of a selection, by name."""
    parts = {"weights": found.weights, "coefficients": found.coefficients}
    return {name: value for name, value in parts.items() if value is not None} | found.losses | found.stats


def same(first: Selection, second: Selection) -> None:
    assert torch.equal(first.blocks, second.blocks)
    left, right = numbers(first), numbers(second)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=name)


@every
@pytest.mark.parametrize("count", [TOKENS, 1, 0])
@pytest.mark.parametrize("training", [False, True])
def test_contract(kind: str, options: dict, count: int, training: bool) -> None:
    rule, memory = pair(kind, options)
    x, ids = tokens(count)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    found = rule.train(training)(x, memory, ids)
    assert found.blocks.dtype == torch.int64
    assert found.blocks.shape == found.weights.shape and len(found.blocks) == count
    if kind not in BLOCK_CHOOSES:
        assert found.blocks.shape[1] == ACTIVE
    assert found.blocks.numel() == 0 or (found.blocks.min() >= -1 and found.blocks.max() < BLOCKS)
    kept = found.blocks >= 0
    assert bool((found.weights[~kept] == 0).all()) and bool((found.weights[kept] > 0).all())
    for row in found.blocks.tolist():
        read = [block for block in row if block >= 0]
        assert len(set(read)) == len(read)
    if found.coefficients is not None:
        assert rule.cells_only and found.coefficients.shape == found.blocks.shape
    if found.scores is not None:
        assert found.scores.shape == (count, BLOCKS)
    assert found.losses.keys() == rule.config.loss_weights().keys()
    for value in [*found.losses.values(), *found.stats.values()]:
        assert bool(value.isfinite().all())
    assert found.stats.keys() - {"margin"} == STATISTICS
    assert not any(value.requires_grad for value in found.stats.values())
    assert not found.blocks.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    load = found.stats["load"]
    assert load.shape == (BLOCKS,) and load.sum().item() == pytest.approx(1 if found.stats["pairs"] else 0)
    read = kept.sum() / found.stats["pairs"].clamp_min(1)
    assert found.stats["drop_fraction"].item() == pytest.approx(1 - read.item() if count else 0, abs=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_autocast(kind: str, options: dict, dtype: torch.dtype) -> None:
    rule, memory = pair(kind, options, dtype)
    x, ids = tokens(dtype=dtype)
    found = rule(x, memory, ids)
    assert found.weights.dtype == torch.promote_types(dtype, torch.float32)
    assert bool(found.weights.isfinite().all())
    with torch.autocast("cpu", torch.bfloat16):
        cast = rule(x, memory, ids)
    assert bool(cast.weights.isfinite().all()) and cast.weights.dtype == found.weights.dtype
    assert cast.blocks.shape[0] == TOKENS
    overlap = (cast.blocks[:, :, None] == found.blocks[:, None, :]).any(-1).float().mean()
    assert overlap > 0.85  # bfloat16 may move what is nearly tied


@every
def test_is_made_on_the_meta_device_and_filled_later(kind: str, options: dict) -> None:
    with torch.device("meta"):
        rule = RULES[kind](settings_of(kind, options), shape_of(kind))
    assert all(tensor.is_meta for tensor in [*rule.parameters(), *rule.buffers()])
    whole, memory = pair(kind, options)
    x, ids = tokens()
    loaded = rule.to_empty(device="cpu").eval()
    loaded.load_state_dict(whole.state_dict())
    same(loaded(x, memory, ids), whole(x, memory, ids))
    filled = RULES[kind](settings_of(kind, options), shape_of(kind))
    loaded.reset_buffers()
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), filled.buffers(), strict=True))


@every
def test_padding_counts_nowhere(kind: str, options: dict) -> None:
    """With NaN and foreign ids at padding, everything equals the run without padding, gradients included."""
    rule, memory = pair(kind, options)
    x, ids = tokens()
    real = torch.arange(TOKENS) % 4 != 1
    spoilt, foreign = x.clone(), ids.clone()
    spoilt[~real], foreign[~real] = float("nan"), -100
    spoilt.requires_grad_(True)
    found = rule(spoilt, memory, foreign, real)
    assert bool((found.blocks[~real] == -1).all()) and bool((found.weights[~real] == 0).all())
    alone = rule(x[real], memory, ids[real])
    rows = found._replace(
        blocks=found.blocks[real],
        weights=found.weights[real],
        coefficients=None if found.coefficients is None else found.coefficients[real],
    )
    same(rows, alone)
    total = found.weights.sum() + sum(found.losses.values())
    if total.requires_grad:
        total.backward()
        gradients = [p.grad for p in [*rule.parameters(), *memory.parameters()] if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert spoilt.grad is None or bool((spoilt.grad[~real] == 0).all())
    nobody = rule(x, memory, ids, torch.zeros(TOKENS, dtype=torch.bool))
    assert bool((nobody.blocks == -1).all()) and nobody.stats["pairs"] == 0
    assert all(bool(value.isfinite().all()) for value in numbers(nobody).values())


@each
@pytest.mark.parametrize("capacity", [{}, {"capacity": 1.0}])
def test_padding_takes_no_capacity(kind: str, capacity: dict) -> None:
    if capacity and "drop" not in RULES[kind].Config.model_fields:
        pytest.skip("no capacity that drops tokens")
    rule, memory = pair(kind, capacity)
    rule.train() if kind != "gshard" else rule.eval()
    x, ids = tokens()
    real = torch.arange(TOKENS) % 5 != 0
    found, alone = rule(x, memory, ids, real), rule(x[real], memory, ids[real])
    assert torch.equal(found.blocks[real], alone.blocks)


@every
def test_order_and_batches_do_not_matter(kind: str, options: dict) -> None:
    if kind in BLOCK_CHOOSES:
        pytest.skip("blocks choose among the tokens of the batch")
    rule, memory = pair(kind, options)
    x, ids = tokens()
    whole = rule(x, memory, ids)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    shuffled = rule(x[order], memory, ids[order])
    assert torch.equal(shuffled.blocks, whole.blocks[order])
    torch.testing.assert_close(shuffled.weights, whole.weights[order])
    parts = [rule(x[cut], memory, ids[cut]) for cut in (slice(0, 1), slice(1, 14), slice(14, None))]
    assert torch.equal(torch.cat([part.blocks for part in parts]), whole.blocks)
    torch.testing.assert_close(torch.cat([part.weights for part in parts]), whole.weights)


@every
@pytest.mark.parametrize("training", [False, True])
def test_later_tokens_do_not_matter_where_that_is_promised(kind: str, options: dict, training: bool) -> None:
    scored = "drop" in RULES[kind].Config.model_fields
    for extra in ({}, {"capacity": 1.0}) if scored else ({},):
        rule, memory = pair(kind, options | extra)
        rule.train(training)
        if not rule.causal_safe:
            continue
        x, ids = tokens()
        changed, others = x.clone(), ids.clone()
        changed[9:], others[9:] = -3 * x[9:], (ids[9:] + 1) % VOCAB
        before, after = rule(x, memory, ids), rule(changed, memory, others)
        assert torch.equal(before.blocks[:9], after.blocks[:9])
        torch.testing.assert_close(before.weights[:9], after.weights[:9])


@each
def test_what_is_not_causal_is_refused_without_consent(kind: str) -> None:
    rule = RULES[kind]
    given = {"kind": "sparse", "blocks": 8, "active_blocks": 2, "block_size": 1, "selector": kind}
    model = {"vocab_size": VOCAB, "width": 12, "layers": 1, "attention": {"heads": 2}, "ffn": given}
    if rule.causal_safe:
        assert ModelConfig.parse(model).ffn.selector.kind == kind
        return
    with pytest.raises(InputError, match=r"ffn\.selector\.accept_leak is False:") as error:
        ModelConfig.parse(model)
    assert "\n" not in str(error.value)
    assert ModelConfig.parse(model | {"objective": "masked"}).ffn.selector.kind == kind
    given["selector"] = {"kind": kind, "accept_leak": True}
    assert ModelConfig.parse(model).ffn.selector.accept_leak


@each
def test_impossible_memories_are_refused(kind: str) -> None:
    given = {"kind": "sparse", "blocks": 8, "active_blocks": 2, "block_size": 3, "selector": kind}
    model = {"vocab_size": VOCAB, "width": 12, "layers": 1, "attention": {"heads": 2}, "objective": "masked"}
    if RULES[kind].cells_only:
        with pytest.raises(InputError, match=r"ffn\.block_size is 3: .*block_size: 1"):
            ModelConfig.parse(model | {"ffn": given})
    if RULES[kind].provides_keys:
        with pytest.raises(InputError, match=r"ffn\.gated is True:"):
            ModelConfig.parse(model | {"ffn": given | {"block_size": 1, "gated": True}})
    with pytest.raises(InputError, match=r"ffn\.active_blocks is 9: .*8 blocks"):
        ModelConfig.parse(model | {"ffn": given | {"block_size": 1, "active_blocks": 9}})


@every
def test_settings_survive_yaml(kind: str, options: dict) -> None:
    settings = settings_of(kind, options)
    assert settings.kind == kind and RULES[kind].Config().kind == kind
    assert settings.parse(settings.plain()) == settings
    with pytest.raises(InputError, match="is not a setting"):
        settings.but(no_such_setting=1)


@each
def test_token_ids_are_needed_where_that_is_said(kind: str) -> None:
    rule, memory = pair(kind)
    if rule.needs_token_ids:
        with pytest.raises(InputError, match="token ids"):
            rule(tokens()[0], memory)
    else:
        same(rule(tokens()[0], memory), rule(*[tokens()[0], memory, tokens()[1]]))


@each
def test_equal_scores_go_to_the_lowest_block(kind: str) -> None:
    if RULES[kind].needs_token_ids or kind in BLOCK_CHOOSES:
        pytest.skip("does not rank blocks by score")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rule, memory = pair(kind, {}, dtype)
        if memory.key_bias is not None:
            memory.key_bias.data.zero_()
        found = rule(torch.zeros(3, WIDTH, dtype=dtype), memory)
        assert found.blocks.tolist() == [list(range(ACTIVE))] * 3


@every
def test_gradients_are_those_of_finite_differences(kind: str, options: dict) -> None:
    """In float64, of weights, coefficients and losses, in x, the selector's own parameters and the key table."""
    rule, memory = pair(kind, options, torch.float64)
    x, ids = tokens(5, torch.float64)
    names = [name for name, parameter in rule.named_parameters() if parameter.requires_grad]
    values = [rule.get_parameter(name).detach().clone().requires_grad_(True) for name in names]
    straight = options.get("gate") == "straight_through"  # a constant whose gradient is another function's, on purpose

    def outputs(x: Tensor, keys: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        table = dict(zip(names, own, strict=True))
        with _Replaced(memory, keys):
            found = torch.func.functional_call(rule, table, (x, memory, ids))
        parts = [found.weights, *found.losses.values()]
        parts += [] if found.coefficients is None else [found.coefficients]
        return tuple(part for part in parts if part.requires_grad)

    keys = torch.zeros(1, dtype=torch.float64) if memory.keys is None else memory.keys.detach().clone()
    given = (x.requires_grad_(True), keys.requires_grad_(True), *values)
    promised = outputs(*given)
    if kind in NO_GRADIENT:
        assert not promised
    elif promised and not straight:
        assert torch.autograd.gradcheck(outputs, given, atol=1e-6)
    elif straight:
        assert all(part.grad_fn is not None for part in promised)
    else:
        assert options == {} and kind in ("avg_k", "random_router", "pkm_ffn")  # binary by default, as specified


class _Replaced:
    """A memory with other keys for a while."""

    def __init__(self, memory: Memory, keys: Tensor) -> None:
        self.memory, self.keys, self.old = memory, keys, memory.keys

    def __enter__(self) -> None:
        if self.old is not None:
            del self.memory.keys
            self.memory.keys = self.keys

    def __exit__(self, *_: object) -> None:
        if self.old is not None:
            del self.memory.keys
            self.memory.keys = self.old


@every
def test_flops_are_those_of_the_products_made(kind: str, options: dict) -> None:
    rule, memory = pair(kind, options)
    x, ids = tokens()
    with FlopCounterMode(display=False) as counter:
        rule(x, memory, ids)
    made = counter.get_total_flops()
    if options.get("balance") and kind in ("pkm", "pkm_ffn"):
        made -= 2 * TOKENS * BLOCKS  # of the balance loss, not of choosing
    claimed = rule.flops() * TOKENS
    if kind == "vanilla_m":
        claimed += 2 * WIDTH * ACTIVE * TOKENS  # spared in the memory
    if kind in ("pkm", "pkm_ffn"):
        claimed -= TOKENS * 5  # adds: pairs of ranks i, j with i j <= 3
    assert made == claimed


@each
def test_saved_and_loaded_it_chooses_the_same(kind: str, tmp_path) -> None:
    rule, memory = pair(kind)
    x, ids = tokens()
    wanted = rule(x, memory, ids)
    torch.save(rule.state_dict(), tmp_path / "selector.pt")
    torch.manual_seed(99)
    fresh = RULES[kind](settings_of(kind), shape_of(kind)).eval()
    fresh.load_state_dict(torch.load(tmp_path / "selector.pt", weights_only=True))
    same(fresh(x, memory, ids), wanted)


@each
def test_a_compiled_graph_would_have_no_break(kind: str) -> None:
    """Nothing is read back from the device, but where that is said: a table's first use, the width of a choice."""
    if kind in BLOCK_CHOOSES:
        pytest.skip("the number of slots is read back")
    rule, memory = pair(kind)
    x, ids = tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.export.export(_Whole(rule, memory), (x, ids))
    out = found.module()(x, ids)
    assert torch.equal(out, rule(x, memory, ids).blocks)


class _Whole(torch.nn.Module):
    def __init__(self, rule: Selector, memory: Memory) -> None:
        super().__init__()
        self.rule, self.memory = rule, memory

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.rule(x, self.memory, ids).blocks
