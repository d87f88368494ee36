"""The contribution probe on planted sub-layers that tell the target, say nothing, or hide it; options; invariance."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn

import transect as tx
from families import FAMILIES, FIRST_TEXT_ID, VOCAB, tiny_model
from plants import only, planted, text, value, values, view_of
from shell import command, saved_model, saved_tokens
from stops import packed_bytes, rows_of, states_of
from transect.data import Dataset, from_tokens, sample_tokens
from transect.data.objective import NONE, Objective, with_targets
from transect.errors import InputError
from transect.measure import run
from transect.metrics import kmeans
from transect.metrics.errors import Error
from transect.probes import _information
from transect.probes._levels import Derived, Rule, share_reason, with_seeds
from transect.probes.contribution import Contribution
from transect.results import Table
from transect.view.view import View

MASK = 3
WORDS = 11  # different tokens of the planted text
LENGTH = 13
LOUD = 1e4
VARIANTS = {"mutual_information": "normalised", "token_prediction": "same"}
SHARES = ("MI", "MI/over_seeds", "TP/same", "TP/split_half")
Function = Callable[[Tensor], Tensor]
silent: Function = torch.zeros_like


@functools.cache
def words(documents: int = 101) -> Dataset:
    """Equally long documents of a few random words, so that nothing is padded and few targets exist."""
    rng = np.random.default_rng(1)
    return from_tokens(rng.integers(FIRST_TEXT_ID, FIRST_TEXT_ID + WORDS, (documents, LENGTH)))


def asked(probe: Contribution, data: Dataset) -> Dataset:
    objective = Objective(kind="causal") if probe.mask_id is None else Objective(kind="masked", mask_id=MASK)
    return with_targets(data, objective, VOCAB, 0)


def probe(name: str = "gpt2", **options) -> Contribution:
    masked = {"mask_id": MASK} if FAMILIES[name].masked else {}
    return Contribution(**{"mi_clusters": 2 * WORDS, "tp_min_count": 5} | masked | options)


@contextmanager
def telling(view: View, data: Dataset, vectors: Tensor) -> Iterator[Function]:
    """A function that writes its position's target, looked up by the whole row of ids that the model is reading."""
    assert data.target is not None
    target = np.where(data.target == NONE, 0, data.target)
    rows = {data.ids[s : s + LENGTH].tobytes(): target[s : s + LENGTH] for s in data.starts}
    reading: list[np.ndarray] = []

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        reading[:] = ids.numpy().astype(np.int32)

    def tell(x: Tensor) -> Tensor:
        found = [rows.get(row.tobytes(), np.zeros(x.shape[1], np.int32)) for row in reading]
        return vectors[torch.from_numpy(np.stack(found).astype(np.int64))].to(x.dtype)

    handle = view.base.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield tell
    finally:
        handle.remove()


def code(view: View) -> Tensor:
    """A long vector for each token, which its own row of the head likes."""
    return LOUD * view.model.get_output_embeddings().weight.detach().double()


def measured(view: View, one: Contribution, data: Dataset, plants: dict, **options) -> Table:
    """Rows with elements replaced by name: "tell", "silent", or a function."""
    with telling(view, asked(one, data), code(view)) as tell:
        functions = {"tell": tell, "silent": silent}
        with planted(view, {key: functions.get(plant, plant) for key, plant in plants.items()}):
            return tx.measure(view, [one], data, batch_size=32, **options)


def everywhere(attn: object, ffn: object, last: dict) -> dict:
    return {("attn", 0): attn, ("ffn", 0): ffn, ("attn", 1): attn, ("ffn", 1): ffn} | last


# --- who tells gains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "olmo"])
@pytest.mark.parametrize(("teller", "quiet"), [("ffn", "attn"), ("attn", "ffn")])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_part_that_writes_nothing_has_no_share(name: str, teller: str, quiet: str, layer: int):
    """Layers without a plant keep their own other sub-layer: only the quiet part is known to add exactly nothing."""
    plants = {(quiet, 0): "silent", (quiet, 1): "silent", (teller, layer): "tell"}
    table = measured(view_of(name), probe(name), words(), plants)
    share, other = ("share_ffn", "share_mha") if teller == "ffn" else ("share_mha", "share_ffn")
    for variant in (*SHARES, "lens"):
        assert value(table, metric=other, variant=variant) == 0, variant
        assert value(table, metric=share, variant=variant) == pytest.approx(1, abs=1e-12), variant
    increments = [row for row in table if (row.variant or "").endswith("/increment") and row.element == quiet]
    assert len(increments) == 2 * 4 and all(row.value == 0 and row.stderr == 0 for row in increments)
    for metric, variant in [*VARIANTS.items(), ("lens_loss", "causal")]:
        told = value(table, metric=metric, variant=f"{variant}/increment", element=teller, layer=layer)
        assert -told > 1 if metric == "lens_loss" else told > 0.5


def test_both_parts_share_what_each_told():
    """Attention tells which half of the words comes next, the FFN then which word: ln 2 of ln 10, or 1 of 5 bits."""
    view, data = view_of("gpt2"), from_tokens(np.random.default_rng(2).integers(5, 15, (211, LENGTH)))
    halves = LOUD * torch.eye(view.width, dtype=torch.float64)[(torch.arange(VOCAB) >= 10).long()]
    one = probe(estimators=("mutual_information", "token_prediction"), mi_debias="shuffle")
    with ExitStack() as stack:
        half, whole = (
            stack.enter_context(telling(view, asked(one, data), vectors)) for vectors in (halves, 10 * code(view))
        )
        stack.enter_context(planted(view, everywhere(silent, silent, {("attn", 0): half, ("ffn", 0): whole})))
        table = tx.measure(view, [one], data, batch_size=32)
    share = only(table, metric="share_mha", variant="MI")
    assert share.value == pytest.approx(np.log(2) / np.log(10), abs=0.02) and share.stderr is not None
    assert abs(share.value - np.log(2) / np.log(10)) < 4 * share.stderr
    mha, ffn = (only(table, metric=f"share_{part}", variant="TP/split_half").value for part in ("mha", "ffn"))
    assert mha + ffn == pytest.approx(1, abs=1e-12) and 0.05 < mha < 0.2


def test_post_norm_a_norm_belongs_to_the_sub_layer_before_it():
    """Silent attention leaves LN(x), which changes the state where the norm has weights, and not where it has none."""
    own = view_of("bert")
    plain = View(tiny_model("bert", torch.float64, 0, 2))
    for module in plain.base.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    plants, increments = everywhere("silent", "silent", {("ffn", 1): "tell"}), {}
    for which, view in (("own", own), ("plain", plain)):
        table = measured(view, probe("bert", tp_min_count=3), words(), plants)
        for variant in SHARES:
            found = [value(table, metric=metric, variant=variant) for metric in ("share_mha", "share_ffn")]
            assert sum(found) == pytest.approx(1, abs=1e-12)
            assert which == "own" or found[0] == pytest.approx(0, abs=1e-9)
        asked_ = {"metric": "lens_loss", "variant": "masked/increment", "element": "attn"}
        increments[which] = [value(table, layer=layer, **asked_) for layer in range(2)]
    assert max(map(abs, increments["plain"])) < 1e-6
    assert min(map(abs, increments["own"])) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("state", ["normalised", "raw"])
@pytest.mark.parametrize("teller", ["attn", "ffn"])
def test_a_copy_of_the_target_is_worth_its_entropy(name: str, state: str, teller: str):
    """Also where centres are fitted on a sample, and for a masked model only masked positions count."""
    other = "attn" if teller == "ffn" else "ffn"
    sampled = {"mi_positions": 151, "mi_fit_positions": "masked"}
    one = probe(name, mi_state=state, tp_min_count=2, estimators=tuple(VARIANTS), **sampled)
    table = measured(view_of(name), one, words(), {(teller, 1): "tell", (other, 1): "silent"})
    data = asked(one, words())
    assert data.target is not None
    sample = sample_tokens(data, 151, 0, among=data.target != NONE)
    levels = table.where(metric="mutual_information", variant=state, site="resid", layer=2)
    assert levels.rows[0].value == pytest.approx(entropy(np.bincount(data.target[sample])), abs=1e-9)
    assert levels.rows[0].n == 151 and entropy(np.bincount(data.target[sample])) > 2
    for split in ("same", "split_half"):
        row = only(table, metric="token_prediction", variant=split, site="resid", layer=2)
        assert row.value == 1 and row.n == (data.target != NONE).sum()
        assert value(table, metric="token_prediction", variant=split, site="resid", layer=0) < 0.6
    below = {value(table, metric="mutual_information", variant=state, site="resid", layer=layer) for layer in (0, 1)}
    assert max(below) < 0.75 * entropy(np.bincount(data.target[sample]))


def test_fewer_clusters_than_targets_hold_no_more_than_their_own_entropy():
    one = probe(mi_clusters=4, estimators=("mutual_information",))
    table = measured(view_of("gpt2"), one, words(), {("ffn", 1): "tell"})
    assert 0.9 < value(table, metric="mutual_information", site="resid", layer=2) < np.log(4) + 1e-12


def test_a_massive_dimension_rules_raw_clusters_only():
    """Its size is as good as drawn, and says nothing of the target; at length 1 only the code is left."""
    view = view_of("gpt2")
    one = probe(mi_clusters=31, mi_seeds=1, estimators=("mutual_information",))

    def massive(x: Tensor) -> Tensor:
        return torch.cat([1e6 * (1 + (1e3 * x.sum(-1, keepdim=True)) % 1), torch.zeros_like(x[..., 1:])], dim=-1)

    found = {}
    for state in ("normalised", "raw"):
        plain = replace(one, mi_state=state)
        vectors = LOUD * torch.eye(view.width, dtype=torch.float64)[1 + torch.arange(VOCAB) % WORDS]
        with telling(view, asked(plain, words()), vectors) as tell:
            plants = {("attn", 1): silent, ("ffn", 1): lambda x, tell=tell: tell(x) + massive(x)}
            with planted(view, plants):
                table = tx.measure(view, [plain], words(), batch_size=32)
        found[state] = value(table, metric="mutual_information", site="resid", layer=2)
    assert found["normalised"] > 0.95 * np.log(WORDS)
    assert found["raw"] < 0.1 * np.log(WORDS)


# --- no share -----------------------------------------------------------------------------------------------------


def following() -> Dataset:
    """Each word is followed by the next one, so that the embeddings tell the target."""
    first = np.random.default_rng(4).integers(0, WORDS, 97)
    return from_tokens(FIRST_TEXT_ID + (first[:, None] + np.arange(LENGTH)) % WORDS)


def _by_position(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1e6 * torch.randn(LENGTH, x.shape[-1], generator=generator, dtype=x.dtype)[: x.shape[1]].expand_as(x)


def test_no_share_where_the_last_state_says_less_than_the_first():
    plants = everywhere("silent", "silent", {("ffn", 1): _by_position})
    table = measured(view_of("gpt2"), probe(), following(), plants)
    for variant in SHARES:
        for metric in ("share_mha", "share_ffn"):
            row = only(table, metric=metric, variant=variant)
            assert row.value is None and "the last state says less than the first" in row.reason, row
    lost = value(table, metric="token_prediction", variant="same/increment", element="ffn", layer=1)
    assert lost < -0.5


def test_no_share_of_a_gain_of_nothing():
    table = measured(view_of("gpt2"), probe(), words(), everywhere("silent", "silent", {}))
    for variant in (*SHARES, "lens"):
        for metric in ("share_mha", "share_ffn"):
            assert only(table, metric=metric, variant=variant).reason == (
                "the total gain 0 is within two errors (0) of zero"
            )


def test_no_share_where_the_error_is_unknown():
    data = from_tokens([[*range(20, 33)]])
    table = tx.measure(view_of("gpt2"), [probe(mi_clusters=3, tp_min_count=1)], data)
    for variant in ("MI", "MI/over_seeds", "TP/same", "lens"):
        row = only(table, metric="share_ffn", variant=variant)
        assert row.value is None and "error of the total gain is unknown" in row.reason
    assert all(row.stderr is None for row in table)
    assert "both halves" in only(table, metric="token_prediction", variant="split_half").reason


def test_no_share_of_a_loss_that_rises():
    """A loss has the other sign: what raises it is no gain."""
    row = functools.partial(share_reason, error=Error(0.1, 0, 0))
    assert row(0.3) is None and "says less" in str(row(-0.3)) and "within two errors" in str(row(0.19))
    assert row(-0.3, falling=True) is None and "gain is -0.3" in str(row(0.3, falling=True))


def test_parallel_layers_have_levels_but_no_shares():
    table = tx.measure(view_of("gptj"), [probe()], words(), batch_size=32)
    for row in table:
        if row.metric.startswith("share"):
            assert row.value is None and "parallel layer" in row.reason
        else:
            assert row.value is not None and row.site in (None, "resid") and row.element in (None, "both")
    assert len(table.where(metric="mutual_information")) == 3 + 2


class Nothing(nn.Module):
    """Stands where a sub-layer was."""


def _attention_only(block: nn.Module, hidden: Tensor, *args, attention_mask=None, **_) -> Tensor:
    mask = args[1] if len(args) > 1 else attention_mask
    return hidden + block.attn(block.ln_1(hidden), attention_mask=mask)[0]


def _ffn_only(block: nn.Module, hidden: Tensor, *args, **_) -> Tensor:
    return hidden + block.mlp(block.ln_2(hidden))


@pytest.mark.parametrize(("part", "run", "absent"), [("attn", _attention_only, "mlp"), ("ffn", _ffn_only, "attn")])
def test_layers_of_one_part_give_it_everything(part: str, run: Callable, absent: str):
    model = tiny_model("gpt2", torch.float64, 0, 2)
    for block in model.transformer.h:
        setattr(block, absent, Nothing())
        block.forward = functools.partial(run, block)
    view = View(model)
    assert view.maps[0].sublayers == (part,)
    table = measured(view, probe(objective="causal"), words(), {(part, 1): "tell"})
    assert {row.element for row in table.where(variant="same/increment")} == {part}
    shares = {"attn": (1, 0), "ffn": (0, 1)}[part]
    for variant in SHARES:
        found = [value(table, metric=metric, variant=variant) for metric in ("share_mha", "share_ffn")]
        assert found == pytest.approx(shares, abs=1e-12)


# --- how shares are made ------------------------------------------------------------------------------------------

LEVELS = np.array([0.10, 0.22, 0.30, 0.28, 0.50])
OWNERS = ("attn", "ffn", "attn", "ffn")


@pytest.mark.parametrize(
    ("rule", "total", "mha", "ffn"),
    [
        (Rule(), 0.4, 0.25, 0.75),
        (Rule(start="a_1"), 0.28, -0.02 / 0.28, 0.3 / 0.28),
        (Rule(negative="clip"), 0.42, 0.12 / 0.42, 0.3 / 0.42),
        (Rule(start="a_1", negative="clip"), 0.3, 0, 1),
    ],
)
def test_the_worked_example_by_every_rule(rule: Rule, total: float, mha: float, ffn: float):
    for sign in (1, -1):  # a loss falls where a score rises, and has the same shares
        found = Derived(OWNERS, replace(rule, falling=sign < 0))(sign * LEVELS)
        assert found[-3:] == pytest.approx([sign * total, mha, ffn], abs=1e-12)
        assert found[:5] == pytest.approx(sign * LEVELS) and found[5:9] == pytest.approx(sign * np.diff(LEVELS))


@pytest.mark.parametrize("start", ["embeddings", "a_1"])
@pytest.mark.parametrize("negative", ["keep", "clip"])
def test_shares_of_the_rows_follow_from_their_levels(start: str, negative: str):
    """The first attention hides what the embeddings tell, the last FFN tells it all: a large loss and a gain."""
    one = probe(ratio_start=start, ratio_negative=negative, estimators=("token_prediction",), tp_split=("same",))
    rows = following().ids.reshape(-1, LENGTH).copy()
    rows[:, ::3] = words().ids.reshape(-1, LENGTH)[: len(rows), ::3]
    plants = {("attn", 0): lambda x: _by_position(x) / 1e3, ("ffn", 1): lambda x: 100 * tell(x)}
    with telling(view_of("gpt2"), asked(one, from_tokens(rows)), code(view_of("gpt2"))) as tell:
        table = measured(view_of("gpt2"), one, from_tokens(rows), plants)
    levels = [value(table, variant="same", site=site, layer=layer) for site, layer in _PLACES]
    steps = np.diff(levels)
    kept = steps.clip(0) if negative == "clip" else steps.copy()
    if start == "a_1":
        kept[0] = 0
    assert steps.min() < -0.2  # else clipping changes nothing
    for element, layer, step in (("attn", 0, 0), ("ffn", 0, 1), ("attn", 1, 2), ("ffn", 1, 3)):
        assert value(table, variant="same/increment", element=element, layer=layer) == pytest.approx(steps[step])
    for metric, own in (("share_mha", kept[::2]), ("share_ffn", kept[1::2])):
        assert value(table, metric=metric) == pytest.approx(own.sum() / kept.sum(), abs=1e-12)
    for element, own in (("attn", kept[::2]), ("ffn", kept[1::2])):
        for layer in range(2):
            found = value(table, variant="same/cumulative", element=element, layer=layer)
            assert found == pytest.approx(own[: layer + 1].sum(), abs=1e-12)


_PLACES = (("resid", 0), ("resid_mid", 0), ("resid", 1), ("resid_mid", 1), ("resid", 2))


def test_clipped_losses_keep_the_steps_that_fall():
    one = probe(ratio_negative="clip", estimators=("lens_loss",))
    table = tx.measure(view_of("gpt2"), [one], text(), batch_size=32)
    steps = [
        value(table, variant="causal/increment", element=element, layer=layer)
        for layer in range(2)
        for element in ("attn", "ffn")
    ]
    kept = np.minimum(steps, 0)
    assert kept.sum() < -1 and max(steps) > 0.1
    for metric, own in (("share_mha", kept[::2]), ("share_ffn", kept[1::2])):
        assert value(table, metric=metric, variant="lens") == pytest.approx(own.sum() / kept.sum(), abs=1e-12)


# --- options ------------------------------------------------------------------------------------------------------


def test_shuffling_takes_the_bias_off_what_says_nothing():
    """Centres of noise that follows the position: 22 clusters at most 13 labels, 11 targets."""
    found = {}
    for debias in ("off", "shuffle", "miller_madow"):
        one = probe(mi_debias=debias, estimators=("mutual_information",), mi_clusters=LENGTH - 1)
        table = measured(view_of("gpt2"), one, words(), everywhere("silent", _by_position, {}))
        found[debias] = value(table, metric="mutual_information", site="resid", layer=2)
    positions = words().num_tokens - words().num_sequences
    bias = (LENGTH - 2) * (WORDS - 1) / (2 * positions)
    spread = (2 * (LENGTH - 2) * (WORDS - 1)) ** 0.5 / (2 * positions)  # of a chi-squared of so many degrees
    assert found["off"] == pytest.approx(bias, abs=4 * spread) and bias > 6 * spread
    assert found["shuffle"] == pytest.approx(0, abs=4 * 2**0.5 * spread)
    assert found["miller_madow"] == pytest.approx(0, abs=4 * spread)


def test_numbers_of_positions_are_in_the_rows():
    one = probe(mi_positions=101, lens_tokens=37, tp_min_count=110)
    table = tx.measure(view_of("gpt2"), [one], words(), batch_size=32)
    target = asked(one, words()).target
    counts = np.bincount(target[target != NONE])
    assert {row.n for row in table.where(metric="mutual_information")} == {101}
    assert {row.n for row in table.where(metric="lens_loss")} == {37}
    assert {row.n for row in table.where(metric="token_prediction", variant="same")} == {counts[counts >= 110].sum()}
    assert 0 < counts[counts >= 110].sum() < counts.sum()


def test_no_target_often_enough_is_one_row_with_the_reason():
    table = tx.measure(view_of("gpt2"), [probe(tp_min_count=10**6)], words(), batch_size=32)
    for split in ("same", "split_half"):
        row = only(table, metric="token_prediction", variant=split)
        assert row.value is None and row.reason == "no target comes 1000000 times in 1,313 tokens"
    assert not [row for row in table if row.variant.startswith("TP")]
    assert value(table, metric="mutual_information", site="resid", layer=0) > 0


def test_shares_over_seeds_are_the_mean_and_spread_of_each_seeds():
    levels = []

    def kept(*given) -> np.ndarray:
        levels.append(found(*given))
        return levels[-1]

    found = _information.Clusters.levels
    one = probe(mi_seeds=3, estimators=("mutual_information",), mi_clusters=7)
    with mock.patch.object(_information.Clusters, "levels", kept):
        table = measured(view_of("gpt2"), one, words(), {("ffn", 0): "tell"})
    whole = levels[0][:, 0]  # [seeds, places]
    assert whole.shape == (3, 5) and whole.std(0).min() > 0
    for (site, layer), level in zip(_PLACES, whole.mean(0), strict=True):
        assert value(table, metric="mutual_information", site=site, layer=layer) == level
    steps = np.diff(whole, axis=1)
    shares = (steps[:, 1] + steps[:, 3]) / steps.sum(1)
    row = only(table, metric="share_ffn", variant="MI/over_seeds")
    assert (row.value, row.stderr) == pytest.approx((shares.mean(), shares.std(ddof=1) / 3**0.5), abs=1e-12)
    assert row.n == 3 and (row.low, row.high) == pytest.approx(
        (row.value - 1.96 * row.stderr, row.value + 1.96 * row.stderr), abs=1e-12
    )


def test_one_seed_has_no_error_over_seeds():
    one = probe(mi_seeds=1, estimators=("mutual_information",))
    table = measured(view_of("gpt2"), one, words(), {("ffn", 1): "tell"})
    for metric in ("share_mha", "share_ffn"):
        assert only(table, metric=metric, variant="MI/over_seeds").reason == "one k-means seed only"
    assert value(table, metric="share_ffn", variant="MI") > 0.5


@pytest.mark.parametrize(
    ("tokens", "options", "clusters"),
    [
        (4_001, {}, 7),  # 3,933 targets
        (101, {}, 2),
        (4_001, {"mi_positions": 2_600}, 5),
        (1_200_001, {}, 2_000),
        (4_001, {"mi_clusters": 29}, 29),
    ],
)
def test_default_number_of_clusters(tokens: int, options: dict, clusters: int):
    data = from_tokens(np.random.default_rng(0).integers(FIRST_TEXT_ID, VOCAB, (1, tokens)), seq_len=60)
    plan = tx.plan(view_of("gpt2"), [Contribution(estimators=("mutual_information",), mi_seeds=1, **options)], data)
    assert plan.passes[0].probes[0].start(plan.passes[0].settings[0], None).sample.clusters == clusters


@pytest.mark.parametrize(("fit", "low", "high"), [("all", 0.2, 0.4), ("masked", 1, 1)])
def test_centres_are_fitted_on_masked_positions_as_often_as_there_are(fit: str, low: float, high: float):
    """Also where the sample is smaller than the text: it must not be drawn by what drew the masks."""
    one = probe("bert", mask_rate=0.3, mi_positions=251, mi_fit_positions=fit)
    (item,) = tx.plan(view_of("bert"), [one], words()).passes
    fits = one.start(item.settings[0], None).sample.fits.numpy()
    assert fits.sum() == 251 and item.data.target is not None
    assert low <= (item.data.target[fits] != NONE).mean() <= high


def test_a_causal_target_never_lies_in_another_sequence():
    """Tokens that begin a sequence are of their own kind, and are never asked for."""
    rng = np.random.default_rng(8)
    rows = np.concatenate([np.full((101, 1), 50), rng.integers(5, 16, (101, LENGTH - 1))], axis=1)
    one = probe(tp_min_count=1)
    data = asked(one, from_tokens(rows))
    assert data.target is not None and 50 not in data.target and (data.target == NONE).sum() == 101
    table = tx.measure(view_of("gpt2"), [one], from_tokens(rows), batch_size=32)
    assert {row.n for row in table.where(metric="token_prediction", variant="same")} == {101 * (LENGTH - 1)}


# --- how the text is put ------------------------------------------------------------------------------------------


@contextmanager
def short_mini_batches(size: int) -> Iterator[None]:
    """k-means with small mini-batches, so that a short text is many."""
    with ExitStack() as stack:
        for module in (kmeans, _information):
            stack.enter_context(mock.patch.object(module, "BATCH", size))
        yield


def documents() -> list[list[int]]:
    rng = np.random.default_rng(5)
    rows = [rng.integers(FIRST_TEXT_ID, VOCAB, size).tolist() for size in (1, 83, *rng.integers(9, 61, 29))]
    return [*rows, rows[7], rows[7]]


def put(name: str, rows: list[list[int]], batch_size: int) -> Table:
    one = probe(name, mi_clusters=7, tp_min_count=3, mi_positions=500, mi_debias="shuffle", lens_tokens=211)
    with short_mini_batches(64):
        return tx.measure(view_of(name), [one], from_tokens(rows, seq_len=17), batch_size=batch_size)


@functools.cache
def put_plainly(name: str) -> Table:
    return put(name, documents(), 1)


def assert_equal(found: Table, expected: Table, tolerance: float) -> None:
    assert len(found) == len(expected) > 50
    for mine, yours in zip(found, expected, strict=True):
        same = dict.fromkeys(("value", "stderr", "low", "high"))
        assert replace(mine, **same | {"value": 0.0, "reason": None}) == replace(
            yours, **same | {"value": 0.0, "reason": None}
        )
        assert mine.reason == yours.reason
        for key in same:
            left, right = getattr(mine, key), getattr(yours, key)
            assert left == right or abs(left - right) <= tolerance * max(abs(right), 1), (key, mine, yours)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("batch_size", [7, 32])
def test_batches_change_nothing(name: str, batch_size: int):
    assert_equal(put(name, documents(), batch_size), put_plainly(name), 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_order_of_documents_changes_nothing(name: str):
    rows = documents()
    shuffled = [rows[at] for at in np.random.default_rng(1).permutation(len(rows))]
    assert_equal(put(name, shuffled, 7), put_plainly(name), 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_nor_does_it_where_documents_share_sequences(name: str):
    """A sequence that several documents have is masked, or drawn into a sample, in each in its own way."""
    rows = [[*documents()[1][:17], *row] for row in documents()]
    assert_equal(put(name, rows[::-1], 7), put(name, rows, 7), 1e-9)


def test_two_runs_have_the_same_bits_and_another_text_has_others():
    assert put("bert", documents(), 1).rows == put_plainly("bert").rows
    other = [row[::-1] for row in documents()]
    assert values(put("bert", other, 7)) != values(put_plainly("bert"))


def test_rows_are_the_same_beside_other_probes():
    view, one = view_of("gpt2"), probe(mi_clusters=7, tp_min_count=3, lens_tokens=211)
    others = ["jump", "similarity", "nonlinearity", tx.probes.Commutativity(sample=97, shuffles=1)]
    alone = {p if isinstance(p, str) else p.name: tx.measure(view, [p], text(), batch_size=7) for p in [one, *others]}
    for order in ([one, *others], [*others[::-1], one]):
        together = tx.measure(view, order, text(), batch_size=7)
        for name, expected in alone.items():
            found = together.where(probe=name)
            if name in ("contribution", "nonlinearity", "commutativity"):
                assert found.rows == expected.rows
            else:  # guests see the batches of their host
                assert [r.metric for r in found] == [r.metric for r in expected]
                np.testing.assert_allclose(_numbers(found), _numbers(expected), rtol=1e-9, atol=1e-12)
    plan = tx.plan(view, [one, *others[:2]], text())
    assert len(plan.passes) == 1  # else nothing was shared


def _numbers(table: Table) -> np.ndarray:
    rows = [(r.value, r.stderr, r.low, r.high) for r in table]
    return np.array([[np.inf if x is None else x for x in row] for row in rows]).clip(max=1e300)


@pytest.mark.parametrize("size", [16, 1024])
def test_a_stop_between_any_two_batches_changes_no_bit(size: int):
    """With mini-batches of 16 the centres start in the middle of the text, with 1,024 at its end."""
    one = probe("bert", mi_clusters=5, tp_min_count=2, mi_positions=233, mask_rate=0.3, mi_fit_positions="all")
    with short_mini_batches(size):
        plan = tx.plan(view_of("bert", torch.float32), [one], text(41), batch_size=5)
        whole, parted = rows_of(plan), rows_of(plan, stop=True)
    assert whole == parted
    assert {row.metric for row in whole if row.value is not None} >= {*VARIANTS, "lens_loss"}


def test_the_lens_alone_reads_the_text_once():
    """It learns nothing, so its losses are those of the first of two rounds."""
    view, data = view_of("gpt2"), words()
    alone, both = (
        tx.plan(view, [probe(lens_tokens=307, **options)], data, batch_size=32)
        for options in ({"estimators": ("lens_loss",)}, {})
    )
    phases = [[stage.phase for stage in plan.passes[0].stages] for plan in (alone, both)]
    assert phases == [["score"], ["fit", "score"]]
    assert (alone.tokens, both.tokens) == (data.num_tokens, 2 * data.num_tokens)
    found = run(alone).rows
    expected = [row for row in run(both) if row.metric == "lens_loss" or row.variant == "lens"]
    assert len(found) == len(expected) == 5 + 4 + 4 + 2 and all(row.n == 307 for row in found)
    assert [replace(row, config=None) for row in found] == [replace(row, config=None) for row in expected]


def test_memory_covers_the_state_and_only_labels_grow_with_the_text():
    """As many documents, three times as long."""
    peaks, planned = [], []
    for length in (40, 120):
        rows = np.random.default_rng(6).integers(FIRST_TEXT_ID, FIRST_TEXT_ID + WORDS, (23, length))
        for positions in (401, 10**6):
            one = probe(mi_positions=positions, mi_clusters=5, mi_seeds=3, lens_tokens=1)
            with short_mini_batches(64):
                plan = tx.plan(view_of("gpt2"), [one], from_tokens(rows, seq_len=20), batch_size=7)
                peaks.append(max(packed_bytes(state.pack()) for state in states_of(plan, plan.passes[0])))
            planned.append(plan.bytes)
            assert 0 < peaks[-1] <= plan.bytes
    labels = 2 * 5 * 3 * 23 * (80 - 4)  # bytes, places, seeds, documents, targets more in each
    waiting = 5 * 2 * 64 * 40 * 8  # places, mini-batches, rows, width, bytes
    assert abs(peaks[2] - peaks[0]) <= waiting
    assert abs(peaks[3] - peaks[1] - labels) <= waiting
    assert planned[2] - planned[0] == 24 * 23 * 80  # which token is in which sample
    assert planned[3] - planned[1] == labels + 24 * 23 * 80


def test_memory_of_many_short_documents_covers_the_state():
    rows = np.random.default_rng(6).integers(FIRST_TEXT_ID, VOCAB, (997, 2))
    one = Contribution(estimators=("token_prediction",), tp_min_count=10**6)
    plan = tx.plan(view_of("gpt2"), [one], from_tokens(rows), batch_size=997)
    *_, state = states_of(plan, plan.passes[0])
    sample = sum(packed_bytes(part) for part in (state.sample.mi_at, state.sample.class_of, state.sample.fits))
    assert packed_bytes(state.pack()) + sample <= plan.bytes


# --- what cannot be measured --------------------------------------------------------------------------------------

WRONG = {
    "estimator": ({"estimators": ("entropy",)}, "estimator 'entropy' is unknown; allowed are mutual_information, tok"),
    "state": ({"mi_state": "unit"}, "mi_state is 'unit'; allowed are normalised, raw"),
    "debias": ({"mi_debias": "on"}, "mi_debias is 'on'; allowed are off, shuffle, miller_madow"),
    "fit": ({"mi_fit_positions": "some"}, "mi_fit_positions is 'some'; allowed are all, masked"),
    "split": ({"tp_split": ("same", "third")}, "tp_split is 'third'; allowed are same, split_half"),
    "start": ({"ratio_start": "h_1"}, "ratio_start is 'h_1'; allowed are embeddings, a_1"),
    "negative": ({"ratio_negative": "drop"}, "ratio_negative is 'drop'; allowed are keep, clip"),
    "positions": ({"mi_positions": 0}, "mi_positions is 0; it is 1 or more"),
    "seeds": ({"mi_seeds": 0}, "mi_seeds is 0; it is 1 or more"),
    "count": ({"tp_min_count": 0}, "tp_min_count is 0; it is 1 or more"),
    "lens": ({"lens_tokens": -1}, "lens_tokens is -1; it is 1 or more"),
    "clusters": ({"mi_clusters": 1}, "mi_clusters is 1; it is 2 or more"),
    "objective": ({"objective": "prefix"}, "objective 'prefix' is unknown; allowed are auto, causal, masked"),
    "rate": ({"mask_rate": 1.0}, "mask_rate is 1.0; it lies between 0 and 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case: str):
    options, words_ = WRONG[case]
    with pytest.raises(InputError, match=words_) as caught:
        Contribution(**options)
    assert str(caught.value).startswith("contribution: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words_"),
    [
        ("bert", {}, "no tokenizer names its mask token; give --set contribution.mask_id=ID"),
        ("bert", {"mask_id": VOCAB}, f"mask_id {VOCAB} is out of range; .* has ids 0 to {VOCAB - 1}"),
        ("gpt2", {"objective": "masked"}, "give --set contribution.mask_id=ID"),
        ("gpt2", {"mi_clusters": 97, "mi_positions": 90}, "97 clusters need as many states, the text has 90 to"),
    ],
)
def test_what_cannot_be_asked(name: str, options: dict, words_: str):
    with pytest.raises(InputError, match=words_) as caught:
        tx.measure(view_of(name), [Contribution(**options)], text())
    assert "\n" not in str(caught.value)


def test_a_model_without_a_head_has_no_lens_but_all_else():
    view = View(tiny_model("gpt2", torch.float64, 0, 2).transformer)
    one = probe(mi_clusters=5)
    table = tx.measure(view, [one], text(), batch_size=32)
    row = only(table, metric="lens_loss")
    assert row.value is None and "no head" in row.reason and not table.where(variant="lens").rows
    with_head = tx.measure(view_of("gpt2"), [one], text(), batch_size=32)
    lens = [row for row in with_head if row.metric == "lens_loss" or row.variant == "lens"]
    assert len(lens) > 10 and len(table) == len(with_head) - len(lens) + 1
    found = {row.metric: values(table.where(metric=row.metric)) for row in table if row.metric in VARIANTS}
    assert found == {metric: values(with_head.where(metric=metric)) for metric in VARIANTS}


def test_a_head_that_reads_more_than_one_state_has_no_lens_but_all_else():
    model = tiny_model("gpt2", torch.float64, 0, 2)
    plain = model.forward

    def mixing(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits + output.logits.roll(1, dims=1)
        return output

    model.forward = mixing
    table = tx.measure(View(model), [probe()], words(), batch_size=32)
    assert "more than the last state" in only(table, metric="lens_loss").reason
    assert value(table, metric="token_prediction", variant="same", site="resid", layer=2) > 0


def test_the_command_line(tmp_path):
    bert, tokens = saved_model(tmp_path / "bert", "bert"), saved_tokens(tmp_path / "tokens.npy", 31)
    start = ("measure", bert, "--tokens", tokens, "--seq-len", 23, "--probe", "contribution")
    for options, words_ in (
        ((), "contribution.mask_id=ID"),
        (("contribution.mask_id=3", "contribution.mi_clusters=9999"), "9999 clusters"),
        (("contribution.mask_id=3", "contribution.estimators=[loss]"), "estimator 'loss' is unknown"),
    ):
        outcome = command(*start, *(part for option in options for part in ("--set", option)))
        assert (outcome.code, outcome.err.count("\n")) == (2, 1) and words_ in outcome.err, outcome
    done = command(*start, "--set", "contribution.mask_id=3", "--output", tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    assert {row.metric for row in Table.read(tmp_path / "run")} >= {"mutual_information", "lens_loss", "share_mha"}


def test_seeds_that_disagree_on_the_gain_leave_no_share():
    alone = Error(0.1, 0.3, 0.7)
    assert share_reason(0.5, alone) is None
    both = with_seeds(alone, np.array([0.1, 0.9]))
    assert both is not None and both.stderr == pytest.approx(np.hypot(0.1, 0.4), rel=1e-12)
    assert "within two errors" in str(share_reason(0.5, both))
    assert with_seeds(alone, np.array([0.5])) is alone
    assert with_seeds(None, np.array([0.1, 0.9])) is None
