"""Parts whose absence costs a known amount, and every ablation against forward passes written by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from families import loss_error, tiny_model
from loops import Elements, elements, hand_logits, layers_of
from plants import only, planted, seen, text, value, view_of
from transect.data import Dataset
from transect.data.objective import NONE, Objective, with_targets
from transect.errors import InputError
from transect.measure import run
from transect.plan import Plan, make
from transect.probes._trained import Approximator
from transect.probes.ablation import PARTS, Ablation, AblationState
from transect.results import Row, Table
from transect.view import edits
from transect.view.kinds import is_norm
from transect.view.view import View

LAYERS = 3
MASK_ID = 3
HAND = ("gpt2", "bert", "llama")
FREE = {"loss_change": 0.0, "kl": 0.0, "agreement": 1.0, "state_change": 0.0}
SINGLE = ("single",)


class Kept(Ablation):
    """An ablation whose state and sequences can be looked at afterwards."""

    states: list[AblationState] = []  # noqa: RUF012 - shared on purpose
    fitted_on: set[int] = set()  # noqa: RUF012

    def see(self, state, setting, layer, seen, sight):
        self.fitted_on.update(sight.sequence.tolist())
        super().see(state, setting, layer, seen, sight)

    def variants(self, state, setting):
        self.states[:] = [state]
        return super().variants(state, setting)


def plan_of(
    view: View, data: Dataset, seed: int = 0, batch_size: int = 7, kind: type[Ablation] = Kept, **options
) -> Plan:
    options = {"mask_id": MASK_ID, "sample": 10**6} | options
    return make(view, [kind(**options)], data, batch_size, seed)


def measured(view: View, data: Dataset | None = None, **options) -> Table:
    return run(plan_of(view, text(31, high=17) if data is None else data, **options))


def shown(view: View, data: Dataset) -> Dataset:
    objective = Objective(kind="causal") if view.causal else Objective(kind="masked", mask_id=MASK_ID)
    return with_targets(data, objective, view.vocab_size, 0)


def plain_loss(logits_of: Callable[[Tensor], Tensor], data: Dataset, sequences: Sequence[int] | None = None) -> float:
    """Cross entropy in nats over the targets, a sequence at a time."""
    logits, targets = [], []
    for at in range(data.num_sequences) if sequences is None else sequences:
        part = slice(data.starts[at], data.starts[at] + data.lengths[at])
        with torch.no_grad():
            logits.append(logits_of(torch.from_numpy(data.ids[part]).long()[None])[0])
        targets.append(torch.from_numpy(data.target[part]).long())
    return float(nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=NONE))


def scores(table: Table, **equal: object) -> dict[str, float]:
    return {metric: value(table, metric=metric, **equal) for metric in FREE}


def stage(plan: Plan, *phases: str) -> list[int]:
    return [int(at) for one in plan.passes[0].stages if one.phase in phases for at in one.sequences]


def rows_of(view: View, data: Dataset, layer: int, sequences: Sequence[int]) -> dict[str, np.ndarray]:
    """Every site of a layer over some sequences of the text as the model is shown it."""
    found = seen(view, data, layer)
    return {site: np.concatenate([found[at][site] for at in sequences]) for site in found[0]}


# zero


def zeroed(view: View, layer: int, part: str, head: int | None) -> Elements:
    """A layer's elements with one of them zero."""
    if part in ("ffn", "attn"):
        return {part: torch.zeros_like}
    element = "attn_heads" if part == "head" else part
    own = elements(view.model, layers_of(view.model)[layer])[element]

    def function(x: Tensor) -> Tensor:
        out = own(x)
        width = out.shape[-1] // (1 if head is None else view.model.config.num_attention_heads)
        start = (head or 0) * width
        return torch.cat([out[..., :start], 0 * out[..., start : start + width], out[..., start + width :]], dim=-1)

    return {element: function}


def layers_in(row: Row) -> list[int]:
    return list(range(row.layer, (row.layer if row.layer_to is None else row.layer_to) + 1))


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("ffn2", "inner_ffn")])  # these have one FFN
@pytest.mark.parametrize("name", HAND)
def test_zero_is_the_loop_by_hand_without_it(name: str, part: str):
    view, data = view_of(name, layers=LAYERS), text(23, high=17)
    table, asked = measured(view, data, parts=(part,)), shown(view, data)
    losses = [row for row in table.where(metric="loss") if row.edit != "intact"]
    assert len(losses) == {"layer": 7, "head": 4 * LAYERS}.get(part, 9)
    for row in losses:
        gone = layers_in(row)
        head = None if row.part is None else int(row.part.split()[1])
        if part == "layer":
            given = {"order": [layer for layer in range(LAYERS) if layer not in gone]}
        else:
            given = {"changed": {layer: zeroed(view, layer, part, head) for layer in gone}}
        expected = plain_loss(lambda ids, given=given: hand_logits(view.model, ids, **given), asked)
        assert row.value == pytest.approx(expected, abs=loss_error(name)), row.edit
    intact = plain_loss(lambda ids: hand_logits(view.model, ids), asked)
    assert value(table, metric="loss", edit="intact") == pytest.approx(intact, abs=loss_error(name))
    for row in losses:
        change = only(table, metric="loss_change", edit=row.edit, variant=row.variant)
        assert change.value == pytest.approx(row.value - intact, abs=loss_error(name)) and abs(change.value) > 1e-5


def test_the_rows_say_which_layers_and_which_head():
    table = measured(view_of("gpt2", layers=LAYERS), parts=("ffn", "head"))
    found = [(r.element, r.variant, r.layer, r.layer_to, r.part) for r in table.where(metric="kl")]
    expected = [("ffn", "zero/single", layer, None, None) for layer in range(3)]
    expected += [("ffn", "zero/from_below", 0, layer, None) for layer in range(3)]
    expected += [("ffn", "zero/from_above", layer, 2, None) for layer in range(3)]
    expected += [("head", "zero/single", layer, None, f"head {head}") for layer in range(3) for head in range(4)]
    assert found == expected
    done, saved = (value(table, metric="layer_evaluations", variant=name) for name in ("done", "saved"))
    # intact; each single from its layer on; two and three from below; layer 2 behind an ablated 1; every head
    assert done == 3 + (3 + 2 + 1) + (2 + 1) + 1 + 4 * (3 + 2 + 1)
    assert done + saved == 3 * (1 + 9 + 12)


@pytest.mark.parametrize("part", ["ffn", "attn", "layer"])
def test_the_first_of_many_layers_is_a_single_one(part: str):
    table = measured(view_of("llama", layers=LAYERS), parts=(part,))
    for metric in FREE:
        first, last = (value(table, metric=metric, variant="zero/single", layer=layer) for layer in (0, LAYERS - 1))
        assert first == value(table, metric=metric, variant="zero/from_below", layer_to=0)
        assert last == value(table, metric=metric, variant="zero/from_above", layer=LAYERS - 1)
        if part != "layer":
            both = [
                value(table, metric=metric, variant=f"zero/{way}", layer=0, layer_to=2)
                for way in ("from_below", "from_above")
            ]
            assert both[0] == both[1]


@pytest.mark.parametrize("name", ["mixtral", "falcon", "olmo2", "qwen2_moe/mixed"])
def test_other_layouts_are_the_edits(name: str):
    view, data = view_of(name, layers=LAYERS), text(23, high=17)
    table, asked = measured(view, data, parts=("ffn", "attn", "layer", "head"), schedules=SINGLE), shown(view, data)
    for part in ("ffn", "attn", "layer"):
        with edits.remove(view, part, 1):
            expected = plain_loss(view.logits, asked)
        assert value(table, metric="loss", element=part, layer=1) == pytest.approx(expected, abs=loss_error(name))
    with edits.remove(view, "head", 2, 3):
        expected = plain_loss(view.logits, asked)
    assert value(table, metric="loss", part="head 3", layer=2) == pytest.approx(expected, abs=loss_error(name))


def test_a_part_that_writes_zero_costs_nothing():
    view = view_of("gpt2", layers=LAYERS)
    with planted(view, {("attn", 1): torch.zeros_like}):
        table = measured(view, parts=("attn", "ffn"), schedules=SINGLE)
    assert scores(table, element="attn", layer=1) == FREE
    assert min(value(table, metric="kl", element="attn", layer=layer) for layer in (0, 2)) > 1e-3
    assert value(table, metric="kl", element="ffn", layer=1) > 1e-3


# residuals


@pytest.mark.parametrize("name", HAND)
def test_residuals_are_weighted_as_by_hand(name: str):
    view, data = view_of(name, layers=LAYERS), text(23, high=17)
    table = measured(view, data, parts=(), residuals=("both", "attn", "ffn"), residual_weights=(0.0, 0.5))
    asked = shown(view, data)
    assert len(table.where(metric="loss")) == 1 + 2 * 3 * 9
    for row in table.where(metric="loss"):
        if row.edit == "intact" or (row.variant.startswith("scale 0.5") and row.variant != "scale 0.5/single"):
            continue
        weight, which = float(row.variant.split("/")[0].split()[1]), row.element.removeprefix("residual_")
        pair = (weight if which != "ffn" else 1.0, weight if which != "attn" else 1.0)
        weights = dict.fromkeys(layers_in(row), pair)
        expected = plain_loss(lambda ids, w=weights: hand_logits(view.model, ids, stream_weights=w), asked)
        assert row.value == pytest.approx(expected, abs=loss_error(name)), row.edit


def test_a_residual_of_weight_one_costs_nothing_at_all():
    table = measured(view_of("gpt2", layers=LAYERS), parts=(), residual_weights=(1.0, 0.999))
    for row in table.where(variant="scale 1/from_below"):
        assert row.value == FREE.get(row.metric, row.value)
    assert value(table, metric="loss", variant="scale 1/single", layer=1) == value(table, metric="loss", edit="intact")
    assert value(table, metric="kl", variant="scale 0.999/single", layer=1) > 0


# random weights


@pytest.mark.parametrize("element", ["ffn", "ffn_up", "attn", "attn_heads", "layer"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "mixtral", "gpt_oss"])
def test_random_weights_are_small_seeded_and_taken_back(name: str, element: str):
    view = view_of(name, torch.float32)
    before = {path: parameter.detach().clone() for path, parameter in view.model.named_parameters()}
    norms = {f"{path}.{n}" for path, m in view.model.named_modules() if is_norm(m) for n, _ in m.named_parameters()}

    def changed(seed: int) -> dict[str, Tensor]:
        with edits.randomise(view, element, 1, seed):
            now = {path: parameter.detach().clone() for path, parameter in view.model.named_parameters()}
        return {path: new for path, new in now.items() if not torch.equal(new, before[path])}

    found, again, other = changed(0), changed(0), changed(1)
    assert found.keys() == again.keys() == other.keys() and not set(found) & norms
    assert all(path.startswith(view.layer_path(1)) for path in found)
    biases = {path for path in found if path.endswith("bias") or before[path].ndim == 1}
    weights = torch.cat([found[path].flatten() for path in found if path not in biases])
    assert float(weights.std()) == pytest.approx(0.02 * 0.8796, rel=0.05)  # truncated at two standard deviations
    assert float(weights.abs().max()) <= 0.04 and abs(float(weights.mean())) < 1e-3
    assert all(not found[path].any() for path in biases) and all(torch.equal(found[p], again[p]) for p in found)
    assert not any(torch.equal(found[path], other[path]) for path in set(found) - biases)
    for path, parameter in view.model.named_parameters():
        assert torch.equal(parameter, before[path])


def test_which_weights_belong_to_an_element():
    view = view_of("gpt2")

    def changed(element: str) -> set[str]:
        with edits.randomise(view, element, 0):
            return {path for path, p in view.layers[0].named_parameters() if float(p.detach().abs().max()) <= 0.04}

    ffn, attn = ({f"{part}.{n}" for n in names} for part, names in (
        ("mlp", ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")),
        ("attn", ("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias")),
    ))  # fmt: skip
    assert changed("ffn") == ffn and changed("attn") == attn and changed("layer") == ffn | attn
    assert changed("ffn_up") == {path for path in ffn if "c_fc" in path}
    assert changed("attn_heads") == {path for path in attn if "c_attn" in path}


def test_random_weights_are_those_of_the_edit():
    view, data = view_of("gpt2", layers=LAYERS), text(23, high=17)
    table = measured(view, data, seed=5, methods=("noise",), parts=("ffn", "attn", "layer"), schedules=SINGLE)
    for part in ("ffn", "attn", "layer"):
        with edits.randomise(view, part, 1, 5):
            expected = plain_loss(lambda ids: hand_logits(view.model, ids), shown(view, data))
        assert value(table, metric="loss", element=part, layer=1) == pytest.approx(expected, abs=1e-10)
    zero = measured(view, data, parts=("ffn",), schedules=SINGLE)
    assert value(zero, metric="loss", layer=1) != value(table, metric="loss", element="ffn", layer=1)


def test_weights_that_layers_share_are_refused():
    with pytest.raises(InputError, match="shares its weights with other layers") as caught:
        measured(view_of("albert", layers=LAYERS), methods=("noise",))
    assert "\n" not in str(caught.value)


# the mean


def test_a_constant_part_is_its_mean():
    view = view_of("gpt2", layers=LAYERS)
    constant = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    functions = {("ffn", 1): lambda x: constant.expand_as(x), ("layer", 2): lambda x: x + constant}
    with planted(view, functions):
        table = measured(view, methods=("mean", "zero"), parts=("ffn", "layer"), schedules=SINGLE)
    for layer, part in ((1, "ffn"), (2, "layer")):
        assert abs(value(table, metric="loss_change", variant="mean/single", element=part, layer=layer)) < 1e-12
        assert value(table, metric="kl", variant="zero/single", element=part, layer=layer) > 1e-3
    assert value(table, metric="kl", variant="mean/single", element="ffn", layer=0) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_mean_is_one_over_the_other_documents(name: str):
    view, data = view_of(name, layers=LAYERS), text(31, high=17)
    plan = plan_of(view, data, methods=("mean",), parts=("ffn", "layer", "head"), schedules=SINGLE)
    table, asked = run(plan), shown(view, data)
    sites = rows_of(view, asked, 1, stage(plan, "fit", "tune"))
    means = {site: torch.from_numpy(found.mean(0)) for site, found in sites.items()}
    gained = means["resid_next"] - means["resid"]
    own = elements(view.model, layers_of(view.model)[1])

    def third(x: Tensor) -> Tensor:
        return torch.cat([own["attn_heads"](x)[..., :20], means["heads_out"][20:30].expand(*x.shape[:2], -1),
                          own["attn_heads"](x)[..., 30:]], dim=-1)  # fmt: skip

    changes = {
        "mean ffn 1": {"ffn": lambda x: means["ffn_out"].expand_as(x)},
        "mean layer 1": {"layer": lambda x: x + gained},
        "mean head 1 head 2": {"attn_heads": third},
    }
    for edit, changed in changes.items():
        scored = stage(plan, "edit")
        expected = plain_loss(lambda ids, c=changed: hand_logits(view.model, ids, changed={1: c}), asked, scored)
        assert value(table, metric="loss", edit=edit) == pytest.approx(expected, abs=1e-10), edit


def test_a_head_that_is_constant_is_its_mean():
    view = view_of("gpt2", layers=LAYERS)
    constant = torch.arange(40, dtype=torch.float64) / 7

    def heads(x: Tensor) -> Tensor:
        return torch.cat([constant[:30].expand(*x.shape[:2], -1), x[..., 30:]], dim=-1)

    with planted(view, {("attn_heads", 1): heads}):
        table = measured(view, methods=("mean", "zero"), parts=("head",))
    for head in range(4):
        cost = value(table, metric="kl", variant="mean/single", layer=1, part=f"head {head}")
        assert (abs(cost) < 1e-12) == (head < 3)
        assert value(table, metric="kl", variant="zero/single", layer=1, part=f"head {head}") > 1e-4


# fitted maps


def test_an_affine_ffn_is_its_linear_map():
    view = view_of("gpt2", layers=LAYERS)
    matrix = torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 40**0.5
    with planted(view, {("ffn", layer): lambda x: x @ matrix + 0.3 for layer in range(LAYERS)}):
        table = measured(view, text(61), methods=("linear",), parts=("ffn", "attn"), tune_fraction=0.0)
    for row in table.where(metric="loss_change", element="ffn"):
        assert abs(row.value) < 1e-9, row.edit
    assert max(row.value for row in table.where(metric="state_change", element="ffn")) < 1e-15
    assert value(table, metric="kl", element="attn", variant="linear/single", layer=1) > 1e-3


@pytest.mark.parametrize("part", ["ffn", "attn", "layer"])
def test_the_linear_map_is_the_least_squares_one(part: str):
    view, data = view_of("llama", layers=LAYERS), text(61)
    plan = plan_of(view, data, methods=("linear",), parts=(part,), schedules=SINGLE, tune_fraction=0.0)
    table, asked = run(plan), shown(view, data)
    sites = rows_of(view, asked, 1, stage(plan, "fit"))
    source, target = {"ffn": ("ffn_in", "ffn_out"), "attn": ("attn_in", "attn_out")}.get(part, ("resid", "resid_next"))
    padded = np.pad(sites[source], ((0, 0), (0, 1)), constant_values=1.0)
    solved = torch.from_numpy(np.linalg.lstsq(padded, sites[target], rcond=None)[0])
    changed = {1: {part: lambda x: x @ solved[:-1] + solved[-1]}}
    expected = plain_loss(lambda ids: hand_logits(view.model, ids, changed=changed), asked, stage(plan, "edit"))
    assert value(table, metric="loss", layer=1) == pytest.approx(expected, abs=1e-8)


def test_a_linear_up_projection_is_a_linear_ffn():
    """The down-projection is affine, so that the best affine map before it is the best one after it."""
    table = measured(
        view_of("gpt2", layers=LAYERS), text(61), methods=("linear",), parts=("ffn", "ffn_up"), tune_fraction=0.0
    )
    for row in table.where(metric="loss", element="ffn"):
        twin = only(table, metric="loss", element="ffn_up", variant=row.variant, layer=row.layer, layer_to=row.layer_to)
        assert twin.value == pytest.approx(row.value, abs=1e-9)


def test_nothing_is_fitted_on_the_documents_that_are_scored():
    view, data = view_of("gpt2", layers=2), text(41)
    options = {"methods": ("mean", "linear", "cosine_adam", "relu_control", "two_linear"), "train_epochs": 1}
    plan = plan_of(view, data, parts=("ffn", "layer"), schedules=SINGLE, **options)
    scored, fitted = set(stage(plan, "edit")), set(stage(plan, "fit", "tune", "train"))
    assert scored and not {int(data.document[at]) for at in scored} & {int(data.document[at]) for at in fitted}
    (item,) = plan.passes
    shown_ids = item.data.ids.copy()
    for at in scored:
        shown_ids[item.data.starts[at] : item.data.starts[at] + item.data.lengths[at]] = 11
    other = replace(plan, passes=(replace(item, data=replace(item.data, ids=shown_ids)),))
    packs = []
    for one in (plan, other):
        Kept.fitted_on.clear()
        table = run(one)
        assert Kept.fitted_on == fitted
        packs.append((Kept.states[0].pack(), value(table, metric="loss", edit="intact")))
    assert packs[0][1] != packs[1][1]  # they are looked at when scored
    for key, pack in packs[0][0]["fitted"].items():
        twin = packs[1][0]["fitted"][key]
        assert torch.equal(pack["total"], twin["total"])
        assert torch.equal(pack["group"]["fits"][0][0], twin["group"]["fits"][0][0])
        for name, approximator in pack["trained"].items():
            assert torch.equal(approximator["weight"], twin["trained"][name]["weight"])
            assert torch.equal(pack["products"][name], twin["products"][name])


def test_the_samples_of_all_fitted_methods_are_scored_documents_only():
    view, data = view_of("gpt2", layers=2), text(61)
    plan = plan_of(view, data, methods=("mean",), sample=97)
    whole = plan_of(view, data, methods=("mean",))
    assert set(stage(plan, "edit")) < set(stage(whole, "edit"))
    assert data.lengths[stage(plan, "edit")].sum() <= 97
    assert stage(plan_of(view, data), "fit", "tune") == []
    assert sorted(stage(plan_of(view, data), "edit")) == list(range(data.num_sequences))


# trained maps


def test_trained_maps_have_the_papers_shapes_and_a_least_squares_scale():
    view, data = view_of("gpt2", layers=2), text(41)
    methods = ("cosine_adam", "mse_adam", "relu_control", "two_linear")
    plan = plan_of(view, data, methods=methods, parts=("ffn", "ffn_up"), schedules=SINGLE, train_epochs=2)
    run(plan)
    (state,) = Kept.states
    sites = rows_of(view, data, 1, stage(plan, "fit", "tune"))
    x = torch.from_numpy(sites["ffn_in"])
    for part, target in (("ffn", "ffn_out"), ("ffn_up", "ffn_hidden")):
        y, one = torch.from_numpy(sites[target]), state.fitted[1, part]
        e = y.shape[1]
        shapes = {name: tuple(approximator.weight.shape) for name, approximator in one.trained.items()}
        assert shapes == {name: (160, e) if name == "two_linear" else (40, e) for name in methods}
        assert [tuple(t.shape) for t in one.trained["two_linear"].first] == [(40, 160), (160,)]
        assert float(one.trained["relu_control"](x).detach().min()) == 0
        assert set(one.products) == set(methods) - {"mse_adam"}
        for name in methods:
            out = one.trained[name](x).detach()
            scale = float((y * out).sum() / out.square().sum()) if name in one.products else 1.0
            predicted = one.predict(name, x[None])[0]
            torch.testing.assert_close(predicted, scale * out, rtol=1e-9, atol=1e-12)
            if name in one.products:  # no other size is nearer
                assert (y - predicted).norm() <= min((y - (1 + change) * predicted).norm() for change in (-0.01, 0.01))


def test_two_linear_maps_are_one_linear_map():
    view = view_of("gpt2", layers=2)
    run(plan_of(view, text(41), methods=("two_linear",), parts=("ffn",), train_epochs=1))
    two = Kept.states[0].fitted[1, "ffn"].trained["two_linear"]
    x = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        zero = two(torch.zeros(1, 40, dtype=torch.float64))
        torch.testing.assert_close(two(x) + two(-x), 2 * zero.expand(3, -1), rtol=0, atol=1e-12)
    assert not isinstance(two.pack()["first"][0], nn.Parameter) and isinstance(two, Approximator)


def test_training_helps_and_follows_from_the_seed():
    view, data = view_of("gpt2", layers=2), text(41)
    options = {"methods": ("two_linear", "cosine_adam"), "parts": ("ffn",), "schedules": SINGLE}
    start, end, again, other = (
        measured(view, data, seed=seed, train_epochs=epochs, **options)
        for seed, epochs in ((0, 0), (0, 60), (0, 60), (1, 60))
    )
    assert [row.value for row in end] == [row.value for row in again] != [row.value for row in other]
    for layer in range(2):
        row = {"metric": "kl", "variant": "two_linear/single", "layer": layer}
        assert value(end, **row) < value(start, **row)
    affine = torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 40**0.5
    with planted(view, {("ffn", 1): lambda x: x @ affine}):
        table = measured(view, data, train_epochs=0, tune_fraction=0.0, **options)
    assert abs(value(table, metric="loss_change", variant="cosine_adam/single", layer=1)) < 1e-9


def test_a_part_whose_input_never_changes_has_a_reason():
    view = view_of("gpt2", layers=2)
    with planted(view, {("ffn_norm", 1): lambda x: torch.ones_like(x)}):
        table = measured(view, text(41), methods=("linear", "mean"), parts=("ffn",), schedules=SINGLE)
    for row in table.where(variant="linear/single", layer=1):
        assert row.value is None and row.reason == "the part's input is the same for every fit token"
        assert row.stderr is row.low is row.high is None
    assert abs(value(table, metric="loss_change", variant="mean/single", layer=1)) < 1e-12
    assert value(table, metric="kl", variant="linear/single", layer=0) > 0


# what is not there


def test_a_layer_without_the_part_gives_a_reason():
    view = view_of("qwen2_moe/mixed", layers=LAYERS)  # layer 1 is dense, the others have experts
    table = measured(view, parts=("ffn_up", "ffn"), methods=("zero", "mean"), schedules=SINGLE)
    assert {row.layer for row in table.where(element="ffn_up") if row.value is not None} == {1}
    for layer in (0, 2):
        (row,) = table.where(element="ffn_up", layer=layer).rows
        assert row.metric == "loss_change" and row.value is None and "sparse FFN" in row.reason
    assert {row.layer for row in table.where(element="ffn", metric="kl")} == {0, 1, 2}


def test_a_model_in_a_loop_keeps_its_layers():
    view = View(tiny_model("albert/two_inner", torch.float64))
    with pytest.raises(InputError, match=r"^ablation: .* in a loop.*ablation.parts=\[ffn, attn\]"):
        measured(view, kind=Ablation)
    table = measured(view, parts=("ffn", "attn"), schedules=SINGLE)
    with edits.remove(view, "ffn", 3):
        expected = plain_loss(view.logits, shown(view, text(31, high=17)))
    assert value(table, metric="loss", edit="zero ffn 3") == pytest.approx(expected, abs=1e-10)


def test_a_model_without_a_head_has_states_only():
    view = View(tiny_model("bert", torch.float64, layers=2).bert)
    table = measured(view, methods=("zero", "mean"))
    assert {row.metric for row in table} == {"state_change", "layer_evaluations"}
    assert all(row.value > 1e-5 for row in table.where(metric="state_change"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": ("mlp",)}, "'mlp' is no entry of parts; allowed are ffn"),
        ({"methods": ("remove",)}, "'remove' is no entry of methods; allowed are zero"),
        ({"schedules": ("all",)}, "'all' is no entry of schedules; allowed are single"),
        ({"residuals": ("mid",)}, "'mid' is no entry of residuals; allowed are both"),
        ({"sample": 0}, "sample is 1 or more"),
        ({"train_epochs": -1}, "train_epochs 0 or more"),
        ({"objective": "next"}, "objective 'next' is unknown"),
        ({"methods": ("mean",), "score_fraction": 1.0}, "must be between 0 and 1"),
        ({"objective": "masked", "mask_id": 97}, "mask_id 97 is out of range"),
        ({"objective": "masked", "mask_id": None}, "no tokenizer names its mask token"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, words: str):
    with pytest.raises(InputError) as caught:
        measured(view_of("gpt2"), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
