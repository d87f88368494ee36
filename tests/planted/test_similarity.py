"""Streams whose likeness, rank and cone are planted."""

import numpy as np
import pytest
import torch
from torch import Tensor

import transect as tx
from plants import only, planted, text, turn, value, view_of
from transect.errors import InputError
from transect.probes.similarity import Similarity

WIDTH = 40


def fixed(states: Tensor):
    """A layer that writes these states [tokens, width], whatever comes in; for one batch without padding."""
    return lambda x: states.reshape(x.shape).to(x.dtype)


def square_text(documents: int = 23, positions: int = 11) -> tx.data.Dataset:
    ids = torch.randint(5, 97, (documents, positions), generator=torch.Generator().manual_seed(1))
    return tx.data.from_tokens(ids)


def measured(states: Tensor, **options) -> tx.Table:
    """resid[1] and resid[2] hold the states."""
    view = view_of("gpt2")
    with planted(view, {("layer", 0): fixed(states), ("layer", 1): lambda x: x}):
        return tx.measure(view, [Similarity(**options)], square_text(), batch_size=23)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_turned_stream_is_the_same(name: str, dtype: torch.dtype):
    view = view_of(name, dtype)
    matrix = torch.linalg.qr(
        torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ).Q
    with planted(view, {("layer", 0): lambda x: 3 * x @ matrix.to(x.dtype)}):
        table = tx.measure(view, ["similarity"], text(23))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert value(table, metric="cka", layer=0, layer_to=1) == pytest.approx(1, abs=tolerance)
    assert value(table, metric="cka", layer=1, layer_to=1) == 1
    assert value(table, metric="cka", layer=1, layer_to=2) < 0.99
    for metric in ("effective_rank", "participation_ratio", "anisotropy"):
        first, second = (value(table, metric=metric, layer=layer) for layer in (0, 1))
        assert first == pytest.approx(second, rel=1e-9 if dtype == torch.float64 else 1e-4)


def test_unrelated_streams_are_not_alike():
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(2, 253, WIDTH, generator=generator, dtype=torch.float64)
    view = view_of("gpt2")
    with planted(view, {("layer", 0): fixed(states[0]), ("layer", 1): fixed(states[1])}):
        table = tx.measure(view, ["similarity"], square_text(), batch_size=23)
    assert value(table, metric="cka", layer=1, layer_to=2) < 2 * WIDTH / 253


def test_planted_spectrum():
    tokens = 253
    generator = torch.Generator().manual_seed(4)
    raw = torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    orthonormal = torch.linalg.qr(raw - raw.mean(0)).Q
    states = torch.zeros(tokens, WIDTH, dtype=torch.float64)
    states[:, :3] = orthonormal * torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64).sqrt()
    table = measured((states + 0.7) @ turn(0.4, WIDTH))
    assert value(table, metric="effective_rank", layer=1) == pytest.approx(2.381102, abs=5e-7)
    assert value(table, metric="participation_ratio", layer=1) == pytest.approx(2.0, abs=1e-9)


def test_planted_cone_is_the_mean_over_all_pairs():
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(253, WIDTH, generator=generator, dtype=torch.float64) + 0.8
    directions = (states / states.norm(dim=1, keepdim=True)).numpy()
    pairs = directions @ directions.T
    expected = (pairs.sum() - 253) / (253 * 252)
    row = only(measured(states), metric="anisotropy", layer=1)
    assert row.value == pytest.approx(expected, abs=1e-12)
    assert 0.3 < expected < 0.5 and row.n == 253
    assert row.low < expected < row.high and row.stderr > 0
    opposite = measured(torch.cat([states[:126], -states[:126], states[:1] * 0 + 1]))
    assert value(opposite, metric="anisotropy", layer=1) == pytest.approx(-1 / 252, abs=2e-3)


def test_sample_is_stated_and_free_of_the_order_of_documents():
    rows = torch.randint(5, 97, (29, 7), generator=torch.Generator().manual_seed(6))
    tables = [
        tx.measure(view_of("gpt2"), [Similarity(sample=31)], tx.data.from_tokens(ids)) for ids in (rows, rows.flip(0))
    ]
    assert {row.n for row in tables[0].where(metric="cka")} == {31}
    assert {row.n for row in tables[0].where(metric="anisotropy")} == {203}
    first, second = ([row.value for row in table] for table in tables)
    assert first == pytest.approx(second, abs=1e-12)
    every = tx.measure(view_of("gpt2"), ["similarity"], tx.data.from_tokens(rows))
    assert value(every, metric="cka", layer=0, layer_to=1) != value(tables[0], metric="cka", layer=0, layer_to=1)


def test_errors_of_matrices_come_when_asked_for():
    view, data = view_of("gpt2"), text()
    plain, asked = (tx.measure(view, [Similarity(errors=on)], data) for on in (False, True))
    for metric in ("cka", "effective_rank", "participation_ratio"):
        assert {row.stderr for row in plain.where(metric=metric)} == {None}
        for row in asked.where(lambda row: row.layer != row.layer_to, metric=metric):
            assert row.stderr > 0 and row.low < row.value < row.high
    assert [row.value for row in plain] == [row.value for row in asked]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_stream_that_never_varies_is_empty_with_the_reason(dtype: torch.dtype):
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    view = view_of("gpt2", dtype)
    with planted(view, {("layer", 0): lambda x: state.to(x.dtype).expand_as(x).clone()}):
        table = tx.measure(view, ["similarity"], text(23))
    empty = table.where(lambda row: row.value is None)
    assert [row.metric for row in empty] == ["cka"]
    assert "resid[1] is the same for every token" in empty.rows[0].reason
    assert value(table, metric="anisotropy", layer=1) == pytest.approx(1, abs=1e-6)


def test_a_stream_of_zeros_has_no_direction():
    view = view_of("gpt2")
    with planted(view, {("layer", 0): lambda x: x * 0}):
        table = tx.measure(view, ["similarity"], text(23))
    row = only(table, metric="anisotropy", layer=1)
    assert row.value is None and "direction" in row.reason
    assert value(table, metric="anisotropy", layer=0) < 1


def test_too_small_a_sample_is_refused():
    with pytest.raises(InputError, match="sample is 1"):
        Similarity(sample=1)
    lonely = tx.measure(view_of("gpt2"), ["similarity"], tx.data.from_tokens([[7]]))
    assert all(row.value is None and row.reason for row in lonely)
    assert np.isin([row.metric for row in lonely], ["cka"]).all()
