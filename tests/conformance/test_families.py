"""Every model family of `families.py` is seen through sites that mean the same thing in all of them."""

import functools
import re

import pytest
import torch

from families import EXPERTS_PER_TOKEN, FAMILIES, VARIANTS, family, random_ids, tiny_model
from transect.errors import InputError
from transect.view.sites import NEXT, SITES
from transect.view.view import View
from transect.view.walk import Walk

REFUSED = "bloom/post_norm_residual"
NAMES = [name for name in (*FAMILIES, *VARIANTS) if name != REFUSED]
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
SPARSE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")

LAYOUTS = {
    "post_norm": "bert roberta distilbert electra albert albert/two_groups albert/two_inner opt/post_norm",
    "pre_norm": "modernbert gpt2 gpt_neo opt bloom llama mistral qwen2 qwen3 phi3 olmo stablelm starcoder2 smollm3 "
    "mixtral olmoe qwen2_moe qwen3_moe deepseek_v3 gpt_oss gpt_neox/sequential falcon/sequential stablelm/qk_norm "
    "olmo/clip_qkv llama/biases llama/tied gpt2/scaled_by_layer mistral/sliding qwen2/sliding qwen3/sliding "
    "qwen2_moe/mixed qwen3_moe/mixed deepseek_v3/all_sparse deepseek_v3/plain_query",
    "pre_norm_scaled": "granite",
    "output_norm": "olmo2",
    "sandwich_norm": "gemma2 gemma3_text gemma2/full_first",
    "parallel": "gpt_neox gptj falcon phi cohere falcon/new_decoder falcon/new_decoder_one_norm falcon/alibi "
    "stablelm/parallel phi/qk_norm cohere/qk_norm",
}
LAYOUT = {name: layout for layout, names in LAYOUTS.items() for name in names.split()}

POST_NORMS = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "electra": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "albert": ("albert_layers.0.attention.LayerNorm", "albert_layers.0.full_layer_layer_norm"),
    "albert/two_groups": ("albert_layers.0.attention.LayerNorm", "albert_layers.0.full_layer_layer_norm"),
    "albert/two_inner": ("attention.LayerNorm", "full_layer_layer_norm"),
    "opt/post_norm": ("self_attn_layer_norm", "final_layer_norm"),
}


@functools.cache
def view_of(name: str, dtype: torch.dtype = torch.float64) -> View:
    return View(tiny_model(name, dtype))


def ids_for(name: str, rows: int = 3, positions: int = 11) -> torch.Tensor:
    return random_ids((rows, positions), torch.Generator().manual_seed(len(name)))


@functools.cache
def captured(name: str) -> dict[tuple[str, int], torch.Tensor]:
    """Every site of every layer of one pass."""
    view, seen = view_of(name), {}
    for layer, known in enumerate(view.maps):
        with torch.no_grad(), view.capture(list(known.taps), [layer]) as capture:
            view.run(ids_for(name))
        seen |= {key: capture[key] for key in capture.keys()}  # noqa: SIM118
    return seen


def test_the_layout_table_covers_every_family():
    assert set(LAYOUT) == set(NAMES)
    assert {name for name, layout in LAYOUT.items() if layout == "post_norm"} == set(POST_NORMS)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_view_is_proven(name, dtype):
    view = view_of(name, dtype)
    assert view.dtype == dtype
    assert view.proof.worst.residual <= BOUNDS[dtype]
    assert {identity.layer for identity in view.proof.identities} == set(range(view.num_layers))
    assert view.proof.inert == ()
    assert view.layouts == (LAYOUT[name],) * view.num_layers


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_residual_taken_after_the_norm_is_refused(dtype):
    with pytest.raises(InputError, match=r"layer at h\.0: "):
        View(tiny_model(REFUSED, dtype))


@pytest.mark.parametrize("name", NAMES)
def test_number_of_layers_is_the_one_configured(name):
    inner = 2 if name == "albert/two_inner" else 1
    assert view_of(name).num_layers == family(name).layers * inner


@pytest.mark.parametrize("name", NAMES)
def test_every_site_exists_or_has_a_reason(name):
    for known in view_of(name).maps:
        assert set(known.taps) | set(known.missing) == set(SITES)
        assert not set(known.taps) & set(known.missing)
        expected = {"resid", "attn_in", "heads_out", "attn_out", "ffn_in", "ffn_out", NEXT}
        routing = {"router_logits", "selected", "selected_weights"}
        expected |= routing if known.sparse else {"ffn_pre", "ffn_act", "ffn_hidden"}
        expected |= set() if known.parallel else {"resid_mid"}
        assert set(known.taps) == expected


@pytest.mark.parametrize("name", NAMES)
def test_sparse_layers_are_the_configured_ones(name):
    sparse = [known.sparse for known in view_of(name).maps]
    expected = [name.split("/")[0] in SPARSE] * len(sparse)
    if name in ("qwen2_moe/mixed", "qwen3_moe/mixed"):
        expected = [index != 1 for index in range(3)] if name == "qwen2_moe/mixed" else [False, True, False]
    if name in ("deepseek_v3", "deepseek_v3/plain_query"):
        expected[0] = False
    assert sparse == expected


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_ffn_are_not_confused(name):
    for known in view_of(name).maps:
        assert "att" in known.taps["heads_out"].module
        for site in {"ffn_in", "ffn_pre", "ffn_hidden"} & set(known.taps):
            assert not re.search("attn|attention", known.taps[site].module)


@pytest.mark.parametrize("name", NAMES)
def test_residual_algebra_of_captured_tensors(name):
    view, seen = view_of(name), captured(name)
    for layer in range(view.num_layers):
        resid, attn, ffn, after = (seen[site, layer] for site in ("resid", "attn_out", "ffn_out", NEXT))
        if LAYOUT[name] == "parallel":
            torch.testing.assert_close(after, resid + attn + ffn, rtol=0, atol=1e-12)
        else:
            paths = POST_NORMS.get(name)
            norms = [view.layers[layer].get_submodule(path) for path in paths] if paths else [torch.nn.Identity()] * 2
            with torch.no_grad():
                torch.testing.assert_close(seen["resid_mid", layer], norms[0](resid + attn), rtol=0, atol=1e-12)
                torch.testing.assert_close(after, norms[1](seen["resid_mid", layer] + ffn), rtol=0, atol=1e-12)
        if layer:
            assert torch.equal(resid, seen[NEXT, layer - 1])


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[0] in SPARSE])
def test_router_scores_choose_the_selected_blocks(name):
    view, seen = view_of(name), captured(name)
    for layer, known in enumerate(view.maps):
        if not known.sparse:
            continue
        router = view.layers[layer].get_submodule(known.taps["router_logits"].module)
        logits, selected = seen["router_logits", layer], seen["selected", layer]
        assert selected.shape[-1] == EXPERTS_PER_TOKEN
        weights = router.weight.detach()
        expected = torch.nn.functional.linear(seen["ffn_in", layer], weights, getattr(router, "bias", None))
        torch.testing.assert_close(logits, expected.to(logits.dtype).detach(), rtol=0, atol=1e-5)
        if not name.startswith("deepseek"):  # limits the choice to groups and corrects the scores
            best = logits.topk(EXPERTS_PER_TOKEN, dim=-1).indices
            assert torch.equal(best.sort(-1).values, selected.sort(-1).values)


@pytest.mark.parametrize("name", NAMES)
def test_noise_in_a_site_changes_the_output(name):
    view, ids = view_of(name), ids_for(name, rows=2, positions=7)
    generator = torch.Generator().manual_seed(1)

    def disturbed(_, tensor):
        return tensor + torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    with torch.no_grad():
        plain = view.run(ids, head=True)
        for layer, known in enumerate(view.maps):
            # the model goes on with the scores' softmax, not with the scores it returns beside it
            for site in set(known.taps) - {"selected", "router_logits"}:
                tap = known.readers[site][0] if site in known.readers else known.taps[site]
                with Walk(view) as walk:
                    walk.tap(layer, tap, disturbed)
                    assert (view.run(ids, head=True) - plain).abs().max() > 1e-6, (site, layer)
        assert torch.equal(view.run(ids, head=True), plain)


@pytest.mark.parametrize("name", NAMES)
def test_sites_do_not_depend_on_the_rest_of_the_batch(name):
    view, whole = view_of(name), captured(name)
    row = ids_for(name)[1:2]
    padded = torch.cat([row, row.flip(1), row], dim=1).repeat(2, 1)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[row.shape[1]], [padded.shape[1]]])
    for ids, keep in ((row, None), (padded, mask)):
        for layer, known in enumerate(view.maps):
            with torch.no_grad(), view.capture(list(known.taps), [layer]) as capture:
                view.run(ids, keep)
            for site in known.taps:
                alone = capture[site, layer][:1, : row.shape[1]]
                torch.testing.assert_close(alone, whole[site, layer][1:2], rtol=1e-5, atol=1e-5, msg=f"{site}[{layer}]")


@pytest.mark.parametrize("name", NAMES)
def test_capture_takes_only_what_is_asked_for(name):
    view = view_of(name)
    with torch.no_grad(), view.capture(("ffn_out", "resid"), [1]) as capture:
        other = [m for m in view.layers[2].modules() if m is not view.layers[2]]
        shared = view.layers[2] is view.layers[1]
        assert shared or not any(m._forward_hooks or m._forward_pre_hooks for m in other)
        view.run(ids_for(name))
    assert sorted(capture.keys()) == [("ffn_out", 1), ("resid", 1)]
    assert ("ffn_out", 0) not in capture
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in view.model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_stream_is_hugging_face_hidden_states(name):
    view = view_of(name)
    with torch.no_grad(), view.capture(("resid", NEXT)) as capture:
        output = view.base(input_ids=ids_for(name), output_hidden_states=True)
    assert len(output.hidden_states) == view.num_layers + 1
    for layer, hidden in enumerate(output.hidden_states[:-1]):
        assert torch.equal(capture["resid", layer], hidden)
    # the trap: the last entry is what leaves the final norm, where there is one
    stream = capture[NEXT, view.num_layers - 1]
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(stream, output.last_hidden_state) == (LAYOUT[name] == "post_norm" and name != "opt/post_norm")


@pytest.mark.parametrize("name", NAMES)
def test_last_stream_is_before_the_final_norm(name):
    view = view_of(name)
    with torch.no_grad(), view.capture((NEXT,), [view.num_layers - 1]) as capture:
        last = view.run(ids_for(name))
        stream = capture[NEXT, view.num_layers - 1]
        if LAYOUT[name] == "post_norm":
            assert view.final_norm is None
            projected = view.base.decoder.project_out(stream) if name == "opt/post_norm" else stream
            assert torch.equal(projected, last)
        else:
            assert torch.equal(view.final_norm(stream), last)
            assert (stream - last).abs().max() > 1e-2
