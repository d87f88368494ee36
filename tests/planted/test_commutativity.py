"""Layers that commute, layers that cannot, and every number against a plain computation."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import transect as tx
from families import loss_error, tiny_model
from loops import embed, finish, hand_logits
from plants import only, planted, text, value, view_of
from transect.data import Dataset, from_tokens
from transect.data.objective import NONE, Objective, with_targets
from transect.errors import InputError
from transect.probes.commutativity import KINDS, Arrangement, Commutativity
from transect.results import Row, Table
from transect.view import edits
from transect.view.view import View

LAYERS = 5
MASK_ID = 3
EVERYTHING = 10**6
SCORES = ("loss", "loss_change", "kl", "agreement", "state_change")
NONE_LOST = {"loss_change": 0.0, "kl": 0.0, "agreement": 1.0, "state_change": 0.0}


def measured(view: View, data: Dataset | None = None, seed: int = 0, batch_size: int = 7, **options) -> Table:
    options = {"sample": EVERYTHING, "mask_id": MASK_ID} | options
    return tx.measure(view, [Commutativity(**options)], data or text(), seed=seed, batch_size=batch_size)


def scores(table: Table, **equal: object) -> dict[str, float]:
    return {metric: value(table, metric=metric, **equal) for metric in NONE_LOST}


def mean(table: Table, metric: str) -> float:
    return float(np.mean([row.value for row in table.where(metric=metric, variant="pairs")]))


# orders


def orders(layers: int, *kinds: str, seed: int = 0, **options) -> dict[str, tuple[int, ...]]:
    return {one.edit: one.order for one in Commutativity(kinds=kinds, **options).arrangements(layers, seed)}


def test_every_kind_of_order():
    assert orders(4, "pairs") == {
        "swap 0,1": (1, 0, 2, 3),
        "swap 0,2": (2, 1, 0, 3),
        "swap 0,3": (3, 1, 2, 0),
        "swap 1,2": (0, 2, 1, 3),
        "swap 1,3": (0, 3, 2, 1),
        "swap 2,3": (0, 1, 3, 2),
    }
    assert [len(orders(layers, "pairs")) for layers in (12, 6)] == [66, 15]
    assert list(orders(4, "adjacent")) == ["swap 0,1", "swap 1,2", "swap 2,3"]
    assert orders(5, "mirrored") == {"swap 0,4": (4, 1, 2, 3, 0), "swap 1,3": (0, 3, 2, 1, 4)}
    assert list(orders(4, "mirrored")) == ["swap 0,3", "swap 1,2"]
    assert orders(4, "reversal") == {"reverse 0-2": (2, 1, 0, 3), "reverse 1-3": (0, 3, 2, 1)}
    assert orders(3, "repeat") == {f"repeat {layer}": (layer,) * 3 for layer in range(3)}
    assert orders(5, "pattern", pattern_widths=(2,)) == {
        "pattern 0,1": (0, 1, 0, 1, 0),
        "pattern 2,3": (2, 3, 2, 3, 2),
    }
    assert orders(12, "pattern", pattern_widths=(4,)) == {
        "pattern 0,1,2,3": (0, 1, 2, 3) * 3,
        "pattern 4,5,6,7": (4, 5, 6, 7) * 3,
        "pattern 8,9,10,11": (8, 9, 10, 11) * 3,
    }
    assert orders(4, "pattern", pattern_widths=(4,)) == {}  # the model itself


def test_few_layers_have_few_orders():
    everything = Commutativity(kinds=KINDS, pattern_widths=(1, 2))
    assert {one.kind for one in everything.arrangements(1, 0)} == {"repeat"}
    assert {one.kind for one in everything.arrangements(2, 0)} == set(KINDS) - {"reversal"}
    view = view_of("gpt2", layers=1)
    table = measured(view, kinds=KINDS)
    assert scores(table, edit="repeat 0") == NONE_LOST


def shuffles(layers: int, seed: int, **options) -> list[Arrangement]:
    return Commutativity(kinds=("shuffle",), **options).arrangements(layers, seed)


def test_a_shuffle_leaves_at_least_so_many_layers_at_home():
    found = shuffles(7, 0, shuffles=401)
    assert {one.part for one in found} == {f"{fixed} fixed" for fixed in range(6)}
    for one in found:
        home = sum(layer == place for place, layer in enumerate(one.order))
        assert sorted(one.order) == list(range(7)) and one.part is not None
        assert home >= int(one.part.split()[0])
    for part in {one.part for one in found}:
        moved = np.array([one.order for one in found if one.part == part]) != np.arange(7)
        assert (moved.mean(0) > 0.5 * moved.mean()).all()  # no layer is left out of it
    free = [one.order for one in found if one.part == "0 fixed"]
    assert len(set(free)) > 350 and any(order[0] == 0 for order in free)  # a layer may land home
    two = [one.order for one in shuffles(7, 0, shuffles=50, fixed=(5,))]
    assert 10 < sum(order == tuple(range(7)) for order in two) < 40  # of two free layers, half the draws


def test_shuffles_follow_from_the_seed():
    first, again, other = (shuffles(7, seed) for seed in (0, 0, 1))
    assert first == again != other
    more = {one.order for one in shuffles(7, 0, shuffles=23, fixed=(2,))}
    assert {one.order for one in shuffles(7, 0, shuffles=5, fixed=(2,))} <= more


# layers that commute


def test_the_identity_order_changes_nothing():
    view = view_of("gpt2", layers=3)
    table = measured(view, kinds=("shuffle",), fixed=(3,), shuffles=2)
    assert scores(table, edit="shuffle, 3 of 3 fixed") == NONE_LOST
    intact = only(table, metric="loss", edit="intact")
    assert only(table, metric="loss", variant="shuffle").value == intact.value


@functools.cache
def equal_layers() -> View:
    """Layers 1 and 3 have the same weights."""
    model = tiny_model("gpt2", torch.float64, layers=LAYERS)
    model.transformer.h[3].load_state_dict(model.transformer.h[1].state_dict())
    return View(model)


def test_layers_with_equal_weights_commute():
    table = measured(equal_layers(), kinds=("pairs", "shuffle"), shuffles=2)
    assert scores(table, edit="swap 1,3") == NONE_LOST
    others = [row for row in table.where(metric="kl", variant="pairs") if row.edit != "swap 1,3"]
    assert len(others) == 9 and min(row.value for row in others) > 1e-3


@contextmanager
def without_branches(view: View):
    with ExitStack() as stack:
        for layer in range(view.num_layers):
            for part in ("attn", "ffn"):
                stack.enter_context(edits.remove(view, part, layer))
        yield


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_without_branches_every_order_is_the_same(name: str):
    """T11: pre-norm exactly; post-norm when all norms are equal."""
    view = view_of(name, layers=3)
    if name == "bert":
        model = tiny_model(name, torch.float64, layers=3)
        norms = [m for m in model.bert.encoder.modules() if isinstance(m, nn.LayerNorm)]
        for norm in norms[1:]:
            norm.load_state_dict(norms[0].state_dict())
        view = View(model)
    options = {"kinds": ("pairs", "reversal", "shuffle", "repeat"), "shuffles": 2}
    with without_branches(view):
        quiet = measured(view, **options)
    for metric, expected in NONE_LOST.items():
        assert {row.value for row in quiet.where(metric=metric)} == {expected}
    assert min(row.value for row in measured(view, **options).where(metric="kl", variant="pairs")) > 1e-3


def small_branches(layers: int) -> View:
    """A model whose layers each add little to the stream, as trained ones do."""
    model = tiny_model("gpt2", torch.float64, layers=layers)
    with torch.no_grad():
        for block in model.transformer.h:
            for last in (block.attn.c_proj, block.mlp.c_proj):
                last.weight *= 0.1
                last.bias *= 0.1
    return View(model)


def test_residuals_make_layers_commute():
    """The paper's main cause of commutativity: the same layers without their residuals do not."""
    view = small_branches(LAYERS)
    with_them = measured(view, kinds=("pairs",))
    with ExitStack() as stack:
        for layer in range(LAYERS):
            stack.enter_context(edits.scale_residual(view, layer, 0.0))
        without = measured(view, kinds=("pairs",))
    for metric in ("kl", "state_change"):
        assert mean(without, metric) > 30 * mean(with_them, metric) > 0
    assert mean(with_them, "agreement") > 0.9 > 0.5 > mean(without, "agreement")


def test_planted_maps_commute_with_their_residual_only():
    maps = torch.randn(LAYERS, 40, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 40**0.5
    view = view_of("gpt2", layers=LAYERS)
    changes = []
    for weight in (1.0, 0.0):
        functions = {
            ("layer", layer): lambda x, a=maps[layer], w=weight: w * x + (0.1 if w else 1) * torch.tanh(x @ a)
            for layer in range(LAYERS)
        }
        with planted(view, functions):
            changes.append(mean(measured(view, kinds=("pairs",)), "state_change"))
    assert 0 < 100 * changes[0] < changes[1]


def test_a_pair_that_does_not_commute():
    """T12: h + 1 and 2 h make 2 h + 2 in one order and 2 h + 1 in the other."""
    view, data = view_of("llama"), text(23)  # its final norm does not take a shift away
    with planted(view, {("layer", 0): lambda h: h + 1, ("layer", 1): lambda h: 2 * h}):
        table = measured(view, data, kinds=("adjacent",))
    logits = {}
    for start, length in zip(data.starts, data.lengths, strict=True):
        ids = torch.from_numpy(data.ids[start : start + length].astype(np.int64))[None]
        with torch.no_grad():
            h = embed(view.model, ids)
            for name, state in (("intact", 2 * h + 2), ("swap 0,1", 2 * h + 1)):
                logits.setdefault(name, []).append((finish(view.model, state)[0], ids[0]))
    for name, found in logits.items():
        losses = [nn.functional.cross_entropy(out[:-1], ids[1:], reduction="none") for out, ids in found]
        assert value(table, metric="loss", edit=name) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-10)
    assert value(table, metric="kl", edit="swap 0,1") > 1e-4


def test_a_nearly_commuting_pair_costs_in_the_square_of_its_size():
    """T12: the commutator of I + e A and I + e B is e^2 (A B - B A)."""
    nilpotent = torch.zeros(40, 40, dtype=torch.float64)
    nilpotent[0, 1] = 1
    view, costs = view_of("gpt2"), []
    for size in (0.1, 0.05):
        functions = {
            ("layer", 0): lambda h, size=size: h + size * h @ nilpotent,
            ("layer", 1): lambda h, size=size: h + size * h @ nilpotent.T,
        }
        with planted(view, functions):
            costs.append(value(measured(view, kinds=("adjacent",)), metric="state_change"))
    assert costs[0] / costs[1] == pytest.approx(2**4, rel=0.1)  # state_change is a square itself


# against plain computation


def alone(data: Dataset) -> list[tuple[Tensor, Tensor]]:
    """Every sequence by itself: its ids [1, positions] and its targets [positions]."""
    assert data.target is not None
    slices = [slice(start, start + length) for start, length in zip(data.starts, data.lengths, strict=True)]
    found = [(torch.from_numpy(data.ids[part]), torch.from_numpy(data.target[part])) for part in slices]
    return [(ids.long()[None], target.long()) for ids, target in found]


def last_states(view: View, data: Dataset, order: Sequence[int]) -> list[Tensor]:
    with torch.no_grad(), edits.order(view, order):
        return [view.base(input_ids=ids, use_cache=False).last_hidden_state[0] for ids, _ in alone(data)]


def by_hand(view: View, data: Dataset, order: Sequence[int]) -> Mapping[str, np.ndarray]:
    """Each sequence's sums of every score, and its targets and tokens."""
    intact = range(view.num_layers)
    sums: dict[str, list[float]] = {name: [] for name in (*SCORES, "targets", "tokens")}
    states = zip(*(last_states(view, data, one) for one in (intact, order)), strict=True)
    for (ids, target), pair in zip(alone(data), states, strict=True):
        asked = target != NONE
        before, after = (hand_logits(view.model, ids, one)[0][asked] for one in (intact, order))
        losses = [nn.functional.cross_entropy(out, target[asked], reduction="sum") for out in (before, after)]
        kl = nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        cosine = torch.cosine_similarity(*pair, dim=-1)
        found = {
            "loss": losses[1],
            "loss_change": losses[1] - losses[0],
            "kl": kl,
            "agreement": (before.argmax(-1) == after.argmax(-1)).sum(),
            "state_change": ((1 - cosine) / 2).sum(),
            "targets": asked.sum(),
            "tokens": len(target),
        }
        for name, total in found.items():
            sums[name].append(float(total))
    return {name: np.array(totals) for name, totals in sums.items()}


def objective(name: str) -> Objective:
    return Objective(kind="masked", mask_id=MASK_ID) if name == "bert" else Objective(kind="causal")


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_every_score_is_the_plain_one(name: str):
    view, data = view_of(name, layers=3), text(23, high=17)
    shown = with_targets(data, objective(name), view.vocab_size, 0)
    table = measured(view, data, kinds=("pairs", "repeat"))
    assert len(table.where(metric="kl")) == 6
    for row in table.where(metric="kl"):
        order = orders(3, "pairs", "repeat")[row.edit]
        sums = by_hand(view, shown, order)
        for metric in SCORES:
            over = "tokens" if metric == "state_change" else "targets"
            found = only(table, metric=metric, edit=row.edit)
            assert found.value == pytest.approx(sums[metric].sum() / sums[over].sum(), abs=loss_error(name)), metric
            assert found.n == sums[over].sum() and found.documents == 23
    intact = by_hand(view, shown, range(3))
    assert value(table, metric="loss", edit="intact") == pytest.approx(
        intact["loss"].sum() / intact["targets"].sum(), abs=loss_error(name)
    )
    assert intact["targets"].sum() < intact["tokens"].sum()


def test_errors_are_a_bootstrap_over_documents():
    view, data = view_of("gpt2", layers=3), text(29)
    shown = with_targets(data, objective("gpt2"), view.vocab_size, 0)
    table = measured(view, data, seed=5, kinds=("adjacent",))
    sums = by_hand(view, shown, (1, 0, 2))
    order = np.argsort(data.document_hash)
    document = {name: np.bincount(data.document, weights=totals)[order] for name, totals in sums.items()}
    rng = np.random.Generator(np.random.PCG64(5))
    drawn = np.concatenate([rng.multinomial(29, np.full(29, 1 / 29), size=100) for _ in range(10)])
    for metric in SCORES:
        over = document["tokens" if metric == "state_change" else "targets"]
        draws = drawn @ document[metric] / (drawn @ over)
        row = only(table, metric=metric, edit="swap 0,1")
        assert row.stderr == pytest.approx(draws.std(ddof=1), rel=1e-6)
        assert (row.low, row.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), rel=1e-6)
        assert row.low < row.value < row.high


def test_shuffle_rows_are_means_over_orders():
    view, data = view_of("gpt2", layers=LAYERS), text(23, high=17)
    shown = with_targets(data, objective("gpt2"), view.vocab_size, 0)
    table = measured(view, data, seed=2, kinds=("shuffle",), fixed=(0, 2), shuffles=3)
    assert len(table.where(variant="shuffle")) == 2 * len(SCORES)
    for fixed in (0, 2):
        drawn = [one.order for one in shuffles(LAYERS, 2, fixed=(fixed,), shuffles=3)]
        by_order = [by_hand(view, shown, order) for order in drawn]
        for metric in SCORES:
            over = "tokens" if metric == "state_change" else "targets"
            found = [sums[metric].sum() / sums[over].sum() for sums in by_order]
            row = only(table, metric=metric, part=f"{fixed} fixed")
            assert row.value == pytest.approx(np.mean(found), abs=1e-10)
            assert row.stderr == pytest.approx(np.std(found, ddof=1) / 3**0.5, abs=1e-10)
            assert (row.low, row.high) == pytest.approx((row.value - 1.96 * row.stderr, row.value + 1.96 * row.stderr))
    single = measured(view, data, kinds=("shuffle",), fixed=(0,), shuffles=1)
    assert all(row.stderr is row.low is row.high is None for row in single.where(variant="shuffle"))


# what is run, and on how much


@pytest.mark.parametrize("kind", ["pairs", "adjacent"])
def test_layers_run_and_saved_are_told(kind: str):
    table = measured(view_of("gpt2", layers=LAYERS), text(23), kinds=(kind,))
    own = {"pairs": (LAYERS - 1) * LAYERS * (LAYERS + 1) // 3, "adjacent": (LAYERS - 1) * (LAYERS + 2) // 2}[kind]
    count = {"pairs": LAYERS * (LAYERS - 1) // 2, "adjacent": LAYERS - 1}[kind]
    done, saved = (value(table, metric="layer_evaluations", variant=name) for name in ("done", "saved"))
    assert done == own + LAYERS and done + saved == LAYERS * count + LAYERS


def test_a_sample_is_whole_sequences_and_follows_from_the_tokens():
    view = view_of("gpt2", layers=3)
    rows = [np.random.default_rng(n).integers(5, 97, 7 + n % 5).tolist() for n in range(37)]
    shorter, other = (from_tokens(given, seq_len=13) for given in (rows, rows[::-1]))
    table = measured(view, shorter, kinds=("adjacent",), sample=101)
    tokens = only(table, metric="state_change", edit="swap 0,1").n
    assert tokens is not None and 101 - 11 <= tokens <= 101
    again = measured(view, other, kinds=("adjacent",), sample=101, batch_size=1)
    assert only(again, metric="state_change", edit="swap 0,1").n == tokens
    assert value(again, metric="loss", edit="intact") == pytest.approx(
        value(table, metric="loss", edit="intact"), abs=1e-12
    )
    one = only(measured(view, shorter, kinds=("adjacent",), sample=1), metric="state_change", edit="swap 0,1")
    assert one.n in range(7, 12) and one.documents == 1 and one.stderr is None


def test_a_sample_without_a_target_says_so():
    data = from_tokens([[token] for token in range(5, 60)] + [[7, 9, 11]], seq_len=5)
    table = measured(view_of("gpt2", layers=3), data, kinds=("adjacent",), sample=1)
    for row in table.where(metric="loss"):
        assert (row.value, row.reason, row.n) == (None, "no position has a target", 0)
    assert value(table, metric="state_change", edit="swap 0,1") > 0


def test_a_model_without_a_head_has_states_only():
    for view in (View(tiny_model("bert", torch.float64, layers=3).bert), View(tiny_model("gpt2").transformer)):
        table = tx.measure(view, [Commutativity(sample=EVERYTHING, shuffles=2)], text(23))
        assert {row.metric for row in table} == {"state_change", "layer_evaluations"}
        assert min(row.value for row in table.where(variant="pairs")) > 1e-4


def test_half_precision_is_measured_in_single():
    """Log-probabilities in bfloat16 would be wrong by some hundredths of a nat."""
    view = View(tiny_model("gpt2", torch.bfloat16, layers=2))
    data = text(23)
    shown = with_targets(data, objective("gpt2"), view.vocab_size, 0)
    table = measured(view, data, kinds=("adjacent",), batch_size=1)
    with torch.no_grad():
        logits = torch.cat([view.run(ids, head=True)[0] for ids, _ in alone(shown)]).double()
    targets = torch.cat([target for _, target in alone(shown)])
    expected = nn.functional.cross_entropy(logits, targets, ignore_index=NONE)
    assert value(table, metric="loss", edit="intact") == pytest.approx(float(expected), abs=1e-5)


def test_an_order_that_overflows_gives_a_reason():
    view = view_of("gpt2", layers=3)
    with planted(view, {("layer", 1): lambda h: h * 1e120}):
        table = measured(view, text(23), kinds=("repeat",))
    lost: list[Row] = table.where(metric="loss", edit="repeat 1").rows
    assert [(row.value, row.reason) for row in lost] == [(None, "the edited model gives numbers that are not finite")]
    assert value(table, metric="loss", edit="repeat 0") > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("pairs", "triples")}, "kind 'triples' is unknown; allowed are pairs"),
        ({"sample": 0}, "sample is 0; it is 1 or more"),
        ({"shuffles": 0}, "shuffles is 0; it is 1 or more"),
        ({"pattern_widths": (2, 0)}, "widths are 1 or more"),
        ({"objective": "prefix"}, "objective 'prefix' is unknown; allowed are auto, causal, masked"),
        ({"mask_rate": 1.0}, "mask_rate is 1.0; it lies between 0 and 1"),
        ({"fixed": (LAYERS + 1,)}, "6 layers cannot be fixed; the model has 5"),
        ({"fixed": (-1,)}, "-1 layers cannot be fixed"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, words: str):
    with pytest.raises(InputError) as caught:
        measured(view_of("gpt2", layers=LAYERS), text(23), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_runs_its_layers_in_a_loop_is_refused():
    view = View(tiny_model("albert/two_inner"))
    with pytest.raises(InputError, match=r"^commutativity: .* in a loop") as caught:
        measured(view)
    assert "\n" not in str(caught.value)
    assert Commutativity().refusal(view_of("albert", layers=3)) is None
    assert only(measured(view_of("albert", layers=3), text(23)), metric="kl", edit="swap 0,1").value == 0  # one module
