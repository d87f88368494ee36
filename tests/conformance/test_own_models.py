"""Every architecture we build is seen by the view and measured by every probe, without an adapter."""

import functools
import math

import pytest
import torch
from torch import Tensor

import transect as tx
from families import random_ids
from own_models import ACTIVE, BLOCKS, CELLS, OWN, own_model, settings
from plants import text
from transect.models.heads import TransectForSequenceClassification
from transect.models.transformer import TransectModel
from transect.view import edits
from transect.view.commit import Changes, Removal, commit
from transect.view.experts import experts_of
from transect.view.prove import BOUNDS
from transect.view.sites import NEXT, SITES
from transect.view.view import View

MASK_ID = 3
BY_BATCH = ("sparse/gshard", "sparse/gshard_in_order", "sparse/expert_choice", "caa/expert_choice_inside")
"""Models in which the rows of a batch compete for blocks."""

IN_PARALLEL = "resid + attn_out + ffn_out"
ADDITIONS = {
    "standard": ("resid + attn_out", "resid_mid + ffn_out"),
    "standard/post": ("LN(resid + attn_out)", "LN(resid_mid + ffn_out)"),
    "standard/square": ("resid + attn_out", "ffn_out"),
    "residual/cancelled": ("attn_out", "ffn_out"),
    "residual/cancelled_attn": ("attn_out", "resid_mid + ffn_out"),
    "residual/cancelled_ffn": ("resid + attn_out", "ffn_out"),
    "residual/cancelled_post": ("LN(attn_out)", "LN(ffn_out)"),
    "residual/cancelled_ffn_post": ("LN(resid + attn_out)", "LN(ffn_out)"),
    "residual/cancelled_attn_post": ("LN(attn_out)", "LN(resid_mid + ffn_out)"),
    "residual/number": ("0.7 resid + attn_out", "-1.3 resid_mid + ffn_out"),
    "residual/number_post": ("LN(0.7 resid + attn_out)", "LN(1.9 resid_mid + ffn_out)"),
    "attention_only": ("resid + attn_out",),
    "attention_only/gelu": ("resid + attn_out",),
    "attention_only/gelu_post": ("LN(resid + attn_out)",),
    "attention_only/cancelled": ("attn_out",),
    "attention_only/cancelled_post": ("LN(attn_out)",),
    "parallel": (IN_PARALLEL,),
    "parallel/two_norms": (IN_PARALLEL,),
    "parallel/post": (f"LN({IN_PARALLEL})",),
    "parallel/sandwich": ("resid + LN(attn_out + ffn_out)",),
    "parallel/branch": ("resid + LN(attn_out + ffn_out)",),
    "parallel/number": ("0.4 resid + attn_out + ffn_out",),
    "caa": ("resid + attn_out", "resid_mid + ffn_out"),
    "caa/r0": ("resid + attn_out",),
    "caa/r0_post": ("LN(resid + attn_out)",),
    "caa/r0_post_kept_norm": ("LN(resid + attn_out)", "LN(resid_mid)"),
    "caa/cancelled": ("attn_out", "0.5 resid_mid + ffn_out"),
    "moe_before_ffn": ("resid + attn_out", "resid_mid + ffn_out", "resid_mid2 + ffn2_out"),
    "moe_before_ffn/post": ("LN(resid + attn_out)", "LN(resid_mid + ffn_out)", "LN(resid_mid2 + ffn2_out)"),
    "moe_before_ffn/parallel": ("resid + attn_out", "resid_mid + ffn_out + ffn2_out"),
    "moe_before_ffn/parallel_post": ("LN(resid + attn_out)", "LN(resid_mid + ffn_out + ffn2_out)"),
    "moe_before_ffn/cancelled": ("resid + attn_out", "ffn_out", "ffn2_out"),
}
ROUTED = {name: [("ffn", BLOCKS)] for name in OWN if name.startswith("sparse/")} | {
    name: [("ffn", BLOCKS)] for name in OWN if name.startswith("moe_before_ffn")
}
CELLWISE = ("vanilla_m", "vanilla_m_gated", "lorkm", "pkm", "pkm_ffn", "one_cell_avg_k")
ROUTED |= {f"sparse/{name}": [("ffn", CELLS)] for name in CELLWISE}
ROUTED |= {
    "parallel/sparse": [("ffn", BLOCKS)],
    "caa/sparse": [("ffn", BLOCKS), ("inner", BLOCKS)],
    "caa/moe_inside": [("inner", BLOCKS)],
    "caa/expert_choice_inside": [("inner", BLOCKS)],
    "moe_before_ffn/two_sparse": [("ffn", BLOCKS), ("ffn2", BLOCKS)],
}


@functools.cache
def view_of(name: str, dtype: torch.dtype = torch.float64) -> View:
    return View(own_model(name, dtype))


def captured(view: View, ids: Tensor) -> dict[tuple[str, int], Tensor]:
    """Every site of every layer of one pass."""
    seen = {}
    for layer, known in enumerate(view.maps):
        with torch.no_grad(), view.capture(list(known.taps), [layer]) as capture:
            view.run(ids)
        seen |= {key: capture[key] for key in capture.keys()}  # noqa: SIM118
    return seen


def ids_of(name: str, rows: int = 3, positions: int = 11) -> Tensor:
    return random_ids((rows, positions), torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", OWN)
def test_view_is_proven(name, dtype):
    view = view_of(name, dtype)
    assert view.num_layers == settings(name).layers
    assert view.causal is settings(name).causal
    assert view.proof.worst.residual <= BOUNDS[dtype] and view.proof.inert == ()
    for known in view.maps:
        assert set(known.taps) | set(known.missing) == set(SITES)
        assert not set(known.taps) & set(known.missing)


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions_are_those_of_the_settings(name):
    for known in view_of(name).maps:
        assert tuple(map(str, known.additions)) == ADDITIONS[name]
        assert known.additions[0].source == "resid" and known.additions[-1].target == NEXT


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", [name for name in OWN if "learned" in str(OWN[name].get("residual"))])
def test_learned_numbers_are_those_of_the_parameters(name, dtype):
    view = view_of(name, dtype)
    for layer, known in zip(view.layers, view.maps, strict=True):
        for addition in known.additions:
            number = layer.get_submodule(f"{addition.adds[0]}_residual").number
            assert addition.number == (float(number.detach()) if isinstance(number, Tensor) else number)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_learned_number_near_one_is_not_taken_for_one(dtype):
    model = own_model("residual/learned", dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn_residual.number.fill_(1.0001)
            layer.ffn_residual.number.fill_(1.0)
    for layer, known in zip(model.model.layers, View(model).maps, strict=True):
        assert [addition.number for addition in known.additions] == [float(layer.attn_residual.number.detach()), 1.0]


@pytest.mark.parametrize("name", OWN)
def test_sites_stand_at_the_modules_they_belong_to(name):
    view = view_of(name)
    for layer, known in zip(view.layers, view.maps, strict=True):
        parts = dict(layer.named_modules())
        assert known.taps["heads_out"].module == "attn.out" and known.attn_root == "attn"
        assert known.taps["attn_in"].module == "attn.q"
        assert known.sublayers == tuple(part for part in ("attn", "ffn", "ffn2") if part in parts)
        for half, root in (("ffn", "ffn"), ("ffn2", "ffn2"), ("inner", "attn.inner")):
            assert (f"{half}_in" in known.taps) is (root in parts)
            if root in parts:
                assert known.taps[f"{half}_in"].module.startswith(f"{root}.") and known.roots[half] == root
        assert ("resid_mid2" in known.taps) is (len(known.additions) == 3)


@pytest.mark.parametrize("name", [name for name in OWN if name not in BY_BATCH])
def test_captured_sites_are_what_the_modules_receive_and_give(name):
    view, ids = view_of(name), ids_of(name)
    seen, found = captured(view, ids), {}
    owners = {id(part): (place, path) for place in range(view.num_layers) for path, part in _parts(view, place)}
    handles = []
    for part in {id(m): m for layer in view.layers for _, m in _parts_of(layer)}.values():
        handles.append(
            part.register_forward_hook(lambda m, a, out: found.setdefault(owners[id(m)], []).append((a, out)))
        )
    with torch.no_grad():
        view.run(ids)
    for handle in handles:
        handle.remove()
    for (place, path), calls in found.items():
        half = {"attn": "attn", "ffn": "ffn", "ffn2": "ffn2", "attn.inner": "inner"}[path]
        places = [n for n in range(view.num_layers) if view.layers[n] is view.layers[place]]
        for at, (given, output) in zip(places, calls, strict=True):
            made = output if isinstance(output, Tensor) else output[0]
            assert torch.equal(seen[f"{half}_in", at], given[0])
            if f"{half}_out" in seen and half in ("inner", "attn", "ffn") and not view.maps[at].output_norms:
                torch.testing.assert_close(seen[f"{half}_out", at], made, rtol=0, atol=1e-12)


def _parts_of(layer):
    return [(path, part) for path, part in layer.named_modules() if path in ("attn", "ffn", "ffn2", "attn.inner")]


def _parts(view: View, place: int):
    first = next(n for n in range(view.num_layers) if view.layers[n] is view.layers[place])
    return _parts_of(view.layers[place]) if first == place else []


@pytest.mark.parametrize("name", ROUTED)
def test_routers_of_sparse_ffns(name):
    view = view_of(name)
    for layer, known in enumerate(view.maps):
        assert list(known.blocks.items()) == ROUTED[name]
        for half, count in ROUTED[name]:
            experts = experts_of(view, layer, half)
            assert experts.count == count and experts.residual <= 1e-10
            prefix = "" if half == "ffn" else f"{half}_"
            assert {f"{prefix}selected", f"{prefix}selected_weights"} <= set(known.taps)
            scored = f"{prefix}router_logits" in known.taps
            assert scored or known.missing[f"{prefix}router_logits"] == "the router returns no scores of all blocks"
            if scored:
                assert view.site_width(layer, f"{prefix}router_logits") == count


def test_rules_without_scores_are_the_ones_known():
    unscored = {
        n for n in ROUTED if any("no scores" in why for known in view_of(n).maps for why in known.missing.values())
    }
    assert unscored == {"sparse/rand_hash", "sparse/pkm", "sparse/pkm_ffn"}


@pytest.mark.parametrize("name", ["sparse/top_k", "sparse/shared", "sparse/avg_k"])
def test_scores_choose_the_selected_blocks(name):
    view = view_of(name)
    seen = captured(view, ids_of(name))
    for layer in range(view.num_layers):
        best = seen["router_logits", layer].topk(ACTIVE, dim=-1).indices
        assert torch.equal(best.sort(-1).values, seen["selected", layer].sort(-1).values)


def probes_of(view: View) -> list:
    found = [
        tx.probes.Jump(),
        tx.probes.Nonlinearity(),
        tx.probes.Similarity(),
        tx.probes.Contribution(mask_id=MASK_ID, tp_min_count=3, mi_clusters=5, lens_tokens=97),
        tx.probes.Commutativity(mask_id=MASK_ID, sample=41, kinds=("adjacent",)),
        tx.probes.Ablation(
            mask_id=MASK_ID,
            sample=41,
            parts=("ffn", "attn", "layer", "head", "ffn2", "inner_ffn"),
            schedules=("single",),
            residual_weights=(0.5,),
        ),
    ]
    if any(known.sparse for known in view.maps):
        found.append(tx.probes.Routing(mask_id=MASK_ID, removal_sample=41, most_experts=BLOCKS))
    return found


@pytest.mark.parametrize("name", OWN)
def test_every_probe_gives_rows(name):
    view = view_of(name, torch.float32)
    probes = probes_of(view)
    table = tx.measure(view, probes, text(23))
    for probe in probes:
        rows = table.where(probe=probe.name).rows
        assert any(row.value is not None for row in rows), probe.name
        for row in rows:
            assert (row.value is None) == bool(row.reason), row
            assert row.value is None or math.isfinite(row.value), row
            assert row.stderr is None or math.isfinite(row.stderr), row
        keys = [(r.metric, r.layer, r.layer_to, r.site, r.element, r.part, r.edit, r.variant, r.split) for r in rows]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "name", ["standard", "mixed/blocks", "share/two", "moe_before_ffn", "sparse/rand_hash", "caa/sparse"]
)
def test_layers_run_in_another_order_and_come_back(name):
    view, ids = view_of(name), ids_of(name)
    architecture = view.model.config.architecture
    plain, order = view.logits(ids), (1, 0, 0, 2)
    with edits.order(view, order):
        assert view.model.config.num_hidden_layers == 4
        moved, layers = view.logits(ids), list(view.layers)
    assert view.model.config.architecture == architecture
    assert torch.equal(view.logits(ids), plain) and not torch.equal(moved, plain)
    assert [layer.attn.q.weight is view.layers[n].attn.q.weight for layer, n in zip(layers, order, strict=True)] == [
        True
    ] * 4


COMMITTED = {
    "standard": Changes(order=(2, 0, 1, 1), removed=(Removal("ffn", 1), Removal("head", 0, head=2))),
    "attention/more_heads": Changes(swapped=((0, 1),), removed=(Removal("head", 0, head=1),)),
    "attention_only/gelu": Changes(repeated=((1, 2),), removed=(Removal("attn", 0),)),
    "mixed/blocks": Changes(order=(3, 1, 0, 2)),
    "residual/learned": Changes(removed=(Removal("layer", 1), Removal("attn", 2))),
    "moe_before_ffn": Changes(order=(1, 0, 2), removed=(Removal("ffn", 1), Removal("ffn2", 0), Removal("attn", 2))),
    "moe_before_ffn/parallel": Changes(removed=(Removal("ffn", 1), Removal("ffn2", 0))),
    "sparse/switch": Changes(removed=(Removal("ffn", 1), Removal("expert", 0, expert=3))),
    "sparse/shared": Changes(removed=(Removal("ffn", 0),), swapped=((1, 2),)),
    "sparse/rand_hash": Changes(order=(2, 1, 0), removed=(Removal("expert", 1, expert=0),)),
    "sparse/pkm": Changes(swapped=((0, 2),), removed=(Removal("ffn", 1),)),
    "caa/sparse": Changes(order=(0, 2, 1), removed=(Removal("inner_ffn", 1), Removal("ffn", 2))),
    "caa/half_masked_path": Changes(order=(1, 2), removed=(Removal("inner_ffn", 1), Removal("head", 2, head=0))),
}


@pytest.mark.parametrize("name", COMMITTED)
def test_lasting_edits_reload_to_the_same_logits(name, tmp_path):
    view = view_of(name, torch.float32)
    changes = COMMITTED[name]
    done = commit(view, changes, tmp_path / "edited")  # itself compares, to the last bit
    again, order = View.load(str(tmp_path / "edited")), changes.executed(view.num_layers)
    assert done.order == order and again.num_layers == len(order)
    assert again.layouts == tuple(view.layouts[layer] for layer in order)


def test_layers_that_share_weights_are_not_committed(tmp_path):
    with pytest.raises(tx.InputError, match="its layers share their weights"):
        commit(view_of("share/two", torch.float32), Changes(swapped=((0, 1),)), tmp_path / "edited")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [TransectForSequenceClassification, TransectModel])
@pytest.mark.parametrize("name", ["standard", "caa/masked", "moe_before_ffn"])
def test_models_without_a_map_to_the_vocabulary(name, kind):
    view = View(kind.make(settings(name)).eval())
    assert not view.has_head and view.layouts == view_of(name).layouts


@pytest.mark.parametrize(
    "name", ["residual/cancelled", "residual/number_post", "moe_before_ffn", "caa", "parallel/sandwich"]
)
def test_a_layer_that_adds_something_else_is_refused(name):
    """Free numbers of the residual do not let a stranger in."""
    model = own_model(name, torch.float64)
    layer = model.model.layers[1]
    plain = layer.forward
    layer.forward = lambda hidden, *rest: (made := plain(hidden, *rest))._replace(hidden=made.hidden + 0.1 * hidden**2)
    with pytest.raises(
        tx.InputError, match=r"layer at layers\.1: its output is not the stream plus attention plus FFN"
    ):
        View(model)
