"""Every number of the contribution probe, recomputed from states captured one sequence at a time."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn

import transect as tx
from families import VOCAB
from plants import only, seen, value, view_of
from plants import text as random_text
from transect.data import Dataset, sample_tokens
from transect.data.hashing import keyed
from transect.data.objective import NONE, Objective, with_targets
from transect.metrics import kmeans
from transect.metrics.information import permuted
from transect.probes import _information
from transect.probes.contribution import Contribution
from transect.results import Row, Table
from transect.view.sites import NEXT
from transect.view.view import View

FAMILIES = ("gpt2", "llama", "bert")
MASK = 3
BATCH = 64  # rows of a mini-batch here, so that a short text is several
CLUSTERS, POSITIONS, SEEDS, MIN_COUNT, LENS = 13, 401, 2, 5, 211
DRAWS = 1000
PLACES = (("resid", 0), ("resid_mid", 0), ("resid", 1), ("resid_mid", 1), ("resid", 2))
STEPS = (("attn", 0), ("ffn", 0), ("attn", 1), ("ffn", 1))


def text() -> Dataset:
    return random_text(61, 5, 17)


@contextmanager
def short_mini_batches() -> Iterator[None]:
    with ExitStack() as stack:
        for module in (kmeans, _information):
            stack.enter_context(mock.patch.object(module, "BATCH", BATCH))
        yield


def probe(name: str, **options) -> Contribution:
    chosen = {"mi_clusters": CLUSTERS, "mi_positions": POSITIONS, "mi_seeds": SEEDS, "lens_tokens": LENS}
    if name == "bert":
        chosen |= {"mask_id": MASK, "mi_positions": 101, "mask_rate": 0.4, "lens_tokens": 97}
    return Contribution(**chosen | {"tp_min_count": MIN_COUNT} | options)


@functools.cache
def measured(name: str, seed: int = 0, **options) -> Table:
    with short_mini_batches():
        return tx.measure(view_of(name), [probe(name, **options)], text(), batch_size=1, seed=seed)


@functools.cache
def shown(name: str, seed: int = 0) -> Dataset:
    """The text as the model reads it, with its targets."""
    asked = Objective(kind="masked", mask_id=MASK, rate=0.4) if name == "bert" else Objective(kind="causal")
    return with_targets(text(), asked, VOCAB, seed)


@functools.cache
def states(name: str, seed: int = 0) -> list[np.ndarray]:
    """The states of all tokens [tokens, width] at each place."""
    layers = [seen(view_of(name), shown(name, seed), layer) for layer in range(2)]

    def joined(layer: int, site: str) -> np.ndarray:
        return np.concatenate([found[site] for found in layers[layer]])

    return [joined(0, "resid"), *(joined(layer, site) for layer in range(2) for site in ("resid_mid", NEXT))]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def documents_of(data: Dataset) -> np.ndarray:
    """The document of each token."""
    return np.repeat(data.document, data.lengths)


# --- mutual information -------------------------------------------------------------------------------------------


@functools.cache
def labels_of(name: str, place: int, number: int, fit: str, raw: bool, seed: int) -> np.ndarray:
    return labels(name, place, number, *samples(name, fit, seed), raw, seed)


def samples(name: str, fit: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose labels count, and tokens that centres are fitted on."""
    data, positions = shown(name, seed), 101 if name == "bert" else POSITIONS
    sample = sample_tokens(data, positions, seed, among=data.target != NONE)
    return sample, sample_tokens(data, positions, seed + 1) if name == "bert" and fit == "all" else sample


def labels(name: str, place: int, number: int, sample: np.ndarray, fitted: np.ndarray, raw: bool, seed: int = 0):
    """Clusters of the sample's states: centres learned in the canonical order of the sequences."""
    data, rows = shown(name, seed), states(name, seed)[place]
    if not raw:  # lengths by torch: Llama's first states repeat, and the last bit decides between equally good centres
        rows = rows / torch.from_numpy(rows).norm(dim=1, keepdim=True).numpy()
    order = np.argsort(keyed(text().sequence_hash, seed))
    tokens = np.concatenate([np.arange(data.starts[s], data.starts[s] + data.lengths[s]) for s in order])
    used = torch.from_numpy(rows[tokens[np.isin(tokens, fitted)]])
    with short_mini_batches():
        model = kmeans.MiniBatchKMeans(CLUSTERS, seed + number)
        for start in range(0, len(used), BATCH):
            model.partial_fit(used[start : start + BATCH])
        centres = model.finish().numpy()
    distances = np.square(rows[sample][:, None] - centres[None]).sum(2)
    return distances.argmin(1)


def plug_in(left: np.ndarray, right: np.ndarray) -> float:
    joint = np.zeros((left.max() + 1, right.max() + 1))
    np.add.at(joint, (left, right), 1 / len(left))
    at = joint > 0
    return float((joint[at] * np.log((joint / joint.sum(1)[:, None].clip(1e-30) / joint.sum(0).clip(1e-30))[at])).sum())


@functools.cache
def information(name: str, debias: str = "off", raw: bool = False, fit: str = "all", seed: int = 0) -> SimpleNamespace:
    """MI [seeds, places], and with each of the ten hash groups of documents left out [seeds, groups, places]."""
    data = shown(name, seed)
    sample, _ = samples(name, fit, seed)
    targets, group = data.target[sample], (data.document_hash % np.uint64(10))[documents_of(data)[sample]]
    mixed = permuted(targets, seed)

    def one(found: np.ndarray, kept: np.ndarray) -> float:
        plain = plug_in(found[kept], targets[kept])
        if debias == "shuffle":
            return plain - plug_in(found[kept], mixed[kept])
        if debias == "miller_madow":
            pairs = set(zip(found[kept].tolist(), targets[kept].tolist(), strict=True))
            cells = len(pairs) - len({x for x, _ in pairs}) - len({y for _, y in pairs}) + 1
            return plain - cells / (2 * kept.sum())
        return plain

    whole, without = np.empty((SEEDS, 5)), np.empty((SEEDS, 10, 5))
    for number in range(SEEDS):
        for place in range(5):
            found = labels_of(name, place, number, fit, raw, seed)
            assert plug_in(found, targets) == pytest.approx(mutual_info_score(found, targets), abs=1e-12)
            whole[number, place] = one(found, np.ones(len(sample), bool))
            without[number, :, place] = [one(found, group != left) for left in range(10)]
    assert set(group.tolist()) == set(range(10))
    return SimpleNamespace(whole=whole, without=without, n=len(sample), documents=len(set(documents_of(data)[sample])))


def jackknifed(values: np.ndarray) -> float:
    return float(np.sqrt(9 / 10 * np.square(values - values.mean()).sum()))


def derived(levels: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from levels [..., 5]: increments, cumulative sums at the end of each layer, shares."""
    steps = levels[..., 1:] - levels[..., :-1]
    total = levels[..., 4] - levels[..., 0]
    attn, ffn = steps[..., 0] + steps[..., 2], steps[..., 1] + steps[..., 3]
    found = {f"level {place}": levels[..., place] for place in range(5)}
    found |= {f"step {step}": steps[..., step] for step in range(4)}
    found |= {"attn 0": steps[..., 0], "attn 1": attn, "ffn 0": steps[..., 1], "ffn 1": ffn}
    some = np.where(total == 0, np.nan, total)
    return found | {"total": total, "share_mha": attn / some, "share_ffn": ffn / some}


def rows_by_name(table: Table, metric: str, variant: str, share: str) -> dict[str, Row]:
    found = {}
    for place, (site, layer) in enumerate(PLACES):
        found[f"level {place}"] = only(table, metric=metric, variant=variant, site=site, layer=layer)
    for step, (element, layer) in enumerate(STEPS):
        asked = {"metric": metric, "element": element, "layer": layer}
        found[f"step {step}"] = only(table, variant=f"{variant}/increment", **asked)
        found[f"{element} {layer}"] = only(table, variant=f"{variant}/cumulative", **asked)
    return found | {name: only(table, metric=name, variant=share) for name in ("share_mha", "share_ffn")}


def assert_shares_follow(found: dict[str, Row], gain: float, error: float) -> None:
    """Shares are there exactly when the gain is above two errors."""
    for name in ("share_mha", "share_ffn"):
        if gain > 2 * error:
            assert found[name].value is not None
        else:
            words = "is within two errors" if abs(gain) <= 2 * error else "says less than the first"
            assert found[name].value is None and words in found[name].reason


@pytest.mark.parametrize(
    ("name", "options", "by_hand"),
    [
        ("gpt2", {}, {}),
        ("gpt2", {"mi_state": "raw"}, {"raw": True}),
        ("gpt2", {"mi_debias": "shuffle"}, {"debias": "shuffle"}),
        ("gpt2", {"mi_debias": "miller_madow"}, {"debias": "miller_madow"}),
        ("llama", {}, {}),
        ("bert", {}, {}),
        ("bert", {"mi_debias": "shuffle"}, {"debias": "shuffle"}),
        ("bert", {"mi_fit_positions": "masked"}, {"fit": "masked"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_information_by_scikit_learn_and_errors_by_leaving_out_tenths(name: str, options: dict, by_hand: dict):
    table = measured(name, **(options and options | {"estimators": ("mutual_information",)}))
    expected = information(name, **by_hand)
    found = rows_by_name(table, "mutual_information", options.get("mi_state", "normalised"), "MI")
    values = derived(expected.whole.mean(0))
    left_out = derived(expected.without.mean(0))
    errors = {key: jackknifed(column) for key, column in left_out.items()}
    assert_shares_follow(found, values["total"], errors["total"])
    for key, row in found.items():
        assert (row.n, row.documents) == (expected.n, expected.documents)
        if row.value is None:
            continue
        assert row.value == pytest.approx(values[key], abs=1e-9), key
        assert row.stderr == pytest.approx(errors[key], abs=1e-9), key
        assert row.low == pytest.approx(values[key] - 1.96 * errors[key], abs=1e-9), key
        assert row.high == pytest.approx(values[key] + 1.96 * errors[key], abs=1e-9), key


@pytest.mark.parametrize("name", ["bert"])
def test_another_seed_is_another_sample_and_other_centres(name: str):
    expected = information(name, seed=5).whole.mean(0)
    table = measured(name, seed=5, estimators=("mutual_information",))
    for (site, layer), level in zip(PLACES, expected, strict=True):
        found = value(table, metric="mutual_information", variant="normalised", site=site, layer=layer)
        assert found == pytest.approx(level, abs=1e-9)
    assert not np.allclose(expected, information(name).whole.mean(0), atol=1e-3)


# --- token prediction ---------------------------------------------------------------------------------------------


@functools.cache
def predicted(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Hits [documents, places] and tokens that count [documents], by one cosine after the other."""
    data = shown(name)
    kept = [t for t in range(VOCAB) if (data.target == t).sum() >= MIN_COUNT]
    assert 0 < len(kept) < len(set(data.target.tolist()) - {NONE})
    tokens = np.flatnonzero(np.isin(data.target, kept))
    document = documents_of(data)[tokens]
    half = (data.document_hash[document] >> np.uint64(17)) & np.uint64(1)
    target = data.target[tokens]
    hit, count = np.zeros((data.num_documents, 5)), np.zeros(data.num_documents)
    for place, rows in enumerate(states(name)):
        rows = unit(rows[tokens])
        for own in (0, 1):
            among = np.ones(len(tokens), bool) if split == "same" else half != own
            classes = [t for t in kept if (among & (target == t)).any()]
            means = unit(np.stack([rows[among & (target == t)].sum(0) for t in classes]))
            for at in np.flatnonzero((half == own) & np.isin(target, classes)):
                hit[document[at], place] += classes[int((means @ rows[at]).argmax())] == target[at]
                count[document[at]] += place == 0
    return hit, count


def bootstrapped(sums: np.ndarray, counts: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Levels [draws, places] of documents drawn with replacement, in the order of their hashes."""
    came = counts > 0
    sums, counts, hashes = sums[came], counts[came], hashes[came]
    order = np.argsort(hashes)
    generator = np.random.Generator(np.random.PCG64(0))
    times = np.concatenate([generator.multinomial(len(order), [1 / len(order)] * len(order), 100) for _ in range(10)])
    return np.stack([(t @ sums[order]) / (t @ counts[order]) for t in times])


def assert_rows(found: dict[str, Row], hashes: np.ndarray, sums: np.ndarray, counts: np.ndarray, sign: int) -> None:
    """Values, errors and shares of levels that are sums over counts."""
    values = derived(sums.sum(0) / counts.sum())
    draws = derived(bootstrapped(sums, counts, hashes))
    assert_shares_follow(found, sign * values["total"], draws["total"].std(ddof=1))
    for key, row in found.items():
        assert (row.n, row.documents) == (counts.sum(), (counts > 0).sum())
        if row.value is None:
            continue
        assert row.value == pytest.approx(values[key], abs=1e-9), key
        if np.isfinite(draws[key]).all():
            assert row.stderr == pytest.approx(draws[key].std(ddof=1), abs=1e-9), key
            ends = np.quantile(draws[key], [0.025, 0.975])
            assert (row.low, row.high) == pytest.approx(tuple(ends), abs=1e-9), key
        else:
            assert row.stderr is None


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("split", ["same", "split_half"])
def test_token_prediction_one_cosine_after_the_other(name: str, split: str):
    hit, count = predicted(name, split)
    found = rows_by_name(measured(name), "token_prediction", split, f"TP/{split}")
    assert_rows(found, shown(name).document_hash, hit, count, 1)


def test_an_estimator_alone_has_the_rows_it_has_among_others():
    for name, variants in (("token_prediction", {"same", "TP/same"}), ("lens_loss", {"causal", "lens"})):
        alone = measured("gpt2", estimators=(name,), tp_split=("same",))
        assert {row.metric for row in alone} == {name, "share_mha", "share_ffn"}
        assert {row.variant.removesuffix("/increment").removesuffix("/cumulative") for row in alone} == variants
        expected = [row for row in measured("gpt2") if row.variant.split("/i")[0].split("/c")[0] in variants]
        bare = [(r.metric, r.site, r.layer, r.element, r.variant, r.value, r.stderr, r.low, r.high) for r in expected]
        assert bare == [
            (r.metric, r.site, r.layer, r.element, r.variant, r.value, r.stderr, r.low, r.high) for r in alone
        ]


# --- lens ---------------------------------------------------------------------------------------------------------


def by_norm_and_head(view: View, rows: torch.Tensor) -> torch.Tensor:
    model: nn.Module = view.model
    if view.model.config.model_type == "gpt2":
        return model.lm_head(model.transformer.ln_f(rows))
    return model.lm_head(model.model.norm(rows)) if view.model.config.model_type == "llama" else model.cls(rows)


@functools.cache
def losses(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses [documents, places] and tokens [documents] of the lens sample."""
    data, view = shown(name), view_of(name)
    sample = sample_tokens(data, 97 if name == "bert" else LENS, 0, among=data.target != NONE)
    document, target = documents_of(data)[sample], torch.from_numpy(data.target[sample].astype(np.int64))
    summed = np.zeros((data.num_documents, 5))
    for place, rows in enumerate(states(name)):
        with torch.no_grad():
            logits = by_norm_and_head(view, torch.from_numpy(rows[sample]))
        own = nn.functional.cross_entropy(logits, target, reduction="none").numpy()
        np.add.at(summed[:, place], document, own)
    return summed, np.bincount(document, minlength=data.num_documents)


@pytest.mark.parametrize("name", FAMILIES)
def test_lens_by_the_models_norm_and_head(name: str):
    summed, count = losses(name)
    found = rows_by_name(measured(name), "lens_loss", "masked" if name == "bert" else "causal", "lens")
    assert_rows(found, shown(name).document_hash, summed, count, -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_lens_of_the_last_state_is_the_models_own_loss(name: str):
    data, view = shown(name), view_of(name)
    sample = set(sample_tokens(data, 97 if name == "bert" else LENS, 0, among=data.target != NONE).tolist())
    found = []
    for start, length in zip(data.starts, data.lengths, strict=True):
        ids = torch.from_numpy(data.ids[start : start + length].astype(np.int64))[None]
        logprobs = view.logits(ids)[0].log_softmax(-1)
        found += [-float(logprobs[t - start, data.target[t]]) for t in range(start, start + length) if t in sample]
    last = value(measured(name), metric="lens_loss", site="resid", layer=2)
    assert last == pytest.approx(float(np.mean(found)), abs=1e-9)


def test_lens_of_a_model_in_half_precision_has_the_digits_of_float32():
    view, options = view_of("gpt2", torch.bfloat16), {"estimators": ("lens_loss",)}
    table = tx.measure(view, [Contribution(**options)], text(), batch_size=1)
    data = shown("gpt2")
    total = 0.0
    for start, length in zip(data.starts, data.lengths, strict=True):
        ids = torch.from_numpy(data.ids[start : start + length].astype(np.int64))[None]
        with torch.no_grad():
            logprobs = view.run(ids, head=True)[0].double().log_softmax(-1)
        total -= sum(float(logprobs[t, data.target[start + t]]) for t in range(length - 1))
    expected = total / int((data.target != NONE).sum())
    # bfloat16 losses would be off by 1e-3 of themselves each, and their mean by 1e-4
    assert value(table, metric="lens_loss", site="resid", layer=2) == pytest.approx(expected, rel=2e-6)
