"""Attention's kernels against the definition, FlexAttention's rules against dense masks, rows that see nothing."""

import math

import pytest
import torch
from torch import Tensor

from transect.models import ModelConfig, TransectModel, attend
from transect.models.masks import Visible
from transect.models.own_pair import FORMS, Pair, Setting, joined, overwrite

CPU = torch.device("cpu")
ROWS, HEADS, LENGTH, HEAD_WIDTH = 3, 6, 17, 5
GENERATOR = torch.Generator().manual_seed(11)
REAL = torch.rand(ROWS, LENGTH, generator=GENERATOR) < 0.7
REAL[0] = True
DOCUMENTS = (torch.rand(ROWS, LENGTH, generator=GENERATOR) < 0.3).long().cumsum(1)
MASKS = {
    "plain": {},
    "padding": {"real": REAL},
    "documents": {"documents": DOCUMENTS},
    "both": {"real": REAL, "documents": DOCUMENTS},
}
not_compiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def drawn(groups: int, queries: int = LENGTH, keys: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, queries), (groups, keys), (groups, keys))
    made = (torch.randn(ROWS, *shape, HEAD_WIDTH, generator=GENERATOR, dtype=torch.float64) for shape in shapes)
    return tuple(x.requires_grad_() for x in made)


def defined(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax over what is allowed, 0 where nothing is; and the log of the sum of exponents."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    exponents = (scale * q @ k.mT).exp() * allowed
    total = exponents.sum(-1, keepdim=True)
    return (exponents / total.clamp_min(1e-300)) @ v, total[..., 0].log()


def allowed(case: dict, causal: bool, window: int | None, own: bool, offset: int = 0) -> Tensor:
    """[rows, 1, queries, keys], said once more and separately, by loops."""
    made = torch.zeros(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)
    for row in range(ROWS):
        for query in range(LENGTH):
            for key in range(LENGTH):
                same_text = "documents" not in case or DOCUMENTS[row, query] == DOCUMENTS[row, key]
                both_real = "real" not in case or bool(REAL[row, query] and REAL[row, key])
                near = window is None or abs(query - key) < window
                other = same_text and both_real and near and (key < query or not causal)
                made[row, 0, query, key] = own if query == key else other
    return made[:, :, offset:]


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize(("causal", "offset"), [(True, 0), (True, 5), (True, LENGTH - 1), (False, 0)])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("window", [None, 4, 1])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_gives_the_definition_and_its_gradients(name, causal, window, own, offset, groups):
    case = MASKS[name]
    q, k, v = drawn(groups, LENGTH - offset)
    mask = allowed(case, causal, window, own, offset)
    visible = Visible(LENGTH - offset, offset, causal, CPU, **case)
    kernel = attend.attend if own else attend.attend_others
    found = kernel(q, k, v, visible, window=window, scale=0.7)
    wanted, _ = defined(q, k, v, mask, 0.7)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    assert bool((found[~mask.any(-1).expand(-1, HEADS, -1)] == 0).all())
    gradients = (torch.autograd.grad(x.square().sum(), (q, k, v), materialize_grads=True) for x in (found, wanted))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    lonely = visible.lonely(LENGTH, window).expand(ROWS, -1, -1, -1)
    assert torch.equal(lonely[..., 0], ~allowed(case, causal, window, False, offset).any(-1))


@pytest.mark.parametrize("length", [511, 512, 513, 523])
def test_moved_queries_are_seeing_the_others(length):
    q, k, v = drawn(2, length, length)
    visible = Visible(length, 0, True, CPU)
    moved = attend.attend_others(q, k, v, visible, window=None, scale=0.7)
    assert attend.shifts(q, visible, length, None) is (length > 512)
    wanted, _ = defined(q, k, v, torch.ones(length, length, dtype=torch.bool).tril(-1), 0.7)
    torch.testing.assert_close(moved, wanted, atol=1e-10, rtol=1e-10)


@not_compiled
@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_flex_attention_reads_the_same_rule(name, causal, window, own, groups):
    """The kernel of CUDA, here as PyTorch's plain version of it, which has no backward on the CPU."""
    q, k, v = (x.detach() for x in drawn(groups))
    visible = Visible(LENGTH, 0, causal, CPU, **MASKS[name])
    seen, total = attend.attend_flexibly(q, k, v, visible, window=window, scale=0.7, own=own)
    wanted, sums = defined(q, k, v, allowed(MASKS[name], causal, window, own), 0.7)
    torch.testing.assert_close(seen, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(total, sums, atol=1e-10, rtol=1e-10)
    kernel = attend.attend if own else attend.attend_others
    fused = kernel(q, k, v, visible, window=window, scale=0.7)
    torch.testing.assert_close(seen, fused, atol=1e-10, rtol=1e-10)
    assert visible.blocks(LENGTH, window, own) is visible.blocks(LENGTH, window, own)
    if not own:
        pair = Pair(*(x.detach() for x in drawn(HEADS)[:2]))
        whole = overwrite(q, Pair(k, v), pair, visible, Setting(window, 0.7))
        torch.testing.assert_close(joined(seen, total, q, pair, 0.7), whole, atol=1e-10, rtol=1e-10)


def test_flex_attention_is_for_cuda_without_dropout_and_cache():
    visible = Visible(LENGTH, 0, True, CPU)
    assert not attend.flexible(torch.zeros(1, 1, LENGTH, 32), visible)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_linear_attention_is_a_mean_of_products(name, own):
    q, k, v = drawn(2)
    visible = Visible(LENGTH, 0, True, CPU, **MASKS[name])
    mask = allowed(MASKS[name], True, 4, own)
    kernel = attend.attend_linearly if own else attend.attend_others_linearly
    found = kernel(q, k, v, visible, window=4, scale=0.7)
    wide_k, wide_v = (x.repeat_interleave(3, 1) for x in (k, v))
    wanted = (0.7 * (q @ wide_k.mT) * mask) @ wide_v / mask.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_dropout_is_that_of_the_weights():
    q, k, v = (x.detach() for x in drawn(HEADS))
    visible = Visible(LENGTH, 0, True, CPU, REAL)
    torch.manual_seed(0)
    draws = [attend.attend(q, k, v, visible, window=None, scale=0.7, dropout=0.5) for _ in range(2000)]
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    plain = attend.attend(q, k, v, visible, window=None, scale=0.7)
    assert float(spread.max()) > 0.1
    assert float((mean - plain).abs().max()) < 6 * float(spread.max()) / math.sqrt(2000)


def test_a_mask_is_made_once_for_a_pass():
    visible = Visible(LENGTH, 0, True, CPU, REAL)
    assert visible.dense(LENGTH, 3) is visible.dense(LENGTH, 3)
    assert visible.dense(LENGTH, 3) is not visible.dense(LENGTH, 3, own=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", ["standard", {"kind": "caa"}, {"kind": "caa", "direct_path": "masked"}])
def test_padding_and_first_tokens_give_finite_numbers_and_gradients(block, dtype):
    given = {
        "vocab_size": 53,
        "width": 12,
        "layers": 2,
        "attention": {"heads": 3},
        "block": block,
        "ffn": {"width": 16},
    }
    torch.manual_seed(0)
    made = TransectModel.make(ModelConfig.parse(given)).to(dtype)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :6] = 0
    mask[2] = 0  # a row of padding alone
    hidden = made(input_ids=torch.arange(21).view(3, 7), attention_mask=mask).last_hidden_state
    hidden.float().square().sum().backward()
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_autocast_brings_all_to_one_dtype(form):
    """Rotary angles leave queries and keys in float32, values are in bfloat16 then."""
    q, k, v = (x.detach().float() for x in drawn(2))
    arguments = (q, Pair(k, v.bfloat16()), Pair(k[:, :, :LENGTH], v.bfloat16()), Visible(LENGTH, 0, True, CPU))
    with torch.autocast("cpu", torch.bfloat16):
        found = FORMS[form](*arguments, Setting(None, 0.7))
    assert found.dtype == torch.bfloat16
    wanted = overwrite(q, Pair(k, v), Pair(k, v), arguments[-1], Setting(None, 0.7))
    assert float((found.float() - wanted).abs().max()) < 0.05


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:<class 'torch.autograd")  # torch.compile's own
@pytest.mark.parametrize("block", [{"kind": "caa"}, {"kind": "caa", "direct_path": "masked", "empty_row": "sink"}])
def test_a_step_under_autocast_and_a_compiled_one(block):
    given = {
        "vocab_size": 53,
        "width": 12,
        "layers": 1,
        "attention": {"heads": 3},
        "block": block,
        "ffn": {"width": 16},
    }
    torch.manual_seed(0)
    made = TransectModel.make(ModelConfig.parse(given))
    ids = torch.arange(14).view(2, 7)
    results = []
    for layer in (made.layers[0], torch.compile(made.layers[0], backend="aot_eager")):
        made.layers[0] = layer
        made.zero_grad()
        hidden = made(input_ids=ids).last_hidden_state
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(parameter.grad.clone() for parameter in made.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = made(input_ids=ids).last_hidden_state
        reduced.square().sum().backward()
    assert float((reduced.detach() - results[0][0]).abs().max()) < 0.1
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())
