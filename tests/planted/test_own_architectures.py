"""Own architectures whose measurements are known in advance."""

import numpy as np
import pytest
import torch

import transect as tx
from own_models import BLOCKS, WIDTH, own_model
from plants import only, text, value
from transect.models.positions import rotary_angles, rotate
from transect.view import edits
from transect.view.sites import ELEMENTS, NEXT, present
from transect.view.view import View

MASK_ID = 3


def contribution(**options) -> tx.probes.Contribution:
    return tx.probes.Contribution(mask_id=MASK_ID, tp_min_count=3, mi_clusters=5, mi_seeds=2, **options)


@pytest.mark.parametrize("name", ["caa/r0", "caa/r0_post", "caa/r0_post_kept_norm", "attention_only/gelu"])
def test_without_an_outer_ffn_all_of_the_gain_is_attentions(name):
    """The FFN inside attention counts with attention: every step, and the whole cumulative sum, is attention's."""
    view = View(own_model(name))
    table = tx.measure(view, [contribution()], text(61))
    steps = [row for row in table if (row.variant or "").endswith("/increment")]
    assert {row.element for row in steps} == {"attn"}
    for row in table.where(metric="share_ffn"):
        assert row.value == 0.0 if row.value is not None else row.reason
    for row in table:
        if (row.variant or "").endswith("/cumulative") and row.element == "ffn":
            assert row.value == 0.0


def test_both_ffns_of_a_layer_count_as_ffn():
    view = View(own_model("moe_before_ffn"))
    table = tx.measure(view, [contribution(estimators=("lens_loss",))], text(61))
    levels = {(r.site, r.layer): r.value for r in table if r.variant == "causal"}
    total = 0.0
    for layer in range(view.num_layers):
        ends = [levels["resid_mid", layer], levels["resid_mid2", layer], levels["resid", layer + 1]]
        for part, before, after in (("ffn", ends[0], ends[1]), ("ffn2", ends[1], ends[2])):
            step = value(table, variant="causal/increment", element="ffn", part=part, layer=layer)
            np.testing.assert_allclose(step, after - before, rtol=0, atol=1e-12)
            total += step
        whole = value(table, variant="causal/cumulative", element="ffn", layer=layer)
        np.testing.assert_allclose(whole, total, rtol=0, atol=1e-10)


def test_two_ffns_added_at_once_are_one_step_of_the_ffn():
    view = View(own_model("moe_before_ffn/parallel"))
    table = tx.measure(view, [contribution(estimators=("lens_loss",))], text(61))
    steps = table.where(variant="causal/increment")
    assert [(row.element, row.part) for row in steps] == [("attn", None), ("ffn", "ffn+ffn2")] * view.num_layers
    own = {part: sum(row.value for row in steps if row.element == part) for part in ("attn", "ffn")}
    for part, total in own.items():
        whole = value(table, variant="causal/cumulative", element=part, layer=view.num_layers - 1)
        np.testing.assert_allclose(whole, total, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "element", "weight"),
    [("residual/number", "ffn", -1.3), ("residual/number_post", "attn", 0.7), ("residual/number_post", "ffn", 1.9)],
)
def test_residual_elements_carry_the_models_number(name, element, weight):
    """The residual element's output is number * stream + branch, before the norm of a post-norm layer."""
    view = View(own_model(name, torch.float64))
    known = view.maps[1]
    found = present(ELEMENTS[f"{element}_residual"], known)
    source, branch = ("resid", "attn_out") if element == "attn" else ("resid_mid", "ffn_out")
    if known.addition(element).norm is None:
        assert (found.source, found.target, found.add) == (source, NEXT, None)
    else:
        assert found.output == f"{branch}+{source}*{weight}"
    ids = torch.arange(5, 16)[None]
    with torch.no_grad(), view.capture((source, branch, NEXT, "resid_mid"), [1]) as seen:
        view.run(ids)
    total = weight * seen[source, 1] + seen[branch, 1]
    norm = known.addition(element).norm
    after = seen[known.addition(element).target, 1]
    if norm is not None:
        total = view.layers[1].get_submodule(norm)(total).detach()
    torch.testing.assert_close(after, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["residual/number", "residual/number_post", "moe_before_ffn/number", "caa/cancelled"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_a_given_weight_takes_the_place_of_the_models_number(name, weight):
    view, ids = View(own_model(name, torch.float64)), torch.arange(5, 16)[None]
    known, layer = view.maps[1], view.layers[1]
    streams = [site for addition in known.additions for site in (addition.source, addition.target)]
    with torch.no_grad(), view.capture(("attn_out",), [1]) as plain:
        view.run(ids)
    with torch.no_grad(), edits.scale_residual(view, 1, weight), view.capture(streams, [1]) as seen:
        view.run(ids)
    for addition in known.additions:
        (name,), source = addition.adds, seen[addition.source, 1]
        branch = plain["attn_out", 1]
        with torch.no_grad():
            if name != "attn":
                entered = layer.get_submodule(f"{name}_residual").enter(source)
                branch = layer.get_submodule(name)(entered, ids, None).hidden
            norm = layer.get_submodule(addition.norm) if addition.norm else torch.nn.Identity()
            torch.testing.assert_close(seen[addition.target, 1], norm(weight * source + branch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["residual/number", "residual/number_post", "residual/learned", "caa/cancelled"])
@pytest.mark.parametrize("element", ["attn_sublayer", "attn_residual", "ffn_sublayer", "ffn_residual"])
def test_an_element_replaced_by_itself_changes_nothing(name, element):
    """A replacement that adds number * stream to the branch is what the model does there already."""
    view, ids = View(own_model(name, torch.float64)), torch.arange(5, 18)[None]
    half = element.partition("_")[0]
    addition = view.maps[1].addition(half)
    with torch.no_grad(), view.capture((f"{half}_out", addition.target), [1]) as seen:
        expected = view.run(ids, head=True)
    branch, after = seen[f"{half}_out", 1], seen[addition.target, 1]
    whole = element.endswith("_sublayer")
    with torch.no_grad(), edits.replace(view, element, 1, lambda x: after if whole else addition.number * x + branch):
        torch.testing.assert_close(view.run(ids, head=True), expected, rtol=0, atol=1e-10)


def test_an_inner_ffn_that_is_removed_leaves_the_plain_contexts():
    """Without its FFN and with a residual and no norm, a context is the state itself: plain attention."""
    view = View(own_model("caa/inner_post", torch.float64))
    ids = torch.arange(5, 16)[None]
    with torch.no_grad(), edits.remove(view, "inner_ffn", 1), view.capture(("attn_in", "attn_out"), [1]) as seen:
        view.run(ids)
    attention = view.layers[1].attn
    x = seen["attn_in", 1]
    context = attention.inner_norm(x)
    q, k, v = attention.q(x), attention.k(context), attention.v(context)
    own_k, own_v = attention.k(x), attention.v(x)
    heads = []
    turned = _rotated(attention, q, k, own_k)
    for head in range(attention.heads):
        part = slice(head * attention.head_width, (head + 1) * attention.head_width)
        query, key, own = (one[0, head] for one in turned)
        scores = query @ key.T
        scores.diagonal().copy_((query * own).sum(-1))
        scores = (scores * attention.scale).masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
        weights = scores.softmax(-1)
        mine = torch.diag(weights)
        heads.append((weights - torch.diag(mine)) @ v[0, :, part] + mine[:, None] * own_v[0, :, part])
    torch.testing.assert_close(seen["attn_out", 1][0], attention.out(torch.cat(heads, -1)), rtol=0, atol=1e-10)


def _rotated(attention, *states):
    positions = torch.arange(states[0].shape[1])[None]
    angles = rotary_angles(attention.rotary, attention.head_width, positions, states[0])
    return [rotate(x.unflatten(-1, (-1, attention.head_width)).transpose(1, 2), angles) for x in states]


def test_a_linear_inner_ffn_scores_one():
    model = own_model("caa/no_direct_path")
    for layer in model.model.layers:
        layer.attn.inner.act.function = lambda x: x
    table = tx.measure(View(model), [tx.probes.Nonlinearity(elements=("inner_ffn", "ffn"), cosine=())], text(83))
    for layer in range(3):
        assert value(table, metric="r2_heldout", layer=layer, element="inner_ffn") > 1 - 1e-6
        assert value(table, metric="r2_heldout", layer=layer, element="ffn") < 0.999


def test_a_second_ffn_and_one_inside_are_measured_where_they_are():
    asked = tx.probes.Nonlinearity()
    for name, found in (("caa", {"inner_ffn"}), ("standard", set()), ("attention_only", set())):
        table = tx.measure(View(own_model(name)), [asked], text(31))
        assert {row.element for row in table} - set(asked.elements) == found
    table = tx.measure(View(own_model("moe_before_ffn")), [asked], text(31))
    rare = {row.element for row in table} - set(asked.elements)
    assert rare == {"ffn2", "ffn2_up", "ffn2_residual", "ffn2_sublayer", "ffn2_norm"}


def test_load_of_a_hash_router_is_that_of_its_table():
    view, data = View(own_model("sparse/rand_hash", torch.float64)), text(47)
    table = tx.measure(view, [tx.probes.Routing(linearity=False, removal=False)], data)
    for layer in range(view.num_layers):
        chosen = view.layers[layer].ffn.selector.table[torch.from_numpy(data.ids.astype(np.int64))]
        load = np.bincount(chosen.flatten().numpy(), minlength=BLOCKS) / chosen.numel()
        for block in range(BLOCKS):
            found = value(table, metric="load", layer=layer, part=f"expert {block}")
            np.testing.assert_allclose(found, load[block], rtol=0, atol=1e-12)
        assert value(table, metric="drop_fraction", layer=layer) == 0


def test_dropped_choices_are_counted():
    view, data = View(own_model("sparse/gshard_in_order", torch.float64)), text(47)
    table = tx.measure(view, [tx.probes.Routing(linearity=False, removal=False)], data, batch_size=7)
    dropped = [value(table, metric="drop_fraction", layer=layer) for layer in range(view.num_layers)]
    assert all(0 < share < 1 for share in dropped)


def test_of_many_blocks_evenly_spaced_ones_have_rows():
    """The layer's own numbers stay those of all blocks, and the rows there are do not depend on which others are."""
    view, data = View(own_model("sparse/vanilla_m", torch.float64)), text(47)
    options = {"removal_sample": 41, "mask_id": MASK_ID, "min_rows": WIDTH + 2}
    whole, some = (tx.measure(view, [tx.probes.Routing(most_experts=n, **options)], data) for n in (36, 5))
    for layer in range(view.num_layers):
        loads = some.where(metric="load", layer=layer).rows
        assert [row.part for row in loads] == [f"expert {number}" for number in (0, 7, 14, 21, 28)]
        for metric in ("entropy", "dead_fraction", "drop_fraction"):
            a, b = (value(table, metric=metric, layer=layer) for table in (whole, some))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        for row in some.where(layer=layer):
            if row.part is None or row.value is None:
                continue
            twin = only(whole, metric=row.metric, layer=layer, part=row.part)
            np.testing.assert_allclose(row.value, twin.value, rtol=1e-9, atol=1e-12, err_msg=f"{row.metric} {row.part}")
        layer_wide = only(some, metric="type_preference", layer=layer, part=None)
        assert layer_wide.value is None and layer_wide.reason == "5 of the 36 experts are looked at"


def test_influence_of_a_value_only_memory_by_hand():
    view, data = View(own_model("sparse/pkm", torch.float64)), text(29, seq_len=37)
    table = tx.measure(view, [tx.probes.Routing(linearity=False, removal=False)], data)
    layer, sums, counts = 1, np.zeros(36), np.zeros(36)
    values = view.layers[layer].ffn.memory.values.detach()[:, 0].norm(dim=-1)
    for start, length in zip(data.starts, data.lengths, strict=True):
        ids = torch.from_numpy(data.ids[start : start + length].astype(np.int64))[None]
        with torch.no_grad(), view.capture(("selected", "selected_weights", "resid_mid"), [layer]) as seen:
            view.run(ids)
        index, stream = seen["selected", layer][0], seen["resid_mid", layer][0].norm(dim=-1, keepdim=True)
        sizes = seen["selected_weights", layer][0].abs() * values[index] / stream
        np.add.at(sums, index.numpy(), sizes.numpy())
        np.add.at(counts, index.numpy(), 1)
    for cell in np.flatnonzero(counts):
        found = value(table, metric="influence", layer=layer, part=f"expert {cell}")
        np.testing.assert_allclose(found, sums[cell] / counts[cell], rtol=1e-9)
