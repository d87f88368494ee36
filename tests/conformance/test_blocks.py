"""What every layer architecture owes the model, over all that are registered, in every norm layout and objective."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from transect import registry
from transect.models import ModelConfig, TransectForCausalLM, TransectForMaskedLM, TransectModel

VOCAB, WIDTH, HEADS, HEAD_WIDTH, UNITS, LENGTH = 53, 11, 3, 4, 16, 13
EXPERTS = {"kind": "sparse", "blocks": 7, "active_blocks": 1, "block_size": 5, "selector": "switch"}
ALL = {name: {"kind": name} for name in registry.available("transect.models.blocks")}
MORE = {
    "parallel, two norms": {"kind": "parallel", "norms": "two"},
    "attention_only, gelu": {"kind": "attention_only", "activation": "gelu"},
    "moe_before_ffn, parallel": {"kind": "moe_before_ffn", "moe": EXPERTS, "place": "parallel"},
    "caa, r = 0": {"kind": "caa", "outer_ratio": 0},
    "caa, r = 1": {"kind": "caa", "outer_ratio": 1},
    "caa, masked": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "masked"},
    "caa, masked, sink": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "masked", "empty_row": "sink"},
    "caa, masked, raw": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "masked", "empty_row": "raw"},
    "caa, none": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "none"},
    "caa, own maps": {"kind": "caa", "outer_ratio": 0.5, "shared_kv": False},
    "caa, no inner residual": {"kind": "caa", "outer_ratio": 0.5, "inner_residual": False, "inner_norm": "none"},
    "caa, experts inside": {"kind": "caa", "inner": EXPERTS, "direct_path": "masked"},
}
BLOCKS = ALL | MORE
LAYOUTS = ("pre", "post", "sandwich", "branch", "none")
EACH = [
    (name, objective, layout)
    for name in BLOCKS
    for objective in ("causal", "masked")
    for layout in LAYOUTS
    if not (name == "parallel, two norms" and layout == "post")  # refused
]
each = pytest.mark.parametrize(("name", "objective", "layout"), EACH)
causal = pytest.mark.parametrize(("name", "layout"), [(n, layout) for n, o, layout in EACH if o == "causal"])


def settings(name: str, objective: str = "causal", layout: str = "pre", **changes) -> ModelConfig:
    given = {
        "vocab_size": VOCAB,
        "width": WIDTH,
        "layers": 2,
        "objective": objective,
        "max_positions": 31,
        "attention": {"heads": HEADS, "head_width": HEAD_WIDTH, "kv_heads": 1},
        "ffn": {"width": UNITS},
        "norm": {"layout": layout},
        "block": BLOCKS[name],
        "init": {"std": 0.3, "depth_scaled": False, "rules": {"*bias": {"draw": "normal", "std": 0.3}}},
    }
    return ModelConfig.parse(given | changes)


def model(name: str, objective: str = "causal", layout: str = "pre", dtype=torch.float64, kind=None, **changes):
    torch.manual_seed(0)
    kind = kind or (TransectForCausalLM if objective == "causal" else TransectForMaskedLM)
    return kind.make(settings(name, objective, layout, **changes)).to(dtype).eval()


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def blind(name: str) -> bool:
    """Whether softmax cannot see a parameter: one number added to all scores of a query."""
    return name.endswith("attn.k.bias")


@each
def test_every_parameter_learns_and_every_number_is_finite(name, objective, layout):
    made = model(name, objective, layout).train()
    mask = torch.ones(5, LENGTH, dtype=torch.long)
    mask[4, 1:] = 0  # a text of one token, which sees no other
    output = made(input_ids=ids(5), labels=ids(5, seed=1), attention_mask=mask)
    output.loss.backward()
    assert torch.isfinite(output.logits).all()
    for path, parameter in made.named_parameters():
        assert parameter.grad is not None, path
        assert torch.isfinite(parameter.grad).all(), path
        assert bool(parameter.grad.abs().max() > 1e-12) or blind(path), path
    total = torch.stack(list(output.losses.values())).sum()
    torch.testing.assert_close(output.loss, total)
    assert not any(number.requires_grad for number in output.stats.values())


@causal
def test_a_causal_layer_does_not_look_ahead(name, layout):
    made, given, place = model(name, "causal", layout, kind=TransectModel), ids(), 7
    changed = given.clone()
    changed[:, place] = (changed[:, place] + 1) % VOCAB
    moved = [(made(input_ids=x).last_hidden_state) for x in (given, changed)]
    assert torch.equal(moved[0][:, :place], moved[1][:, :place])
    assert bool((moved[0] - moved[1])[:, place:].abs().amax(-1).min() > 1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@causal
def test_a_cache_changes_nothing(name, layout, dtype, close):
    made, given = model(name, "causal", layout, dtype), ids()
    whole = made(input_ids=given).logits.detach()
    cache, parts = DynamicCache(), []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 11), (11, LENGTH)):
        parts.append(made(input_ids=given[:, start:end], past_key_values=cache, use_cache=True).logits)
    found = torch.cat(parts, 1).detach()
    assert float((found - whole).abs().max()) < close * max(1.0, float(whole.abs().max()))


@each
def test_neither_the_batch_nor_padding_matters(name, objective, layout):
    made, given = model(name, objective, layout, kind=TransectModel), ids(3)
    lengths = (LENGTH, 7, 1)
    alone = [made(input_ids=given[row : row + 1, :n]).last_hidden_state[0] for row, n in enumerate(lengths)]
    for left in (False, True):
        padded, mask = torch.full_like(given, 7), torch.zeros_like(given)
        for row, n in enumerate(lengths):
            here = slice(LENGTH - n, LENGTH) if left else slice(0, n)
            padded[row, here], mask[row, here] = given[row, :n], 1
        found = made(input_ids=padded, attention_mask=mask).last_hidden_state
        assert torch.isfinite(found).all()
        for row, wanted in enumerate(alone):
            torch.testing.assert_close(found[row, mask[row].bool()], wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("name", BLOCKS)
def test_saved_and_loaded_again_it_is_the_same_model(name, objective, tmp_path):
    made = model(name, objective, "pre", torch.float32, kind=TransectModel)
    made.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.settings == made.settings
    state = again.state_dict()
    assert list(state) == list(made.state_dict())
    assert all(torch.equal(value, state[path]) for path, value in made.state_dict().items())
    assert torch.equal(*(x(input_ids=ids()).last_hidden_state for x in (made, again)))


@pytest.mark.parametrize("name", BLOCKS)
def test_generating_with_and_without_cache_says_the_same(name, tmp_path):
    model(name, "causal", "pre", torch.float64).save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    texts = [made.generate(ids(2, 5), use_cache=cache, **options) for cache in (True, False)]
    assert texts[0].shape == (2, 12) and torch.equal(*texts)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_seed_draws_the_same_layer_and_checkpointing_recomputes_it(name):
    one, other = (model(name, dropout=0.3).train() for _ in range(2))
    other.model.gradient_checkpointing = True
    gradients = []
    for made in (one, other):
        torch.manual_seed(5)
        made(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("name", BLOCKS)
def test_one_token_and_no_text_at_all(name, objective):
    made = model(name, objective, kind=TransectModel)
    one = made(input_ids=ids(2, 1)).last_hidden_state
    assert one.shape == (2, 1, WIDTH) and torch.isfinite(one).all()
    assert made(input_ids=ids(0, 7)).last_hidden_state.shape == (0, 7, WIDTH)
    assert made(input_ids=ids(2, 0)).last_hidden_state.shape == (2, 0, WIDTH)


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_may_differ_and_share(name):
    """Beside standard layers, and three times the same weights, each with a place of its own in the cache."""
    for changes in (
        {"layers": 3, "share": [0]},
        {"layers": 3, "overrides": [{"layers": "::2", "set": {"block": "standard"}}]},
    ):
        made, given = model(name, **changes), ids()
        whole = made(input_ids=given).logits
        first = made(input_ids=given[:, :6], use_cache=True)
        rest = made(input_ids=given[:, 6:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-10, rtol=1e-10)
