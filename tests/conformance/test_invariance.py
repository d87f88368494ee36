"""Rows do not depend on how the text was put to the model: batch size, padding side, order of the documents."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from families import FIRST_TEXT_ID, VOCAB, tiny_model
from transect.data import Dataset, from_tokens
from transect.measure import measure
from transect.probes.ablation import Ablation
from transect.probes.base import Probe
from transect.probes.commutativity import Commutativity
from transect.probes.jump import Jump
from transect.probes.nonlinearity import Nonlinearity
from transect.probes.similarity import Similarity
from transect.results import Row
from transect.view.view import View

SEQ_LEN = 17  # so short that an epoch of training is several steps, whose order matters
RELATIVE = ("update_ratio", "stream_norm", "effective_rank", "participation_ratio", "jump_rate", "ridge")
"""Metrics without an upper bound of about one; the others are compared absolutely."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
NUMBERS = ("value", "stderr", "low", "high")


def _documents() -> list[list[int]]:
    """Ragged documents with equal ones, one of a single token and one that is several sequences long."""
    rng = np.random.default_rng(5)
    rows = [rng.integers(FIRST_TEXT_ID, VOCAB, size).tolist() for size in (1, 83, *rng.integers(9, 61, 45))]
    return [*rows, rows[7], rows[7]]


def _padded(rows: Sequence[Sequence[int]], left: bool) -> Dataset:
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), VOCAB - 1), np.zeros((len(rows), width), dtype=bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, True
    return from_tokens(ids, mask, SEQ_LEN)


@functools.cache
def _view(name: str, dtype: torch.dtype) -> View:
    return View(tiny_model(name, dtype), name=name)


def _measured(name: str, dtype: torch.dtype, data: Dataset, batch_size: int) -> list[Row]:
    probes = [
        Jump(positions=("all", "skip_first", "last_only")),
        Nonlinearity(trained="cosine_adam", init="truncated_normal", train_epochs=1),
        Similarity(sample=701, errors=True),
    ]
    return measure(_view(name, dtype), probes, data, batch_size=batch_size).rows


@functools.cache
def _expected(name: str, dtype: torch.dtype) -> list[Row]:
    """The plainest way: one document after another, so that nothing is ever padded."""
    return _measured(name, dtype, from_tokens(_documents(), seq_len=SEQ_LEN), 1)


def _without_numbers(row: Row) -> Row:
    return replace(row, value=0.0, reason=None, **dict.fromkeys(NUMBERS[1:]))


def _away(row: Row, other: Row) -> float:
    """The largest difference of two rows' numbers as the tolerance counts it; infinite where only one has a number."""
    found = [0.0]
    for name in NUMBERS:
        mine, yours = getattr(row, name), getattr(other, name)
        if mine is None or yours is None:
            found.append(0.0 if mine is yours else np.inf)
        elif row.metric != "rank":
            found.append(abs(mine - yours) / (max(abs(mine), 1e-12) if row.metric in RELATIVE else 1.0))
        else:
            found.append(0.0 if abs(mine - yours) <= 1 else np.inf)
    return max(found)


def _arrangements() -> dict[str, tuple[Dataset, int]]:
    rows = _documents()
    order = np.random.default_rng(11).permutation(len(rows))
    shuffled = [rows[index] for index in order]
    return {
        "batches of 7": (from_tokens(rows, seq_len=SEQ_LEN), 7),
        "batches of 32": (from_tokens(rows, seq_len=SEQ_LEN), 32),
        "padded on the left": (_padded(rows, left=True), 7),
        "padded on the right": (_padded(rows, left=False), 32),
        "shuffled": (from_tokens(shuffled, seq_len=SEQ_LEN), 1),
        "shuffled, padded on the left, in batches": (_padded(shuffled, left=True), 7),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("arrangement", _arrangements())
def test_rows_are_the_same_however_the_text_is_put(name: str, dtype: torch.dtype, arrangement: str):
    data, batch_size = _arrangements()[arrangement]
    expected, found = _expected(name, dtype), _measured(name, dtype, data, batch_size)
    assert [_without_numbers(row) for row in found] == [_without_numbers(row) for row in expected]
    assert [row.reason for row in found] == [row.reason for row in expected]
    away = [(_away(row, other), row, other) for row, other in zip(expected, found, strict=True)]
    worst = max(away, key=lambda item: item[0])
    assert worst[0] <= TOLERANCE[dtype], worst


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_every_fit_is_determined_so_that_there_is_a_number_to_compare(name: str):
    rows = _expected(name, torch.float64)
    assert {row.probe for row in rows} == {"jump", "nonlinearity", "similarity"}
    assert {"linearity", "cosine_closed_form", "ridge", "cka"} <= {row.metric for row in rows}
    assert sum(row.metric == "r2_heldout" and row.value is not None for row in rows) >= 8 * 3
    with_error = ("displacement", "stream_norm", "angular_distance", "r2_heldout", "cosine_closed_form", "cka")
    assert all(row.stderr is not None for row in rows if row.metric in with_error and row.value is not None)


# edited models


EDITS: dict[str, Probe] = {
    "orders": Commutativity(kinds=("adjacent", "shuffle", "repeat"), shuffles=2, sample=211, mask_id=3),
    "parts": Ablation(
        methods=("zero", "noise"),
        parts=("ffn", "attn", "layer"),
        schedules=("single",),
        residual_weights=(0.5,),
        sample=211,
        mask_id=3,
    ),
    "fits": Ablation(
        methods=("mean", "linear", "cosine_adam", "two_linear"),
        parts=("ffn", "attn"),
        schedules=("from_below",),
        sample=211,
        mask_id=3,
        train_epochs=1,
    ),
}


@functools.cache
def _edited(name: str, edit: str, arrangement: str | None = None) -> list[Row]:
    """Rows of an arrangement of the text; None is one document after another."""
    data, batch_size = from_tokens(_documents(), seq_len=SEQ_LEN), 1
    if arrangement is not None:
        data, batch_size = _arrangements()[arrangement]
    return measure(_view(name, torch.float64), [EDITS[edit]], data, batch_size=batch_size).rows


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("arrangement", _arrangements())
def test_edited_models_are_the_same_however_the_text_is_put(name: str, edit: str, arrangement: str):
    costs = {"layer_evaluations"}  # a number of batches
    expected, found = (
        [row for row in _edited(name, edit, how) if row.metric not in costs] for how in (None, arrangement)
    )
    assert [_without_numbers(row) for row in found] == [_without_numbers(row) for row in expected]
    worst = max(_away(row, other) for row, other in zip(expected, found, strict=True))
    assert worst <= TOLERANCE[torch.float64]
    assert {row.metric for row in found} == {"loss", "loss_change", "kl", "agreement", "state_change"}
    assert all(row.stderr is not None and row.value is not None for row in found if row.metric == "kl")
    layers = [[row.value for row in _edited(name, edit, how) if row.metric in costs] for how in (None, arrangement)]
    assert layers[0] == layers[1]  # per batch


def test_another_text_gives_other_rows():
    """What makes the comparison above worth something."""
    rows = _documents()
    rows[3][0] = FIRST_TEXT_ID if rows[3][0] != FIRST_TEXT_ID else FIRST_TEXT_ID + 1
    found = _measured("gpt2", torch.float64, from_tokens(rows, seq_len=SEQ_LEN), 7)
    expected = _expected("gpt2", torch.float64)
    assert max(_away(row, other) for row, other in zip(expected, found, strict=True)) > 1e-6


# sequences that several documents have


def _with_equal_sequences() -> list[list[int]]:
    """Documents that all begin with the same sequence, which each of them masks at places of its own."""
    rng = np.random.default_rng(7)
    common = rng.integers(FIRST_TEXT_ID, VOCAB, SEQ_LEN).tolist()
    return [common + rng.integers(FIRST_TEXT_ID, VOCAB, size).tolist() for size in rng.integers(2, 11, 97)]


@pytest.mark.parametrize(
    "probe",
    [
        Commutativity(kinds=("adjacent",), sample=1103, objective="masked", mask_id=3),  # some of the equal ones
        Ablation(
            methods=("mse_adam",),
            parts=("ffn",),
            schedules=("single",),
            sample=10**6,
            objective="masked",
            mask_id=3,
            train_epochs=2,
        ),
    ],
    ids=["sample", "training"],
)
def test_equal_sequences_of_different_documents_come_in_no_order_of_the_text(probe: Probe):
    """Which of them are in the sample, and in which order they are trained on, would change the rows."""
    rows = _with_equal_sequences()
    expected, found = (
        measure(_view("bert", torch.float64), [probe], from_tokens(one, seq_len=SEQ_LEN), batch_size=7).rows
        for one in (rows, rows[::-1])
    )
    assert [_without_numbers(row) for row in found] == [_without_numbers(row) for row in expected]
    assert max(_away(row, other) for row, other in zip(expected, found, strict=True)) <= TOLERANCE[torch.float64]
