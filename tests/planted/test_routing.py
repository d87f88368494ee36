"""Routers, experts and choices that are known give the numbers of `routing` that they must."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM

import transect as tx
from families import (
    EXPERTS,
    EXPERTS_PER_TOKEN,
    FAMILIES,
    FIRST_TEXT_ID,
    HIDDEN,
    enliven,
    loss_error,
    random_ids,
    tiny_model,
)
from plants import only, seen, text, value, view_of
from stops import packed_bytes, rows_of, states_of
from transect.data import Dataset, assign, from_tokens
from transect.data.split import FIT, SCORE, TUNE
from transect.errors import InputError
from transect.metrics.information import mutual_information
from transect.metrics.moments import Moments
from transect.metrics.ridge import Solver, rcond_for
from transect.plan import make
from transect.probes._routing_rows import correlations, kind_rows, pair_rows, preferences
from transect.probes._routing_sums import LayerSums
from transect.probes.routing import Routing
from transect.results import Row, Table
from transect.view import edits
from transect.view.view import View

SPARSE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
COUNTS = Routing(linearity=False, removal=False)
WHOLE = 20  # tokens of a sequence whose router goes by the row


def whole_text(documents: int = 41, ids: int = 8) -> Dataset:
    """Documents of `WHOLE` tokens each, of few different ones."""
    rng = np.random.default_rng(3)
    return from_tokens(rng.integers(FIRST_TEXT_ID, FIRST_TEXT_ID + ids, (documents, WHOLE)).tolist(), seq_len=WHOLE)


def sparse_model(active: int = EXPERTS_PER_TOKEN, layers: int = 2) -> nn.Module:
    config = FAMILIES["mixtral"].but(num_experts_per_tok=active)(layers)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    enliven(model, 0)
    return model.eval()


class Router(nn.Module):
    """Chooses by the number of the row alone; `choose` gives the experts [rows, active], -1 for a dropped choice."""

    def __init__(self, choose: Callable[[torch.Tensor], torch.Tensor], full: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1)).double())
        self.choose, self.full = choose, full

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.reshape(-1, HIDDEN)
        index, logits = self.choose(torch.arange(len(x))), x @ self.weight.T
        weights = logits.sigmoid() if self.full else logits.gather(1, index.clamp_min(0)).sigmoid()
        return logits, weights, index


class Matrices(nn.Module):
    """Experts that are matrices and leave dropped choices out."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2)) / 6)
        self.double()

    def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            rows, slots = torch.where(index == expert)
            scale = weight[rows, slots] if weight.shape == index.shape else weight[rows, expert]
            out = out.index_add(0, rows, scale[:, None] * (x[rows] @ self.stack[expert].T))
        return out


def planted_view(choose: Callable[[torch.Tensor], torch.Tensor], matrices: bool = False, full: bool = False) -> View:
    model = sparse_model()
    for layer in model.model.layers:
        layer.mlp.gate = Router(choose, full)
        layer.mlp.experts = Matrices() if matrices else layer.mlp.experts
    return View(model)


def in_turn(row: torch.Tensor) -> torch.Tensor:
    """Every expert equally often: r and r + 1, modulo their number."""
    return torch.stack([row % EXPERTS, (row + 1) % EXPERTS], dim=1)


def in_pairs(row: torch.Tensor) -> torch.Tensor:
    """0 with 1 or 2 with 3, never 4."""
    return 2 * (row[:, None] % 2) + torch.arange(2)


def part(expert: int) -> str:
    return f"expert {expert}"


def test_uniform_routing_has_entropy_one():
    table = tx.measure(planted_view(in_turn), [COUNTS], whole_text(), batch_size=3)
    for layer in range(2):
        row = only(table, metric="entropy", layer=layer)
        assert row.value == pytest.approx(1, abs=1e-12) and row.stderr == pytest.approx(0, abs=1e-12)
        assert row.n == 41 * WHOLE * 2 and row.documents == 41
        assert value(table, metric="dead_fraction", layer=layer) == 0
        assert value(table, metric="drop_fraction", layer=layer) == 0
        for i in range(EXPERTS):
            assert value(table, metric="load", layer=layer, part=part(i)) == pytest.approx(1 / EXPERTS, abs=1e-12)
            for j in range(i + 1, EXPERTS):
                together = 1 / 6 if j - i in (1, EXPERTS - 1) else -2 / 3  # P(ij) is 1/5 or 0, P(i) = P(j) = 2/5
                found = value(table, metric="co_selection", layer=layer, part=f"{i},{j}")
                assert found == pytest.approx(together, abs=1e-12)


def test_experts_that_always_come_together():
    table = tx.measure(planted_view(in_pairs), [COUNTS], whole_text(), batch_size=3).where(layer=1)
    pair = {at: only(table, metric="co_selection", part=at) for at in ("0,1", "2,3", "0,2", "1,4")}
    assert [pair["0,1"].value, pair["2,3"].value, pair["0,2"].value] == [1, 1, -1]
    assert pair["0,1"].stderr == pytest.approx(0, abs=1e-12) and pair["0,1"].n == 41 * WHOLE
    assert pair["1,4"].value is None and "by none" in str(pair["1,4"].reason)
    assert value(table, metric="entropy") == pytest.approx(math.log(4) / math.log(5), abs=1e-12)
    assert value(table, metric="dead_fraction") == 1 / EXPERTS


def test_only_the_strongest_pairs_are_written():
    table = tx.measure(planted_view(in_turn), [replace(COUNTS, most_pairs=5)], whole_text()).where(layer=0)
    assert {row.part for row in table.where(metric="co_selection")} == {"0,2", "0,3", "1,3", "1,4", "2,4"}


def test_errors_of_pairs_are_those_of_leaving_groups_out():
    """The spread of the value over many texts is the error that a text gives, in the mean of some."""
    rng = np.random.default_rng(0)

    def counted(tokens: int) -> np.ndarray:
        order = np.argsort(rng.random((tokens, 3)) + np.array([0, 0.2, 0.4]), axis=1)
        hot = np.concatenate([order < 2, np.ones((tokens, 1))], axis=1)
        return hot.T @ hot

    many = [correlations(counted(500))[0, 1] for _ in range(300)]
    found = []
    for _ in range(30):
        sums = LayerSums.empty(3, 1, 1, 0, torch.device("cpu"))
        sums.pairs[:] = torch.from_numpy(np.stack([counted(50) for _ in range(10)]))
        (row,) = (row for row in pair_rows(0, sums, 2, 3, 10) if row.part == "0,1")
        assert row.stderr is not None and row.n == 500
        found.append(row.stderr)
    assert np.mean(found) == pytest.approx(np.std(many), rel=0.15)


@pytest.fixture(scope="module")
def dead() -> Table:
    """gpt_oss with a bias that no score overcomes: expert 3 of layer 1 is never chosen."""
    model = tiny_model("gpt_oss", torch.float64, layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e3
    return tx.measure(View(model), [Routing(removal_sample=300)], text(47), batch_size=7)


def test_an_expert_that_is_never_chosen_is_dead_and_costs_nothing(dead: Table):
    own = {"layer": 1, "part": part(3)}
    assert value(dead, metric="dead_fraction", layer=1) == 1 / EXPERTS
    assert value(dead, metric="load", **own) == 0
    cost = only(dead, metric="removal_cost", **own)
    assert (cost.value, cost.stderr, cost.low, cost.high) == (0, 0, 0, 0) and cost.n and cost.n > 150
    for metric in ("influence", "type_preference", "r2_heldout"):
        row = only(dead, metric=metric, **own)
        assert row.value is None and "chose it" in str(row.reason)
    for layer in range(2):
        for expert in set(range(EXPERTS)) - {3 if layer else None}:
            assert value(dead, metric="load", layer=layer, part=part(expert)) > 0
            assert abs(value(dead, metric="removal_cost", layer=layer, part=part(expert))) > 1e-6
    assert value(dead, metric="dead_fraction", layer=0) == 0


def by_token(active: int) -> View:
    """A first layer whose input, and so its choice, depends on the token alone."""
    model = sparse_model(active)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    return View(model)


@pytest.mark.parametrize("active", [1, 2])
def test_a_router_that_goes_by_the_token_knows_it(active: int):
    view, data = by_token(active), text(197)
    table = tx.measure(view, [COUNTS], data).where(layer=0)
    chosen = np.concatenate([one["selected"] for one in seen(view, data, 0)])
    counts = np.array(list(Counter(chosen.flatten().tolist()).values()))
    shares = counts / counts.sum()
    told = -(shares * np.log(shares)).sum() - math.log(active)  # which of its experts a choice is, no token tells
    correction = (len(counts) - active) / (2 * counts.sum())
    row = only(table, metric="type_preference", part=None)
    assert row.value == pytest.approx(told + correction, abs=1e-12) and row.n == counts.sum()
    assert row.stderr is not None and 0 < row.stderr < 0.1
    assert told > 0.5 and correction < 1e-3


def test_type_preference_of_a_router_that_sees_more_than_the_token():
    """Against the mutual information of labellings, which is another program, where a token has one expert."""
    view, data = View(sparse_model(1)), text(61)
    table = tx.measure(view, [COUNTS], data).where(metric="type_preference", layer=1)
    chosen = np.concatenate([one["selected"][:, 0] for one in seen(view, data, 1)])
    ids = data.ids.astype(np.int64)
    expected = mutual_information(chosen, ids, "miller_madow")
    assert value(table, part=None) == pytest.approx(expected, abs=1e-12)
    assert expected < mutual_information(chosen, ids) - 0.05  # it corrects something
    parts = 0.0
    for expert, count in Counter(chosen.tolist()).items():
        own = value(table, part=part(expert))
        parts += count / len(chosen) * own
        here = Counter(ids[chosen == expert].tolist())
        every = Counter(ids.tolist())
        plain = sum(n / count * math.log(n / count / (every[token] / len(ids))) for token, n in here.items())
        assert own < plain < own + 1
    assert parts == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_independent_choices_prefer_nothing_after_correction(active: int):
    """In the mean of 300 texts the bias is gone; without the correction, or with that of one choice, it is not."""
    rng, ids, tokens = np.random.default_rng(active), 7, 400
    found, plain = [], []
    for _ in range(300):
        kind = rng.integers(0, ids, tokens)
        chosen = np.argsort(rng.random((tokens, EXPERTS)) + np.arange(EXPERTS) / 20, axis=1)[:, :active]
        counts = np.zeros((EXPERTS, ids))
        np.add.at(counts, (chosen, kind[:, None]), 1)
        found.append(preferences(counts, tokens))
        plain.append(mutual_information(chosen.flatten(), np.repeat(kind, active)))
    noise = np.std(found, axis=0) / 300**0.5
    assert (np.abs(np.mean(found, axis=0)) < 4 * noise).all()
    bias = (ids - 1) * (EXPERTS - active) / (2 * active * tokens)
    assert np.mean(plain) == pytest.approx(bias, abs=4 * noise[-1] + 0.05 * bias) and bias > 10 * noise[-1]
    of_one_choice = (ids - 1) * (EXPERTS - 1) / (2 * active * tokens)
    assert active == 1 or of_one_choice - bias > 4 * noise[-1]


def test_errors_of_type_preference_are_those_of_leaving_groups_out():
    rng, tokens, ids = np.random.default_rng(0), 1000, 5

    def counted(n: int) -> np.ndarray:
        """A token's expert is its id, or any of the three."""
        kind = rng.integers(0, ids, n)
        chosen = np.where(rng.random(n) < 0.5, kind % 3, rng.integers(0, 3, n))
        return np.histogram2d(chosen, kind, bins=(3, ids), range=((0, 3), (0, ids)))[0]

    many = np.array([preferences(counted(tokens), tokens) for _ in range(300)])
    found = []
    for _ in range(30):
        sums = LayerSums.empty(3, 1, ids, 0, torch.device("cpu"))
        sums.kinds[:] = torch.from_numpy(np.stack([counted(tokens // 10) for _ in range(10)]))
        sums.pairs[:, -1, -1] = tokens // 10
        found.append([row.stderr for row in kind_rows(0, sums, 10)])
    expected = [many[:, -1].std(), *many[:, :-1].std(0)]
    assert np.mean(found, axis=0) == pytest.approx(expected, rel=0.15)


def random_choice(row: torch.Tensor) -> torch.Tensor:
    """Two experts of each row, by chance but always the same."""
    scores = torch.rand(len(row), EXPERTS, generator=torch.Generator().manual_seed(4))
    return scores.topk(2).indices


def test_a_router_that_goes_by_chance_prefers_nothing():
    data = whole_text(197, ids=11)
    row = only(tx.measure(planted_view(random_choice), [COUNTS], data), metric="type_preference", layer=0, part=None)
    bias = (11 - 1) * (EXPERTS - 2) / (2 * row.n)
    assert abs(row.value) < 0.8 * bias and abs(row.value) < 4 * row.stderr


def gated(fused: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (fused.gate_up_proj[expert] @ x).chunk(2)
    return fused.down_proj[expert] @ (silu(gate) * up)


def interleaved(fused: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    both = x @ fused.gate_up_proj[expert] + fused.gate_up_proj_bias[expert]
    gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    return (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ fused.down_proj[expert] + fused.down_proj_bias[expert]


def matrix(fused: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    return fused.stack[expert] @ x


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "matrices", "weight for every expert"])
def test_influence_against_a_loop(name: str):
    """Over tokens and choices, each expert written out from its weights, each weight from the router's scores."""
    planted = name not in FAMILIES
    view = planted_view(in_turn, True, full=name.startswith("weight")) if planted else view_of(name)
    one = {"mixtral": gated, "gpt_oss": interleaved}.get(name, matrix)
    data = text(23)
    table = tx.measure(view, [COUNTS], data, batch_size=1 if planted else 7).where(metric="influence", layer=1)
    sums = torch.zeros(2, EXPERTS, data.num_documents, dtype=torch.float64)
    fused = view.layers[1].mlp.experts
    for document, sites in zip(data.document, seen(view, data, 1), strict=True):
        given = {site: torch.from_numpy(values) for site, values in sites.items()}
        for at, index in enumerate(given["selected"]):
            scores = given["router_logits"][at, index]
            weights = scores.sigmoid() if planted else scores.float().softmax(0).double()
            for expert, weight in zip(index.tolist(), weights, strict=True):
                size = (weight * one(fused, expert, given["ffn_in"][at])).norm() / given["resid_mid"][at].norm()
                sums[:, expert, document] += torch.stack([size.detach(), torch.ones(())])
    atol = 1e-10 if planted else 1e-6  # the scores' softmax is one in float32
    for expert in range(EXPERTS):
        row = only(table, part=part(expert))
        total, count = sums[:, expert].sum(-1).tolist()
        assert row.value == pytest.approx(total / count, abs=atol) and row.n == count
        assert row.documents == int((sums[1, expert] > 0).sum())
        residuals = sums[0, expert] - row.value * sums[1, expert]  # the linearised error of a ratio of sums
        assert row.stderr == pytest.approx(float(residuals.norm()) / count, rel=0.25)


def test_removal_cost_against_a_loop():
    view, data = view_of("mixtral"), text(23)
    table = tx.measure(view, [Routing(linearity=False, removal_sample=10**6)], data, batch_size=7)

    def loss() -> float:
        total, count = 0.0, 0
        for start, length in zip(data.starts, data.lengths, strict=True):
            ids = torch.from_numpy(data.ids[start : start + length].astype(np.int64))[None]
            total += float(cross_entropy(view.logits(ids)[0, :-1], ids[0, 1:], reduction="sum"))
            count += int(length) - 1
        return total / count

    intact = loss()
    for layer in range(2):
        for expert in range(EXPERTS):
            with edits.remove(view, "expert", layer, expert=expert):
                cost = loss() - intact
            row = only(table, metric="removal_cost", layer=layer, part=part(expert))
            assert row.value == pytest.approx(cost, abs=loss_error("mixtral")) and abs(cost) > 1e-5
            assert row.stderr and row.n == data.num_tokens - data.num_sequences


def test_removals_are_run_on_scored_documents():
    view, data = view_of("mixtral"), text(97)
    rows = tx.measure(view, [Routing(removal_sample=10**6)], data).where(metric="removal_cost").rows
    assert len(rows) == 2 * EXPERTS
    assert all(0 < row.documents < 97 / 2 and 0 < row.n < data.num_tokens / 2 for row in rows)


class Ones(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def test_affine_experts_are_linear_and_others_are_not():
    model, data = sparse_model(), text(97)
    probe = Routing(removal=False)
    curved = tx.measure(View(sparse_model()), [probe], data).where(metric="r2_heldout", element="expert")
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = Ones()  # leaves down(up x)
    table = tx.measure(View(model), [probe], data).where(metric="r2_heldout")
    for layer in range(2):
        for expert in range(EXPERTS):
            row = only(table, layer=layer, part=part(expert))
            assert row.value == pytest.approx(1, abs=1e-4)  # the tuned ridge is the largest within 1e-4 of the best
            assert row.split == "heldout/document" and row.stderr is not None
            bent = only(curved, layer=layer, part=part(expert))
            assert bent.value is None or bent.value < 0.99
    assert sum(row.value is not None for row in curved) >= EXPERTS


def test_linearity_against_a_loop():
    """Each expert's tokens collected document by document, its outputs written out, R^2 about the scored mean."""
    view, data = view_of("mixtral"), text(97)
    table = tx.measure(view, [Routing(removal=False)], data, batch_size=7).where(metric="r2_heldout", layer=1)
    parts, fused = assign(data, 0.25, 0.125, "hash", 0).part, view.layers[1].mlp.experts
    sites = seen(view, data, 1)
    for expert in range(EXPERTS):
        rows: dict[int, list[torch.Tensor]] = {FIT: [], TUNE: [], SCORE: []}
        for which, one in zip(parts.tolist(), sites, strict=True):
            chose = (one["selected"] == expert).any(1)
            rows[which] += list(torch.from_numpy(one["ffn_in"][chose]))
        x = {which: torch.stack(found) for which, found in rows.items()}
        with torch.no_grad():
            y = {which: torch.stack([gated(fused, expert, one) for one in found]) for which, found in rows.items()}
        fit, tune = Moments.start(x[FIT], [y[FIT]]), Moments.start(x[FIT], [y[FIT]])
        fit.add(x[FIT], [y[FIT]])
        tune.add(x[TUNE], [y[TUNE]])
        fitted = Solver.of(fit, tune, rcond_for(torch.float64), torch.float64)(0, None)
        missed = (y[SCORE] - fitted(x[SCORE])).square().sum()
        expected = 1 - float(missed / (y[SCORE] - y[SCORE].mean(0)).square().sum())
        row = only(table, part=part(expert))
        if len(x[FIT]) < 2 * HIDDEN:
            assert row.value is None and f"{len(x[FIT])} fit tokens" in str(row.reason)
        else:
            assert row.value == pytest.approx(expected, abs=loss_error("mixtral")) and row.n == len(x[SCORE])
    assert sum(row.value is not None for row in table) >= 3


def test_too_few_rows_for_a_fit_are_no_number():
    table = tx.measure(view_of("mixtral"), [Routing(removal=False, min_rows=10**6)], text(61))
    rows = table.where(metric="r2_heldout").rows
    assert len(rows) == 2 * EXPERTS
    assert all(row.value is None and "1000000 or more" in str(row.reason) for row in rows)


def with_drops(row: torch.Tensor) -> torch.Tensor:
    """Every fourth row loses its second choice."""
    index = in_turn(row)
    index[::4, 1] = -1
    return index


def test_dropped_choices_are_counted():
    view = planted_view(with_drops, matrices=True)
    table = tx.measure(view, [Routing(removal_sample=300, min_rows=50)], whole_text(), batch_size=3)
    for layer in range(2):
        row = only(table, metric="drop_fraction", layer=layer)
        assert row.value == 1 / 8 and row.n == 41 * WHOLE * 2
        for metric in ("entropy", "type_preference"):
            assert only(table, metric=metric, layer=layer, part=None).n == 41 * WHOLE * 7 // 4
        loads = [value(table, metric="load", layer=layer, part=part(expert)) for expert in range(EXPERTS)]
        assert sum(loads) == pytest.approx(1, abs=1e-12)
        # of 20 rows each expert is the first choice of 4 and the second of 4, of which one is dropped
        assert loads == pytest.approx([1 / EXPERTS] * EXPERTS, abs=1e-12)
        for expert in range(EXPERTS):
            assert value(table, metric="r2_heldout", layer=layer, part=part(expert)) == pytest.approx(1, abs=1e-4)
            assert value(table, metric="removal_cost", layer=layer, part=part(expert)) != 0


class Scaled(nn.Module):
    """A sparse FFN whose experts read something else than its router."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, HIDDEN)
        _, weights, index = self.gate(flat)
        return self.experts(torch.tanh(flat), index, weights).reshape(x.shape)


def test_experts_with_an_input_of_their_own_are_counted_and_removed_but_not_run():
    model = sparse_model()
    for layer in model.model.layers:
        layer.mlp = Scaled(layer.mlp)
    table = tx.measure(View(model), [Routing(removal_sample=100)], text(61)).where(layer=1)
    for metric in ("influence", "r2_heldout"):
        rows = table.where(metric=metric).rows
        assert len(rows) == EXPERTS
        assert all(row.reason == "the chosen blocks do not read ffn_in" for row in rows)
    assert value(table, metric="entropy") > 0.5
    assert all(row.value for row in table.where(metric="removal_cost"))


@functools.cache
def measured(name: str) -> Table:
    return tx.measure(view_of(name), [Routing(removal_sample=60)], text(61), batch_size=7)


@pytest.mark.parametrize("name", SPARSE)
def test_every_family(name: str):
    view, table = view_of(name), measured(name)
    sparse = [layer for layer, known in enumerate(view.maps) if known.sparse]
    assert sparse == ([1] if name == "deepseek_v3" else [0, 1])
    for layer in sparse:
        rows = table.where(layer=layer)
        experts = 6 if name == "deepseek_v3" else EXPERTS
        assert Counter(row.metric for row in rows) == {
            **dict.fromkeys(("load", "influence", "removal_cost", "r2_heldout"), experts),
            **dict.fromkeys(("entropy", "dead_fraction", "drop_fraction"), 1),
            "type_preference": experts + 1,
            "co_selection": experts * (experts - 1) // 2,
        }
        loads = [value(rows, metric="load", part=part(expert)) for expert in range(experts)]
        assert sum(loads) == pytest.approx(1, abs=1e-12)
        entropy = -sum(load * math.log(load) for load in loads if load) / math.log(experts)
        assert value(rows, metric="entropy") == pytest.approx(entropy, abs=1e-12)
        assert value(rows, metric="dead_fraction") == loads.count(0) / experts
        assert sum(row.value is not None for row in rows.where(metric="r2_heldout")) >= 1
        assert all(row.value is not None or row.reason for row in rows)
    keys = [(row.metric, row.layer, row.element, row.part, row.edit, row.variant, row.split) for row in table]
    assert len(set(keys)) == len(keys)


def test_a_dense_layer_of_a_sparse_model_is_one_empty_row():
    (row,) = measured("deepseek_v3").where(layer=0).rows
    assert (row.metric, row.value, row.reason) == ("entropy", None, "dense FFN: nothing is routed")


def test_a_model_without_a_head_moves_instead_of_losing():
    view = View(tiny_model("olmoe", torch.float64, layers=2).base_model)
    table = tx.measure(view, [Routing(removal_sample=100, linearity=False)], text(23))
    costs, moved = (table.where(metric=metric).rows for metric in ("removal_cost", "state_change"))
    assert len(costs) == len(moved) == 2 * EXPERTS
    assert all(row.reason == "the model has no head" for row in costs)
    assert all(row.value is not None and row.value > 0 for row in moved)


def documents() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [
        rng.integers(FIRST_TEXT_ID, FIRST_TEXT_ID + 23, size).tolist() for size in (1, 67, *rng.integers(9, 40, 45))
    ]


def test_neither_batches_nor_the_order_of_documents_matter():
    view, rows, probe = view_of("qwen2_moe"), documents(), Routing(removal_sample=100)
    order = np.random.default_rng(11).permutation(len(rows))
    shuffled = from_tokens([rows[at] for at in order], seq_len=17)
    plain = from_tokens(rows, seq_len=17)
    expected = tx.measure(view, [probe], plain, batch_size=1).rows
    for data, size in ((plain, 7), (shuffled, 5)):
        found = tx.measure(view, [probe], data, batch_size=size).rows
        for mine, yours in zip(expected, found, strict=True):
            blank = {"value": 0.0, "reason": None, "stderr": None, "low": None, "high": None}
            assert replace(mine, **blank) == replace(yours, **blank)
            for name in ("value", "stderr", "low", "high"):
                # 1e-6: norms, attention weights and the router's softmax are computed in float32
                assert getattr(mine, name) == pytest.approx(getattr(yours, name), abs=1e-6), (mine, yours)
    other = [[*rows[0], FIRST_TEXT_ID], *rows[1:]]
    changed = tx.measure(view, [probe], from_tokens(other, seq_len=17), batch_size=7).rows
    assert max(abs(a.value - b.value) for a, b in zip(expected, changed, strict=True) if a.value and b.value) > 1e-3


def test_a_stop_between_any_two_batches_changes_no_bit():
    plan = tx.plan(view_of("mixtral", torch.float32), [Routing(removal_sample=150)], text(47), batch_size=11)
    assert [stage.phase for stage in plan.passes[0].stages] == ["fit", "tune", "score", "edit"]
    whole = rows_of(plan)
    assert whole == rows_of(plan, stop=True)
    assert {row.metric for row in whole if row.value is not None} >= {"r2_heldout", "removal_cost", "influence"}


def place(row: Row) -> tuple:
    return row.layer, row.metric, row.part or ""


def test_memory_is_declared_and_layers_go_in_passes_when_it_is_short():
    view, data = view_of("mixtral"), text(61)
    probe = Routing(removal_sample=60)
    plan = tx.plan(view, [probe], data)
    (item,) = plan.passes
    for state in states_of(plan, item):
        assert 0 < packed_bytes(state.pack()) <= item.bytes
    halves = make(view, [probe], data, free=int(1.2 * item.bytes))
    assert [s.layers for one in halves.passes for s in one.settings] == [(0,), (1,)]
    for mine, yours in zip(*(sorted(rows_of(one), key=place) for one in (halves, plan)), strict=True):
        assert place(mine) == place(yours) and mine.reason == yours.reason
        for name in ("value", "stderr", "low", "high"):
            assert getattr(mine, name) == pytest.approx(getattr(yours, name), abs=1e-12)


def test_a_dense_model_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^routing: no layer of .* has a sparse FFN$"):
        tx.measure(view_of("gpt2"), ["routing"], text(5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_rows": 1}, "min_rows is 1"),
        ({"removal_sample": 0}, "removal_sample is 0"),
        ({"most_pairs": 0}, "most_pairs is 0"),
        ({"objective": "both"}, "objective 'both' is unknown"),
        ({"mask_rate": 1.5}, "mask_rate is 1.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, said: str):
    with pytest.raises(InputError, match=said):
        Routing(**options)


def test_weights_are_a_site():
    """ffn_out is the sum of the chosen experts' outputs times the site."""
    view, ids = view_of("mixtral"), random_ids((2, 7), torch.Generator().manual_seed(0))
    with torch.no_grad(), view.capture(("selected", "selected_weights", "ffn_in", "ffn_out"), [1]) as found:
        view.run(ids)
        fused = view.layers[1].mlp.experts
        for row in range(2):
            for at in range(7):
                given = zip(found["selected", 1][row, at].tolist(), found["selected_weights", 1][row, at], strict=True)
                total = sum(weight * gated(fused, expert, found["ffn_in", 1][row, at]) for expert, weight in given)
                torch.testing.assert_close(total, found["ffn_out", 1][row, at], rtol=0, atol=1e-10)
