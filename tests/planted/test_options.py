"""Every option of the non-linearity probe against a plain recomputation on one layer."""

import functools
from dataclasses import replace as changed

import numpy as np
import pytest
import torch

import transect as tx
from plants import only, planted, seen, text, value, values, view_of
from transect.data import assign
from transect.errors import InputError
from transect.probes.nonlinearity import Nonlinearity

ALONE = {"elements": ("ffn",), "cosine": ("ffn",), "ridge": 0.0}
NAME, LAYER = "gpt2", 1


@functools.cache
def sites() -> list[dict[str, np.ndarray]]:
    return seen(view_of(NAME), text(), LAYER)


def measured(**options) -> tx.Table:
    return tx.measure(view_of(NAME), [Nonlinearity(**ALONE | options)], text()).where(layer=LAYER)


def pieces(site: str, part: str, method: str = "hash") -> list[np.ndarray]:
    score = assign(text(), tune_fraction=0.0, method=method).part == 2
    return [found[site] for found, scored in zip(sites(), score, strict=True) if scored == (part == "score")]


def parts(method: str = "hash") -> list[np.ndarray]:
    return [np.concatenate(pieces(site, part, method)) for part in ("fit", "score") for site in ("ffn_in", "ffn_out")]


def linear(x: np.ndarray, y: np.ndarray, ridge: float = 0.0):
    """y* = W x + b with ridge x the mean eigenvalue, directions without variance left out."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    values, vectors = np.linalg.eigh((x - mean_x).T @ (x - mean_x))
    kept = values > 1e-10 * values.max()
    inverse = 1 / (values[kept] + ridge * np.clip(values, 0, None).mean())
    w = vectors[:, kept] * inverse @ vectors[:, kept].T @ (x - mean_x).T @ (y - mean_y)
    return lambda new: (new - mean_x) @ w + mean_y


def r2(y: np.ndarray, predicted: np.ndarray, mean: np.ndarray | None = None) -> float:
    mean = y.mean(0) if mean is None else mean
    return 1 - np.square(y - predicted).sum() / np.square(y - mean).sum()


def cosines(y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return (y * predicted).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(predicted, axis=1)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_ridge_given(ridge: float):
    x, y, score_x, score_y = parts()
    table = measured(ridge=ridge)
    assert value(table, metric="r2_heldout") == pytest.approx(r2(score_y, linear(x, y, ridge)(score_x)), abs=1e-9)
    row = only(table, metric="ridge")
    assert (row.value, row.split, row.n) == (ridge, "given", len(x))


def test_tuned_ridge_sees_only_the_tune_documents():
    part = assign(text()).part
    x, y, tune_x, tune_y, score_x, score_y = (
        np.concatenate([found[site] for found, p in zip(sites(), part, strict=True) if p == wanted])
        for wanted in range(3)
        for site in ("ffn_in", "ffn_out")
    )
    grid = (0.0, 1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    scores = [r2(tune_y, linear(x, y, ridge)(tune_x)) for ridge in grid]
    chosen = max(ridge for ridge, score in zip(grid, scores, strict=True) if score >= max(scores) - 1e-4)
    table = measured(ridge=None)
    assert value(table, metric="ridge") == chosen
    assert value(table, metric="r2_heldout") == pytest.approx(r2(score_y, linear(x, y, chosen)(score_x)), abs=1e-9)
    assert only(table, metric="ridge").n == len(x)


def test_ordered_split_scores_the_last_quarter():
    sequences = text().num_sequences
    part = assign(text(), tune_fraction=0.0, method="ordered").part
    assert (part[-round(sequences / 4) :] == 2).all() and (part[: -round(sequences / 4)] == 0).all()
    x, y, score_x, score_y = parts("ordered")
    row = only(measured(split="ordered"), metric="r2_heldout")
    assert row.value == pytest.approx(r2(score_y, linear(x, y)(score_x)), abs=1e-9)
    assert (row.split, row.n) == ("heldout/ordered", len(score_y))


def test_fit_mean_baseline():
    x, y, score_x, score_y = parts()
    table = measured(r2_baseline="fit_mean")
    row = only(table, metric="r2_heldout")
    assert row.value == pytest.approx(r2(score_y, linear(x, y)(score_x), y.mean(0)), abs=1e-9)
    assert row.variant == "fit_mean"
    assert row.value > value(measured(), metric="r2_heldout")


def test_average_over_tokens():
    x, y, score_x, score_y = parts()
    weights = 1 / np.square(y).sum(1)
    root = np.sqrt(weights)[:, None]
    mean_x, mean_y = np.average(x, 0, weights), np.average(y, 0, weights)
    w = np.linalg.lstsq(root * (x - mean_x), root * (y - mean_y), rcond=1e-5)[0]
    gamma = cosines(score_y, (score_x - mean_x) @ w + mean_y)
    by_token, by_example = (
        value(measured(average=how), metric="cosine_closed_form") for how in ("token", "token_then_example")
    )
    assert by_token == pytest.approx(gamma.mean(), abs=1e-9)
    ends = np.cumsum([len(piece) for piece in pieces("ffn_in", "score")])[:-1]
    assert by_example == pytest.approx(np.mean([piece.mean() for piece in np.split(gamma, ends)]), abs=1e-9)
    assert by_token != pytest.approx(by_example, abs=1e-6)


def test_cosine_of_the_unweighted_fit():
    x, y, score_x, score_y = parts()
    table = measured(cosine_weights="none", average="token")
    assert value(table, metric="cosine_closed_form") == pytest.approx(
        cosines(score_y, linear(x, y)(score_x)).mean(), abs=1e-9
    )
    assert value(table, metric="r2_heldout") == value(measured(), metric="r2_heldout")


@pytest.mark.parametrize("element", ["ffn", "ffn_up"])
def test_cone_of_layer_outputs(element: str):
    table = measured(elements=(element,), cosine=(element,), cone_vectors="layer_outputs")
    rows = np.concatenate(pieces("resid_next", "score"))
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = directions @ directions.T
    expected = (pairs.sum() - len(pairs)) / (pairs.size - len(pairs))
    row = only(table, metric="cone_size")
    assert (row.value, row.variant) == (pytest.approx(expected, abs=1e-9), "layer_outputs")
    assert value(measured(elements=(element,), cosine=(element,)), metric="cone_size") != pytest.approx(
        expected, abs=1e-3
    )


def test_two_names_of_one_function_have_the_same_numbers():
    """In a pre-norm layer the residual is the whole sub-layer: asking for both must not count tokens twice."""
    both = ("attn_residual", "attn_sublayer")
    for trained in (None, "cosine_adam"):
        table = measured(elements=both, cosine=both, trained=trained)
        alone = measured(elements=both[:1], cosine=both[:1], trained=trained)
        rows = [[changed(row, element=None, config=None) for row in table.where(element=name)] for name in both]
        assert rows[0] == rows[1] == [changed(row, element=None, config=None) for row in alone]


def test_projection():
    first, second = (measured(project=7) for _ in range(2))
    assert values(first) == values(second)
    row = only(first, metric="r2_heldout")
    assert row.variant == "projected/7"
    assert value(first, metric="rank") == 7
    assert value(first, metric="r2_floor") == pytest.approx(7 / (text().num_tokens - 1), abs=1e-12)
    assert value(measured(), metric="r2_heldout") > row.value
    wide = measured(project=1009)
    assert value(wide, metric="r2_heldout") == value(measured(), metric="r2_heldout")
    assert value(measured(elements=("attn_proj",), cosine=(), project=39), metric="r2_heldout") < 1


def specials() -> tx.data.Dataset:
    """The text with a token at both ends of each sequence marked as special."""
    data = text()
    marked = np.zeros(data.num_tokens, dtype=bool)
    marked[data.starts] = marked[data.starts + data.lengths - 1] = True
    return changed(data, special=marked)


def test_special_tokens_are_left_out():
    data, view = specials(), view_of(NAME)
    kept, dropped = (
        tx.measure(view, [Nonlinearity(**ALONE, special_tokens=on)], data).where(layer=LAYER) for on in (True, False)
    )
    score = assign(data, tune_fraction=0.0).part == 2
    inner = [{site: rows[1:-1] for site, rows in found.items()} for found in sites()]
    x, y, score_x, score_y = (
        np.concatenate([found[site] for found, scored in zip(inner, score, strict=True) if scored == wanted])
        for wanted in (False, True)
        for site in ("ffn_in", "ffn_out")
    )
    row = only(dropped, metric="r2_heldout")
    assert (row.value, row.n) == (pytest.approx(r2(score_y, linear(x, y)(score_x)), abs=1e-9), len(score_y))
    assert only(kept, metric="r2_heldout").n == len(parts()[2])


@functools.cache
def padded() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two sites of every position of every sequence padded to full width, and which are real tokens; float32."""
    data, view = text(), view_of(NAME, torch.float32)
    place = np.arange(data.seq_len)
    mask = place < data.lengths[:, None]
    ids = np.where(mask, data.ids[np.where(mask, data.starts[:, None] + place, 0)], view.model.config.pad_token_id)
    with torch.no_grad(), view.capture(["ffn_in", "ffn_out"], [LAYER]) as capture:
        view.run(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask))
    return {site: capture[site, LAYER].double().numpy() for site in ("ffn_in", "ffn_out")}, mask


@pytest.mark.parametrize(
    ("tokens", "fit_tokens"),
    [("all", None), ("padding", None), ("actual", "all"), ("padding", "actual"), ("all", "actual")],
)
def test_which_tokens(tokens: str, fit_tokens: str | None):
    captured, mask = padded()
    score = assign(text(), tune_fraction=0.0).part == 2
    chosen = {"actual": mask, "padding": ~mask, "all": np.ones_like(mask)}
    fit_mask, score_mask = chosen[fit_tokens or tokens], chosen[tokens]
    x, y = (captured[site][~score][fit_mask[~score]] for site in ("ffn_in", "ffn_out"))
    score_x, score_y = (captured[site][score][score_mask[score]] for site in ("ffn_in", "ffn_out"))
    probe = Nonlinearity(**ALONE, tokens=tokens, fit_tokens=fit_tokens)
    table = tx.measure(view_of(NAME, torch.float32), [probe], text(), batch_size=7).where(layer=LAYER)
    row = only(table, metric="r2_heldout")
    assert row.n == score_mask[score].sum() == len(score_y)
    assert only(table, metric="rank").n == len(x)
    if row.value is not None:
        assert row.value == pytest.approx(r2(score_y, linear(x, y)(score_x)), rel=2e-3, abs=2e-4)
    else:
        assert "cannot determine" in row.reason


@pytest.mark.parametrize("ridge", [0.0, None])
def test_no_fit_token_is_empty_with_the_reason(ridge: float | None):
    data = tx.data.from_tokens(torch.randint(5, 97, (29, 11), generator=torch.Generator().manual_seed(0)))
    probe = Nonlinearity(**ALONE | {"ridge": ridge}, fit_tokens="padding")
    row = only(tx.measure(view_of(NAME), [probe], data), metric="r2_heldout", layer=0)
    assert (row.value, row.reason) == (None, "no fit tokens")


def test_padding_in_tune_documents_only():
    data = text(61, 11, 12, seq_len=11)
    tune = np.flatnonzero(assign(data).part == 1)[0]
    lengths = data.lengths.copy()
    lengths[tune] = 7
    probe = Nonlinearity(**ALONE | {"ridge": None}, fit_tokens="padding")
    row = only(tx.measure(view_of(NAME), [probe], changed(data, lengths=lengths)), metric="r2_heldout", layer=0)
    assert row.value is None and row.reason


def test_no_score_token_is_empty_with_the_reason():
    data = tx.data.from_tokens(torch.randint(5, 97, (29, 11), generator=torch.Generator().manual_seed(0)))
    probe = Nonlinearity(**ALONE, tokens="padding", fit_tokens="actual")
    row = only(tx.measure(view_of(NAME), [probe], data), metric="r2_heldout", layer=0)
    assert (row.value, row.reason) == (None, "no score tokens")


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": "some"},
        {"split": "random"},
        {"average": "document"},
        {"r2_baseline": "zero"},
        {"cone_vectors": "inputs"},
        {"trained": "sgd"},
        {"init": "zeros"},
        {"ridge": -1.0},
        {"elements": ("ffn", "mlp")},
        {"cosine": ("layer",), "elements": ("ffn",)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_unknown_options_are_refused(options: dict):
    with pytest.raises(InputError, match="nonlinearity: "):
        Nonlinearity(**options)


def test_few_documents_are_split_by_sequence():
    data = text(19, 31, 47)
    row = only(tx.measure(view_of(NAME), [FFN_ONLY], data), metric="r2_heldout", layer=0)
    assert row.split == "heldout/sequence"
    assert row.documents == int((assign(data, tune_fraction=0.0).part == 2).sum())


FFN_ONLY = Nonlinearity(elements=("ffn",), cosine=(), ridge=0.0)


def test_layers_in_several_passes_have_the_same_rows():
    view, data = view_of(NAME, layers=3), text()
    probes = ["jump", Nonlinearity(ridge=0.0)]
    whole = tx.plan(view, probes, data)
    parted = tx.plan(view, probes, data, free=int(whole.bytes / 1.5))
    assert (len(whole.passes), len(parted.passes) > 1) == (1, True)
    order = sorted(tx.run(parted).rows, key=repr)
    assert order == sorted(tx.run(whole).rows, key=repr)


def test_planted_element_is_what_is_measured():
    view = view_of(NAME)
    with planted(view, {("attn", 0): lambda x: 3 * x + 1}):
        table = tx.measure(view, [Nonlinearity(elements=("attn", "attn_heads"), cosine=("attn",), ridge=0.0)], text())
    assert value(table, metric="r2_heldout", layer=0, element="attn") == pytest.approx(1, abs=1e-9)
    assert value(table, metric="cosine_closed_form", layer=0) == pytest.approx(1, abs=1e-9)
    assert value(table, metric="r2_heldout", layer=0, element="attn_heads") < 0.9
