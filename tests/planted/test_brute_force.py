"""Every number of every probe, recomputed with NumPy from sites captured one sequence at a time."""

import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import transect as tx
from plants import only, seen, text, value, view_of
from transect.data import assign
from transect.results import Table
from transect.view.view import View

FAMILIES = ("gpt2", "bert", "gptj", "gemma2")
TOLERANCE = 1e-9
ROUGH = {"gptj": 1e-7, "gemma2": 1e-8}  # attention, norms in float32: one sequence differs from a batch, CPUs differ
LAYERS = 2
ELEMENTS = {
    "ffn": ("ffn_in", "ffn_out"),
    "ffn_up": ("ffn_in", "ffn_hidden"),
    "attn_heads": ("attn_in", "heads_out"),
    "attn": ("attn_in", "attn_out"),
    "attn_proj": ("heads_out", "attn_out"),
    "attn_residual": ("resid", "resid+attn_out"),
    "attn_sublayer": ("resid", "resid_mid"),
    "ffn_residual": ("mid", "mid+ffn_out"),
    "ffn_sublayer": ("resid_mid", "resid_next"),
    "layer": ("resid", "resid_next"),
    "attn_norm": ("resid", "attn_in"),
    "ffn_norm": ("mid", "ffn_in"),
}
ABSENT = {
    "bert": {"attn_norm": "no norm stands before", "ffn_norm": "no norm stands before"},
    "gptj": dict.fromkeys(("attn_sublayer", "ffn_sublayer"), "a parallel layer has no stream between"),
    "mixtral": dict.fromkeys(("ffn_up", "activation"), "sparse FFN"),
}


@functools.cache
def measured(name: str) -> Table:
    return tx.measure(view_of(name), ["jump", "similarity", tx.probes.Nonlinearity(ridge=0.0)], text(), batch_size=7)


@functools.cache
def sites(name: str, layer: int) -> list[dict[str, np.ndarray]]:
    return seen(view_of(name), text(), layer)


def rows_of(name: str, layer: int, site: str, part: str | None = None) -> np.ndarray:
    """A site's rows [tokens, width]; `part` is fit or score."""
    total: np.ndarray | None = None
    for term in site.split("+"):
        term = term.replace("mid", "resid") if name == "gptj" and term == "mid" else term
        term = "resid_mid" if term == "mid" else term
        pieces = [found[term] for found in sites(name, layer)]
        if part is not None:
            score = assign(text(), tune_fraction=0.0).part == 2
            pieces = [p for p, scored in zip(pieces, score, strict=True) if scored == (part == "score")]
        rows = np.concatenate(pieces)
        total = rows if total is None else total + rows
    assert total is not None
    return total


def least_squares(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None):
    """The (weighted) least-squares map with intercept, directions without variance left out; and its rank."""
    weights = np.ones(len(x)) if weights is None else weights
    mean_x, mean_y = np.average(x, 0, weights), np.average(y, 0, weights)
    root = np.sqrt(weights)[:, None]
    w, _, rank, singular = np.linalg.lstsq(root * (x - mean_x), root * (y - mean_y), rcond=1e-5)
    return lambda new: (new - mean_x) @ w + mean_y, int(rank), singular[:rank] ** 2


def r2(y: np.ndarray, predicted: np.ndarray) -> float:
    return 1 - np.square(y - predicted).sum() / np.square(y - y.mean(0)).sum()


def cosines(y: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    return (y * predicted).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(predicted, axis=1)


def by_sequence(numbers: np.ndarray) -> float:
    """The average over the tokens of each score sequence, then over sequences."""
    lengths = text().lengths[assign(text(), tune_fraction=0.0).part == 2]
    return float(np.mean([piece.mean() for piece in np.split(numbers, np.cumsum(lengths)[:-1])]))


CASES = [(f, layer, e) for f in FAMILIES for layer in range(LAYERS) for e in ELEMENTS if e not in ABSENT.get(f, {})]


@pytest.mark.parametrize(("name", "layer", "element"), CASES)
def test_r2(name: str, layer: int, element: str):
    at = {"layer": layer, "element": element}
    source, target = ELEMENTS[element]
    x, y, score_x, score_y = (rows_of(name, layer, s, part) for part in ("fit", "score") for s in (source, target))
    predict, rank, spectrum = least_squares(x, y)
    table = measured(name).where(probe="nonlinearity", **at)
    heldout = only(table, metric="r2_heldout")
    assert heldout.value == pytest.approx(r2(score_y, predict(score_x)), abs=ROUGH.get(name, TOLERANCE))
    assert (heldout.n, heldout.split) == (len(score_y), "heldout/document")
    share = spectrum / spectrum.sum()
    assert value(table, metric="rank") == rank
    assert value(table, metric="effective_rank") == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-7)
    assert value(table, metric="participation_ratio") == pytest.approx(1 / np.square(share).sum(), abs=1e-7)

    x, y = (rows_of(name, layer, s) for s in (source, target))
    predict, rank, _ = least_squares(x, y)
    assert value(table, metric="r2_insample") == pytest.approx(r2(y, predict(x)), abs=ROUGH.get(name, TOLERANCE))
    assert only(table, metric="r2_insample").n == text().num_tokens == len(y)
    assert value(table, metric="r2_floor") == pytest.approx(rank / (len(y) - 1), abs=1e-12)
    assert value(table, metric="ridge") == 0


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", FAMILIES)
def test_activation_is_one_line_per_unit(name: str, layer: int):
    table = measured(name).where(element="activation", layer=layer)
    x, y, score_x, score_y = (
        rows_of(name, layer, s, part) for part in ("fit", "score") for s in ("ffn_pre", "ffn_act")
    )
    lines = [np.polyfit(a, b, 1) for a, b in zip(x.T, y.T, strict=True)]
    predicted = np.stack([np.polyval(line, a) for line, a in zip(lines, score_x.T, strict=True)], axis=1)
    assert value(table, metric="r2_heldout") == pytest.approx(r2(score_y, predicted), abs=ROUGH.get(name, TOLERANCE))
    x, y = (rows_of(name, layer, s) for s in ("ffn_pre", "ffn_act"))
    predicted = np.stack([np.polyval(np.polyfit(a, b, 1), a) for a, b in zip(x.T, y.T, strict=True)], axis=1)
    assert value(table, metric="r2_insample") == pytest.approx(r2(y, predicted), abs=ROUGH.get(name, TOLERANCE))
    assert value(table, metric="r2_floor") == pytest.approx(1 / (len(y) - 1), abs=1e-12)


@pytest.mark.parametrize("element", ["ffn", "attn"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", FAMILIES)
def test_cosines(name: str, layer: int, element: str):
    table = measured(name).where(element=element, layer=layer)
    x, y, score_x, score_y = (rows_of(name, layer, s, part) for part in ("fit", "score") for s in ELEMENTS[element])
    predict, _, _ = least_squares(x, y, 1 / np.square(y).sum(1))
    gamma = by_sequence(cosines(score_y, predict(score_x)))
    assert value(table, metric="cosine_closed_form") == pytest.approx(gamma, abs=ROUGH.get(name, TOLERANCE))
    directions = score_y / np.linalg.norm(score_y, axis=1, keepdims=True)
    pairs = directions @ directions.T
    cone = (pairs.sum() - np.trace(pairs)) / (pairs.size - len(pairs))
    assert value(table, metric="cone_size") == pytest.approx(cone, abs=ROUGH.get(name, TOLERANCE))
    for how, expected in (("A", (gamma - cone) / (1 - cone)), ("B", gamma - cone)):
        found = value(table, metric="linearity_normalized", variant=f"{how}/closed_form")
        assert found == pytest.approx(expected, abs=ROUGH.get(name, TOLERANCE))
    direction = (y / np.linalg.norm(y, axis=1, keepdims=True)).mean(0)
    constant = by_sequence(cosines(score_y, np.broadcast_to(direction, score_y.shape)))
    assert value(table, metric="constant_baseline", variant=None) == pytest.approx(
        constant, abs=ROUGH.get(name, TOLERANCE)
    )
    insample = value(table, metric="constant_baseline", variant="insample")
    assert insample == pytest.approx(np.linalg.norm(direction), abs=ROUGH.get(name, TOLERANCE))
    assert len(table.where(metric="cosine_closed_form")) == 1


@pytest.mark.parametrize("name", ABSENT)
def test_absent_elements_are_empty_with_the_reason(name: str):
    elements = ("ffn", *ABSENT[name])
    table = tx.measure(view_of(name), [tx.probes.Nonlinearity(elements=elements, cosine=(), ridge=0.0)], text())
    for layer in range(LAYERS):
        assert value(table, metric="r2_heldout", layer=layer, element="ffn") < 1
        for element, reason in ABSENT[name].items():
            row = only(table, layer=layer, element=element)
            assert (row.metric, row.value) == ("r2_heldout", None)
            assert reason in row.reason


def test_every_element_stands_in_one_of_the_tables():
    for name in FAMILIES:
        known = {*ELEMENTS, "activation"}
        for element in known:
            row = only(measured(name), metric="r2_heldout", layer=0, element=element)
            assert (row.value is None) is (element in ABSENT.get(name, {}))


# --- jump and similarity


def stream(view: View, name: str, normed: bool) -> list[np.ndarray]:
    """resid[0..L] of all tokens."""
    states = [rows_of(name, layer, "resid") for layer in range(LAYERS)]
    last = rows_of(name, LAYERS - 1, "resid_next")
    if normed:
        assert isinstance(view.final_norm, nn.Module)
        with torch.no_grad():
            last = view.final_norm(torch.from_numpy(last)).numpy()
    return [*states, last]


@pytest.mark.parametrize("positions", ["all", "skip_first"])
@pytest.mark.parametrize("convention", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_jump(name: str, convention: str, positions: str):
    view = view_of(name)
    table = measured(name).where(probe="jump", variant=f"{convention}/{positions}")
    if name == "bert" and convention == "post_norm":  # nothing stands after the last layer of a post-norm encoder
        assert len(table) == 0
        return
    first = np.concatenate([np.arange(length) == 0 for length in text().lengths])
    keep = ~first if positions == "skip_first" else np.ones_like(first)
    states = [state[keep] for state in stream(view, name, convention == "post_norm")]
    psi = [np.mean((1 - cosines(a, b)) / 2) for a, b in pairwise(states)]
    expected = {}
    for layer in range(LAYERS):
        step = np.linalg.norm(states[layer + 1] - states[layer], axis=1) / np.linalg.norm(states[layer], axis=1)
        expected["displacement", layer, None] = psi[layer]
        expected["block_influence", layer, None] = 2 * psi[layer]
        expected["update_ratio", layer, None] = step.mean()
    for layer in range(LAYERS + 1):
        expected["stream_norm", layer, None] = np.linalg.norm(states[layer], axis=1).mean()
        for other in range(layer + 1, LAYERS + 1):
            angle = np.arccos(cosines(states[layer], states[other])) / np.pi
            expected["angular_distance", layer, other] = angle.mean()
    expected["jump_rate", 1, 2] = 100 * max(0, psi[1] - psi[0])
    assert {(row.metric, row.layer, row.layer_to): row.value for row in table} == pytest.approx(
        expected, abs=ROUGH.get(name, TOLERANCE)
    )
    assert {row.n for row in table} == {int(keep.sum())}


@pytest.mark.parametrize("name", FAMILIES)
def test_similarity(name: str):
    table = measured(name).where(probe="similarity")
    states = stream(view_of(name), name, normed=False)
    centred = [state - state.mean(0) for state in states]
    for i in range(LAYERS + 1):
        for j in range(i, LAYERS + 1):
            kernels = [centred[k] @ centred[k].T for k in (i, j)]
            expected = (kernels[0] * kernels[1]).sum() / np.prod([np.linalg.norm(kernel) for kernel in kernels])
            assert value(table, metric="cka", layer=i, layer_to=j) == pytest.approx(
                expected, abs=ROUGH.get(name, TOLERANCE)
            )
        spectrum = np.linalg.svd(centred[i], compute_uv=False) ** 2
        share = spectrum[spectrum > 1e-10 * spectrum[0]] / spectrum.sum()
        effective = np.exp(-(share * np.log(share)).sum())
        assert value(table, metric="effective_rank", layer=i) == pytest.approx(effective, abs=1e-7)
        assert value(table, metric="participation_ratio", layer=i) == pytest.approx(
            1 / np.square(share).sum(), abs=1e-7
        )
        directions = states[i] / np.linalg.norm(states[i], axis=1, keepdims=True)
        pairs = directions @ directions.T
        cone = (pairs.sum() - np.trace(pairs)) / (pairs.size - len(pairs))
        assert value(table, metric="anisotropy", layer=i) == pytest.approx(cone, abs=ROUGH.get(name, TOLERANCE))
