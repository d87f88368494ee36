"""CAA against hand-made numbers, a plain-loop twin, the standard layer and counts made by arithmetic."""

import math

import pytest
import torch
from torch import Tensor

from transect.errors import InputError
from transect.models import ModelConfig, TransectConfig, TransectForCausalLM, TransectModel
from transect.models.masks import Visible
from transect.models.own_pair import FORMS, Pair, Setting, overwrite

CPU = torch.device("cpu")
VOCAB, WIDTH, HEADS, HEAD_WIDTH, UNITS, LENGTH = 53, 11, 6, 4, 16, 13
BASE = {
    "vocab_size": VOCAB,
    "width": WIDTH,
    "layers": 2,
    "max_positions": 31,
    "attention": {"heads": HEADS, "head_width": HEAD_WIDTH},
    "ffn": {"width": UNITS},
    "init": {"std": 0.3, "depth_scaled": False, "rules": {"*bias": {"draw": "normal", "std": 0.3}}},
}


def settings(block: dict | str, **changes) -> ModelConfig:
    return ModelConfig.parse(BASE | {"block": block} | changes)


def model(block: dict | str, kind=TransectForCausalLM, dtype=torch.float64, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return kind.make(settings(block, **changes)).to(dtype).eval()


def ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def caa(**options) -> dict:
    return {"kind": "caa", **options}


# --- T1 ----------------------------------------------------------------------------------------------------------


def toy(objective: str, **options) -> Tensor:
    """What attention of the toy reads: d = 1, all projections 1, x = (1, 2), c = x + F(x) = (3, 5)."""
    given = {
        "vocab_size": 3,
        "width": 1,
        "layers": 1,
        "objective": objective,
        "positions": "none",
        "block": caa(outer_ratio=0, **options),
        "attention": {"heads": 1},
        "ffn": {"width": 1, "activation": "identity"},
        "norm": {"layout": "none"},
        "init": {"rules": {"*": {"value": 1.0}}},
    }
    made = TransectModel.make(ModelConfig.parse(given)).double().eval()
    attn = made.layers[0].attn
    with torch.no_grad():
        for linear in (attn.q, attn.k, attn.v, attn.out, attn.inner.up):
            linear.bias.zero_()  # F(x) = x + 1: the second bias stays
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    seen = []
    attn.register_forward_hook(lambda _module, _inputs, output: seen.append(output.hidden))
    made(inputs_embeds=x)
    return seen[0][0, :, 0].detach()


@pytest.mark.parametrize("form", FORMS)
def test_t1_toy_with_raw_path(form):
    assert toy("causal", form=form).tolist() == pytest.approx([1, 2.880797], abs=1e-6)
    assert float(toy("masked", form=form)[0]) == pytest.approx(4.928055, abs=1e-6)


def test_t1_toy_with_other_paths():
    assert toy("causal", direct_path="none").tolist() == pytest.approx([3, 4.964028], abs=1e-6)
    assert toy("causal", direct_path="masked").tolist() == pytest.approx([0, 3], abs=1e-6)
    assert toy("causal", direct_path="masked", empty_row="raw").tolist() == pytest.approx([1, 3], abs=1e-6)
    assert toy("masked", direct_path="masked").tolist() == pytest.approx([5, 3], abs=1e-6)


def test_t1_weights_of_the_second_row():
    q, others, own = (torch.tensor(x).double()[None, None, :, None] for x in ((1, 2), (3, 5), (1, 2)))
    one = torch.tensor((1.0, 0.0)).double()[None, None, :, None]  # values that read off one weight
    for form in FORMS.values():
        seen = form(q, Pair(others, one), Pair(own, 0 * one), Visible(2, 0, True, CPU), Setting(None, 1.0))
        assert seen.flatten().tolist() == pytest.approx([0, 0.880797], abs=1e-6)


# --- T2 ----------------------------------------------------------------------------------------------------------


def sees(case: dict, query: int, key: int, row: int) -> bool:
    """The rule, said once more and separately."""
    if query == key:
        return True
    if case.get("real") is not None and not (case["real"][row][query] and case["real"][row][key]):
        return False
    if case.get("documents") is not None and case["documents"][row][query] != case["documents"][row][key]:
        return False
    return (key < query or not case["causal"]) and abs(query - key) < case.get("window", 99)


def looped(q: Tensor, others: Pair, own: Pair, case: dict, scale: float) -> Tensor:
    """The definition, a loop for every sign in it."""
    batch, heads, queries, _ = q.shape
    shared = heads // others.key.shape[1]
    offset = others.key.shape[2] - queries
    rows = []
    for row in range(batch):
        for head in range(heads):
            for query in range(queries):
                scores, values = [], []
                for key in range(others.key.shape[2]):
                    if not sees(case, query + offset, key, row):
                        continue
                    mine = key == query + offset
                    place = (row, head // shared, query if mine else key)
                    source = own if mine else others
                    scores.append(scale * q[row, head, query] @ source.key[place])
                    values.append(source.value[place])
                rows.append(torch.stack(scores).softmax(0) @ torch.stack(values))
    return torch.stack(rows).view(batch, heads, queries, -1)


PADDED = [[True] * 7, [True] * 4 + [False] * 3, [False] * 2 + [True] * 5]
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2], [0] * 7]
CASES = {
    "causal": {"causal": True},
    "both sides": {"causal": False},
    "window": {"causal": True, "window": 3},
    "window, both sides": {"causal": False, "window": 2},
    "a window of one": {"causal": True, "window": 1},
    "padding": {"causal": True, "real": PADDED},
    "padding, both sides": {"causal": False, "real": PADDED},
    "documents": {"causal": True, "documents": DOCUMENTS},
    "documents, both sides, padding": {"causal": False, "documents": DOCUMENTS, "real": PADDED},
    "after cached keys": {"causal": True, "queries": 3},
    "one query after cached keys": {"causal": True, "queries": 1},
    "cached keys, padding, window": {"causal": True, "queries": 3, "real": PADDED, "window": 4},
}


def drawn(queries: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Pair, Pair]:
    generator = torch.Generator().manual_seed(5)

    def tensor(heads: int, length: int) -> Tensor:
        made = torch.randn(3, length, heads * 5, generator=generator, dtype=torch.float64).to(dtype)
        return made.unflatten(-1, (heads, 5)).transpose(1, 2).requires_grad_()

    q = tensor(HEADS, queries)
    return q, Pair(tensor(groups, 7), tensor(groups, 7)), Pair(tensor(groups, queries), tensor(groups, queries))


def visible_of(case: dict) -> Visible:
    queries = case.get("queries", 7)
    masks = {name: None if case.get(name) is None else torch.tensor(case[name]) for name in ("real", "documents")}
    return Visible(queries, 7 - queries, case["causal"], CPU, **masks)


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_t2_every_form_is_the_definition_outputs_and_gradients(name, form, dtype, close, groups):
    case = CASES[name]
    q, others, own = drawn(case.get("queries", 7), groups, dtype)
    inputs = (q, *others, *own)
    wanted = looped(q, others, own, case, 0.7)
    found = FORMS[form](q, others, own, visible_of(case), Setting(case.get("window"), 0.7))
    torch.testing.assert_close(found, wanted, atol=close, rtol=close)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for mine, theirs in zip(
        gradients, torch.autograd.grad((wanted * weights).sum(), inputs, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=close, rtol=close)


@pytest.mark.parametrize("form", ["concat", "merge"])
def test_t2_forms_agree_beyond_the_length_where_the_kernel_changes(form):
    generator = torch.Generator().manual_seed(3)
    q, k, v, own_k, own_v = (
        torch.randn(1, 2, 523, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(5)
    )
    arguments = (q, Pair(k, v), Pair(own_k, own_v), Visible(523, 0, True, CPU), Setting(None, 0.7))
    found, wanted = FORMS[form](*arguments), overwrite(*arguments)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    for given in (q, k, v, own_k, own_v):
        mine, theirs = (torch.autograd.grad(x.square().sum(), given, retain_graph=True)[0] for x in (found, wanted))
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("changes", [{}, {"objective": "masked"}, {"attention": BASE["attention"] | {"kv_heads": 2}},
                                     {"attention": BASE["attention"] | {"window": 4, "qk_norm": "head"}}])  # fmt: skip
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_t2_whole_models_agree_in_every_form(changes, dtype, close):
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 9:] = mask[2, :4] = 0
    results = {}
    for form in ("overwrite", "concat", "merge", "auto"):
        made = model(caa(outer_ratio=1 / 8, form=form), TransectModel, dtype, **changes)
        hidden = made(input_ids=ids(3), attention_mask=mask).last_hidden_state
        hidden.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        results[form] = {"hidden": hidden.detach(), **{name: grad / scale for name, grad in gradients.items()}}
    for form in ("concat", "merge", "auto"):
        torch.testing.assert_close(results[form], results["overwrite"], atol=close, rtol=close)


# --- T3, T4, T5 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("layout", ["pre", "post", "none"])
def test_t3_contexts_that_are_the_input_give_plain_attention(layout, objective):
    """W2 = b2 = 0, so c = x; in a pre-norm layer also with the shared norm, since N_attn(h + 0) = x."""
    places = ["none", "attn"] if layout == "pre" else ["none"]
    shape = {"norm": {"layout": layout}, "objective": objective}
    plain = model("attention_only", TransectModel, **shape)
    for place in places:
        for path in ("raw", "none"):
            made = model(caa(outer_ratio=0, inner_norm=place, direct_path=path), TransectModel, **shape)
            with torch.no_grad():
                for layer in made.layers:
                    layer.attn.inner.down.weight.zero_()
                    layer.attn.inner.down.bias.zero_()
            assert not made.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
            found, wanted = (x(input_ids=ids()).last_hidden_state for x in (made, plain))
            torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("path", "first"), [("raw", 1), ("masked", 1), ("none", 0)])
def test_t4_a_context_reaches_later_positions_and_its_own_only_without_direct_path(path, first):
    made = model(caa(outer_ratio=0, direct_path=path), TransectModel, layers=1, norm={"layout": "post"})
    given, place = ids(), 5
    before = made(input_ids=given).last_hidden_state

    def change(_module, _inputs, output):
        hidden = output.hidden.clone()
        hidden[:, place, 0] += 1.0  # all of them alike would be lost in the norm
        return output._replace(hidden=hidden)

    made.layers[0].attn.inner.register_forward_hook(change)
    moved = (made(input_ids=given).last_hidden_state - before).abs().amax((0, 2))
    assert torch.equal(moved[: place + first], torch.zeros(place + first, dtype=torch.float64))
    assert (moved[place + first :] > 1e-6).all()


@pytest.mark.parametrize("path", ["raw", "masked", "none"])
@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("layout", ["pre", "post", "sandwich"])
def test_t5_at_ratio_one_the_layer_is_the_standard_one_to_the_last_bit(layout, objective, path):
    shape = {"norm": {"layout": layout}, "objective": objective, "dropout": 0.3}
    ours = model(caa(outer_ratio=1, direct_path=path), TransectModel, torch.float32, **shape)
    standard = model("standard", TransectModel, torch.float32, **shape)
    state = standard.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    results = []
    for made in (ours, standard):
        torch.manual_seed(3)
        hidden = made.train()(input_ids=ids()).last_hidden_state
        hidden.square().sum().backward()
        results.append([hidden, *(parameter.grad for parameter in made.parameters())])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


# --- T6, T7 ------------------------------------------------------------------------------------------------------


def paper(width: int, multiple: int, block: dict | str = "standard", **changes) -> ModelConfig:
    """The paper's decoders: post-norm, learned positions, everything with biases, a tied head, no extras."""
    given = {
        "vocab_size": 30_522,
        "width": width,
        "layers": 12,
        "max_positions": 128,
        "positions": "learned",
        "norm": {"layout": "post"},
        "attention": {"heads": 2 if width == 128 else 12},
        "ffn": {"multiple": multiple},
        "block": block,
        "dropout": 0.1,
    }
    return ModelConfig.parse(given | changes)


def parameters(settings: ModelConfig) -> tuple[int, int]:
    """Those of the whole model and of one layer."""
    with torch.device("meta"):
        made = TransectForCausalLM(TransectConfig(architecture=settings.plain()))
    return tuple(sum(x.numel() for x in part.parameters()) for part in (made, made.model.layers[0]))


@pytest.mark.parametrize(
    ("width", "multiple", "total", "layer"),
    [
        (128, 4, 6_302_464, None),
        (128, 32, 17_355_520, 1_119_360),
        (768, 4, 108_593_664, None),
        (768, 32, 505_213_440, 40_139_520),
    ],
)
def test_t6_t7_parameters_of_the_papers_models(width, multiple, total, layer):
    found = parameters(paper(width, multiple))
    assert found[0] == total
    assert layer is None or found[1] == layer


@pytest.mark.parametrize("width", [128, 768])
def test_t6_parameters_of_caa(width):
    wide = parameters(paper(width, 32))[1]

    def more(**options) -> int:
        return parameters(paper(width, 32, caa(**options), layers=1))[1] - wide

    for ratio in (1 / 8, 3 / 8, 7 / 8):
        assert more(outer_ratio=ratio, inner_norm="none") == width
        assert more(outer_ratio=ratio) == 3 * width  # in a post-norm layer the inner norm is the default
        assert more(outer_ratio=ratio, shared_kv=False) == 3 * width + 2 * (width * width + width)
    assert more(outer_ratio=0, inner_norm="none") == -2 * width
    assert more(outer_ratio=0) == 0
    assert more(outer_ratio=0, drop_outer_norm_at_r0=False) == 2 * width
    assert more(outer_ratio=1) == 0
    pre = [parameters(paper(width, 32, block, layers=1, norm={"layout": "pre"}))[1] for block in (caa(), "standard")]
    assert pre[0] - pre[1] == 3 * width
    separate = 12 * 2 * 768 * 768
    assert round(separate / 1e6, 1) == 14.2  # what own projections would add to the large model


def test_widths_of_cea():
    """m = 32d at the causal split: outer 4d, inner 28d; a masked model keeps nothing outside."""
    with torch.device("meta"):
        causal = TransectModel(TransectConfig(architecture=paper(768, 32, "caa").plain())).layers[0]
        masked = TransectModel(TransectConfig(architecture=paper(768, 32, "caa", objective="masked").plain())).layers[0]
    assert (causal.ffn.up.out_features, causal.attn.inner.up.out_features) == (4 * 768, 28 * 768)
    assert masked.ffn is None and masked.attn.inner.up.out_features == 32 * 768


# --- T14 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["moe", "inner"])
@pytest.mark.parametrize(("gate", "moves"), [("softmax_all", True), ("softmax_kept", False)])
def test_t14_a_router_with_one_kept_logit_learns_only_from_the_softmax_over_all(gate, moves, place):
    selector = {"kind": "switch", "gate": gate, "balance": 0.0}
    mixture = {"kind": "sparse", "blocks": 7, "active_blocks": 1, "block_size": 5, "selector": selector}
    block = {"kind": "moe_before_ffn", "moe": mixture} if place == "moe" else caa(inner=mixture)
    made = model(block, TransectForCausalLM)
    made(input_ids=ids(), labels=ids()).loss.backward()
    routers = {name: parameter for name, parameter in made.named_parameters() if "router" in name}
    assert len(routers) == 2
    for router in routers.values():
        assert bool(router.grad.abs().max() > 1e-9) is moves


# --- T15 ---------------------------------------------------------------------------------------------------------


PATHS = [
    ("raw", "auto"),
    ("raw", "overwrite"),
    ("raw", "concat"),
    ("raw", "merge"),
    ("masked", "auto"),
    ("none", "auto"),
]
ATTENTIONS = [{}, {"kv_heads": 2, "window": 5}, {"weights": "linear"}]
DECODED = [
    (*pair, attention)
    for pair in PATHS
    for attention in ATTENTIONS
    if attention.get("weights") != "linear" or pair[1] not in ("concat", "merge")
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("path", "form", "attention"), DECODED)
def test_t15_decoding_with_a_cache_is_the_full_forward(path, form, attention, padded):
    made = model(caa(direct_path=path, form=form), attention=BASE["attention"] | attention)
    given, mask = ids(3), torch.ones(3, LENGTH, dtype=torch.long)
    if padded:
        mask[1, :3] = mask[2, :5] = 0
    whole = made(input_ids=given, attention_mask=mask).logits
    cache, parts = None, []
    for start, end in ((0, 6), (6, 7), (7, 11), (11, 12), (12, LENGTH)):
        step = made(input_ids=given[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        parts.append(step.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", ["raw", "masked", "none"])
def test_t15_generate_says_the_same_with_and_without_cache(path):
    made = model(caa(direct_path=path))
    given = ids(2, 5)
    texts = [
        made.generate(given, max_new_tokens=9, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert texts[0].shape == (2, 14) and torch.equal(*texts)


# --- the block's other settings -------------------------------------------------------------------------------------


def contexts(made: TransectModel, x: Tensor) -> Tensor:
    """What keys are made of, in the first layer."""
    seen = []
    made.layers[0].attn.k.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    made(inputs_embeds=x)
    return seen[0]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layout", ["pre", "post"])
def test_contexts_are_what_the_table_says(layout, residual):
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    places = ("post", "none") + (("attn",) if layout == "pre" else ())
    for place in places:
        options = caa(outer_ratio=0.5, inner_norm=place, inner_residual=residual, direct_path="none")
        made = model(options, TransectModel, layers=1, norm={"layout": layout})
        layer = made.layers[0]
        attn, norm = layer.attn, layer.attn_residual.norm
        entered = norm(x) if layout == "pre" else x

        def inner(given: Tensor, attn=attn) -> Tensor:
            return attn.inner(given, None, None).hidden

        if place == "attn":
            wanted = norm(residual * x + inner(attn.inner_norm(x)))
        else:
            wanted = residual * entered + inner(entered)
            wanted = wanted if place == "none" else attn.inner_norm(wanted)
        torch.testing.assert_close(contexts(made, x), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("attention", [{}, {"qk_norm": "head", "kv_heads": 2}, {"qk_norm": "full"}])
def test_raw_pairs_with_maps_of_their_own(attention):
    """Maps equal to the contexts' own are the shared ones, rotation and norms included; else each map has its say."""
    changes = {"attention": BASE["attention"] | attention, "layers": 1}
    shared = model(caa(outer_ratio=0.5), TransectModel, **changes)
    made = model(caa(outer_ratio=0.5, shared_kv=False), TransectModel, **changes)
    attn = made.layers[0].attn
    with torch.no_grad():
        for norm in (shared.layers[0].attn.k_norm, shared.layers[0].attn.q_norm):
            if norm is not None:
                norm.weight.copy_(torch.linspace(0.5, 2, norm.weight.numel()))
    assert not made.load_state_dict(shared.state_dict(), strict=False).unexpected_keys
    attn.own_k.load_state_dict(attn.k.state_dict())
    attn.own_v.load_state_dict(attn.v.state_dict())
    wanted = shared(input_ids=ids()).last_hidden_state
    torch.testing.assert_close(made(input_ids=ids()).last_hidden_state, wanted, atol=1e-12, rtol=1e-12)
    for changed, first in ((attn.own_k, 1), (attn.own_v, 0)):  # row 0 has nothing but its own pair: no key matters
        with torch.no_grad():
            changed.weight.neg_()
        moved = (made(input_ids=ids()).last_hidden_state - wanted).detach().abs().amax((0, 2))
        assert float(moved[first:].min()) > 1e-4 and float(moved[:first].sum()) < 1e-12
        with torch.no_grad():
            changed.weight.neg_()


def test_dropout_reaches_what_the_inner_ffn_adds_but_not_the_stream():
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = caa(outer_ratio=0.5, inner_norm="none", direct_path="none")
    made = model(options, TransectModel, layers=1, norm={"layout": "post"}, dropout=0.5)
    whole = contexts(made, x) - x
    made.layers[0].train()  # the embedding's own dropout stays off
    drawn = contexts(made, x) - x
    lost = drawn.abs() < 1e-12
    assert 0.3 < float(lost.double().mean()) < 0.7
    torch.testing.assert_close(drawn[~lost], 2 * whole[~lost], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("layout", "place"),
    [("post", "post"), ("pre", "attn"), ("sandwich", "attn"), ("branch", "none"), ("none", "none")],
)
def test_where_contexts_are_normed_if_nothing_is_said(layout, place):
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shape = {"layers": 1, "norm": {"layout": layout}}
    default, said = (
        contexts(model(caa(outer_ratio=0.5, **given), TransectModel, **shape), x)
        for given in ({}, {"inner_norm": place})
    )
    assert torch.equal(default, said)


def test_without_an_outer_ffn_a_post_norm_layer_may_keep_its_second_norm():
    options = caa(outer_ratio=0, drop_outer_norm_at_r0=False)
    kept = model(options, TransectModel, layers=1, norm={"layout": "post"})
    norm = kept.layers[0].outer_norm
    bare = model(caa(outer_ratio=0), TransectModel, layers=1, norm={"layout": "post"})
    assert bare.load_state_dict(kept.state_dict(), strict=False).unexpected_keys == [
        f"layers.0.outer_norm.{name}" for name, _ in norm.named_parameters()
    ]
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, WIDTH))
    found, before = (x(input_ids=ids()).last_hidden_state for x in (kept, bare))
    torch.testing.assert_close(found, norm(before), atol=1e-12, rtol=1e-12)
    assert float((found - before).detach().abs().max()) > 0.1


def test_a_hash_inside_is_drawn_apart_from_the_one_outside():
    ffn = {"kind": "sparse", "blocks": 24, "active_blocks": 8, "block_size": 3, "selector": "rand_hash"}
    made = model(caa(outer_ratio=0.5), TransectModel, ffn=ffn)
    tables = [part.selector.table for layer in made.layers for part in (layer.ffn, layer.attn.inner)]
    assert len({tuple(table.flatten().tolist()) for table in tables}) == len(tables) == 4


def test_a_mixture_inside_leaves_the_ffn_outside_whole_and_returns_its_losses():
    mixture = {"kind": "sparse", "blocks": 7, "active_blocks": 1, "block_size": 5, "selector": "switch"}
    made = model(caa(inner=mixture, direct_path="masked")).train()
    layer = made.model.layers[0]
    assert layer.ffn.up.out_features == UNITS and layer.attn.inner.memory.blocks == 7
    output = made(input_ids=ids(), labels=ids())
    assert set(output.losses) == {"main", "inner.balance"}
    assert float(output.losses["inner.balance"].detach()) > 0
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    assert any(name.startswith("layers.1.inner.") for name in output.stats)


def test_a_sparse_ffn_is_split_by_blocks():
    ffn = {"kind": "sparse", "blocks": 24, "active_blocks": 8, "block_size": 3, "selector": "switch"}
    made = model(caa(outer_ratio=1 / 8), ffn=ffn)
    layer = made.model.layers[0]
    assert (layer.ffn.memory.blocks, layer.ffn.active) == (3, 1)
    assert (layer.attn.inner.memory.blocks, layer.attn.inner.active) == (21, 7)
    assert set(made(input_ids=ids(), labels=ids()).losses) == {"main", "balance", "inner.balance"}


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_empty_rows_read_nothing_the_sink_or_their_own_value(objective):
    """Row 0 of a causal model; of a masked one a text that is one token long."""
    given = ids(2, 5)
    mask = torch.ones(2, 5, dtype=torch.long)
    row, place = 0, 0
    if objective == "masked":
        mask[1, 1:] = 0
        row = 1
    heads = {}
    for empty in ("zero", "sink", "raw"):
        made = model(caa(outer_ratio=0.5, direct_path="masked", empty_row=empty), TransectModel, objective=objective)
        attn = made.layers[0].attn
        seen = []
        attn.v.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
        attn.out.register_forward_pre_hook(lambda _module, inputs, empty=empty: heads.update({empty: inputs[0]}))
        made(input_ids=given, attention_mask=mask)
        wanted = {
            "zero": torch.zeros(HEADS * HEAD_WIDTH, dtype=torch.float64),
            "sink": attn.sink.flatten() if attn.sink is not None else None,
            "raw": attn.v(seen[-1][row, place]),
        }[empty]
        torch.testing.assert_close(heads[empty][row, place], wanted, atol=1e-12, rtol=1e-12)
    others = mask.bool()
    others[:, 0] = objective == "masked"
    others[row, place] = False
    assert float(heads["zero"].detach()[others].abs().amax(-1).min()) > 1e-3


REFUSED = {
    "block.outer_ratio": [caa(outer_ratio=1 / 3), caa(outer_ratio=1 / 8, inner="dense"), caa(outer_ratio=1.5)],
    "block.inner_norm": [caa(inner_norm="attn")],
    "block.empty_row": [caa(empty_row="sink")],
    "block.shared_kv": [caa(shared_kv=False, direct_path="masked")],
    "block.form": [caa(form="merge", direct_path="none")],
    "block.inner.multiple": [caa(inner={"kind": "dense", "multiple": 0.3})],
}


@pytest.mark.parametrize("path", REFUSED)
def test_contradictions_are_refused_in_one_line(path):
    for block in REFUSED[path]:
        with pytest.raises(InputError) as refusal:
            settings(block, norm={"layout": "post"})
        assert str(refusal.value).startswith(path + " ") and "\n" not in str(refusal.value)


MIXTURE = {"kind": "sparse", "blocks": 8, "block_size": 3, "active_blocks": 4}
SPLITS = [
    (
        MIXTURE | {"selector": {"kind": "top_k", "groups": 4}},
        0.25,
        r"ffn\.selector\.groups is 4: must divide the 2 blocks",
    ),
    (
        MIXTURE | {"active_blocks": 2, "selector": {"kind": "gshard", "capacity": None}},
        0.5,
        r"ffn\.active_blocks is 1: selector gshard reads two blocks; give 2",
    ),
    ({"kind": "dense", "multiple": 1.3}, 0.5, r"ffn\.multiple is 1\.3: times width 11"),
]


@pytest.mark.parametrize(("ffn", "ratio", "said"), SPLITS, ids=["groups", "gshard", "multiple"])
def test_each_part_of_a_split_must_fit(ffn, ratio, said):
    with pytest.raises(InputError, match=said) as refusal:
        settings(caa(outer_ratio=ratio), ffn=ffn)
    assert "\n" not in str(refusal.value)
    if ffn["kind"] == "sparse":
        assert f"attention, block.outer_ratio {ratio})" in str(refusal.value)


def test_only_the_parts_of_a_split_must_fit():
    """GShard reads two blocks: four can be halved."""
    gshard = MIXTURE | {"selector": {"kind": "gshard", "capacity": None}}
    made = model(caa(outer_ratio=0.5), ffn=gshard)
    layer = made.model.layers[0]
    assert (layer.ffn.active, layer.attn.inner.active) == (2, 2)
    assert made(ids()).logits.isfinite().all()
    with pytest.raises(InputError, match=r"ffn\.active_blocks is 4"):
        settings(caa(outer_ratio=1), ffn=gshard)
    with pytest.raises(InputError, match=r"block\.inner\.active_blocks is 4"):
        settings(caa(inner=gshard))
    with pytest.raises(InputError, match=r"ffn\.active_blocks is 4"):
        settings(caa(inner={"kind": "dense", "width": 5}), ffn=gshard)


def test_forms_that_cannot_are_refused():
    for attention in ({"weights": "linear"}, {"dropout": 0.1}):
        with pytest.raises(InputError, match=r"block\.form is 'merge'"):
            settings(caa(form="merge"), attention=BASE["attention"] | attention)
    with pytest.raises(InputError, match="drop_outer_norm_at_r0"):
        settings(caa(outer_ratio=0, drop_outer_norm_at_r0=False))


def test_dropped_weights_keep_their_mean():
    """Dropout of attention's weights in training: unbiased, and of own pairs too."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, own_k, own_v = (torch.randn(1, 1, 3, 5, generator=generator, dtype=torch.float64) for _ in range(5))
    arguments = (q, Pair(k, v), Pair(own_k, own_v), Visible(3, 0, True, CPU))
    wanted = overwrite(*arguments, Setting(None, 0.5))
    torch.manual_seed(0)
    for form in ("overwrite", "concat"):
        drawn = torch.stack([FORMS[form](*arguments, Setting(None, 0.5, dropout=0.5)) for _ in range(4000)])
        assert float((drawn.mean(0) - wanted).abs().max()) < 6 * float(drawn.std(0).max()) / math.sqrt(4000)
        assert float(drawn[:, 0, 0, 0].std(0).min()) > 0.1  # row 0 has nothing but its own pair
    with pytest.raises(ValueError, match="dropout"):
        FORMS["merge"](*arguments, Setting(None, 0.5, dropout=0.5))
