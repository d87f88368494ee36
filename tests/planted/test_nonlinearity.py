"""Elements that are linear, unrelated to their input, constant or unknowable score what they must."""

import pytest
import torch
from torch import nn

import transect as tx
from families import tiny_model
from plants import noise, only, planted, text, value, view_of
from transect.data import assign
from transect.errors import InputError
from transect.probes.nonlinearity import Nonlinearity
from transect.results import Table
from transect.view.view import View

WIDTH = 40
LINEAR = ("ffn", "ffn_up", "activation")


class Line(nn.Module):
    """An activation that is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.7 * x + 0.3


def linear_view(name: str, dtype: torch.dtype, activation: type[nn.Module] = Line) -> View:
    model = tiny_model(name, dtype, layers=2)
    for module in list(model.modules()):
        for attribute in ("act", "intermediate_act_fn"):
            if hasattr(module, attribute) and isinstance(getattr(module, attribute), nn.Module):
                setattr(module, attribute, activation())
    return View(model)


@pytest.mark.parametrize("ridge", [0.0, None])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_linear_elements_score_one(name: str, ridge: float | None):
    elements = (*LINEAR, "attn_proj")
    probe = Nonlinearity(elements=elements, cosine=("ffn",), ridge=ridge)
    table = tx.measure(linear_view(name, torch.float64), [probe], text())
    curved = tx.measure(view_of(name), [probe], text())
    exact = 1e-9 if ridge == 0 else 1e-4  # the tuned ridge is the largest within 1e-4 of the best
    for layer in range(2):
        for element in elements:
            at = {"layer": layer, "element": element}
            assert value(table, metric="r2_heldout", **at) == pytest.approx(1, abs=exact)
            assert value(table, metric="r2_insample", **at) == pytest.approx(1, abs=1e-9)
            assert value(table, metric="r2_heldout", **at) <= 1 + 1e-12
        assert value(table, metric="cosine_closed_form", layer=layer) == pytest.approx(1, abs=exact)
        for element in LINEAR:
            assert value(curved, metric="r2_heldout", layer=layer, element=element) < 0.999
        assert value(curved, metric="r2_heldout", layer=layer, element="attn_proj") == pytest.approx(1, abs=exact)
        assert value(curved, metric="r2_heldout", layer=layer, element="ffn") < 0.97


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_identity_in_place_of_the_activation(name: str):
    probe = Nonlinearity(elements=LINEAR, cosine=(), ridge=0.0)
    table = tx.measure(linear_view(name, torch.float64, nn.Identity), [probe], text()).where(metric="r2_heldout")
    for layer in range(2):
        assert value(table, layer=layer, element="ffn") == pytest.approx(1, abs=1e-9)
        assert value(table, layer=layer, element="ffn_up") == pytest.approx(1, abs=1e-9)
        row = only(table, layer=layer, element="activation")  # it leaves no trace, so no number is made up
        assert row.value is None and row.reason


def test_linear_ffn_in_float32():
    probe = Nonlinearity(elements=LINEAR, cosine=("ffn",), ridge=0.0)
    table = tx.measure(linear_view("gpt2", torch.float32), [probe], text())
    for row in table.where(metric="r2_heldout"):
        assert row.value == pytest.approx(1, abs=1e-5)


def test_output_unrelated_to_its_input():
    """2,357 fit tokens of rank 39: in-sample about 39 / (n - 1), and nothing where it counts."""
    data = text(197)
    view = view_of("gpt2")
    plain, tuned = (Nonlinearity(elements=("ffn",), cosine=("ffn",), ridge=ridge) for ridge in (0.0, None))
    with planted(view, {("ffn", 0): noise(1, WIDTH)}):
        first = tx.measure(view, [plain], data).where(layer=0)
    with planted(view, {("ffn", 0): noise(1, WIDTH)}):
        second = tx.measure(view, [tuned], data).where(layer=0)
    floor = value(first, metric="r2_floor")
    assert floor == pytest.approx(39 / (data.num_tokens - 1), abs=1e-12)
    assert value(first, metric="r2_insample") == pytest.approx(floor, abs=0.02)
    fit = only(first, metric="rank").n
    row = only(first, metric="r2_heldout")
    expected = 1 - (1 + 1 / fit) * (fit - 2) / (fit - 39 - 2)
    assert row.value == pytest.approx(expected, abs=0.02)
    assert row.value < 0 and row.low < row.value < row.high
    assert -0.02 < value(second, metric="r2_heldout") < 0.005
    assert value(second, metric="ridge") == 100
    assert value(first, metric="cosine_closed_form") == pytest.approx(0, abs=0.05)
    assert value(first, metric="cone_size") == pytest.approx(0, abs=0.01)


def test_error_bars_cover_another_text():
    """The same model on other documents: within a few standard errors of the first."""
    probe = Nonlinearity(elements=("ffn",), cosine=())
    first, second = (tx.measure(view_of("gpt2"), [probe], text(197, seed=seed)) for seed in (0, 1))
    rows = [only(table, metric="r2_heldout", layer=0) for table in (first, second)]
    assert abs(rows[0].value - rows[1].value) < 4 * (rows[0].stderr ** 2 + rows[1].stderr ** 2) ** 0.5
    assert rows[0].documents == round(0.25 * 197)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ridge", [0.0, None])
def test_constant_output_is_empty_with_the_reason(ridge: float | None, dtype: torch.dtype):
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    view = view_of("gpt2", dtype)
    with planted(view, {("ffn", 0): lambda x: state.to(x.dtype).expand_as(x).clone()}):
        table = tx.measure(view, [Nonlinearity(elements=("ffn", "attn"), ridge=ridge)], text())
    at = {"layer": 0, "element": "ffn"}
    for metric in ("r2_heldout", "r2_insample"):
        row = only(table, metric=metric, **at)
        assert row.value is None and "same for every" in row.reason
    assert value(table, metric="r2_heldout", layer=0, element="attn") < 1
    assert value(table, metric="constant_baseline", variant=None, **at) == pytest.approx(1, abs=1e-6)
    only_a = only(table, metric="linearity_normalized", variant="A/closed_form", **at)
    assert only_a.value is None and "same way" in only_a.reason


@pytest.mark.parametrize("trained", [None, "cosine_adam"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_input_is_empty_with_the_reason(dtype: torch.dtype, trained: str | None):
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    view = view_of("gpt2", dtype)
    with planted(view, {("layer", 0): lambda x: state.to(x.dtype).expand_as(x).clone(), ("ffn", 1): noise(2, WIDTH)}):
        table = tx.measure(
            view, [Nonlinearity(elements=("layer", "attn_norm"), cosine=("layer",), trained=trained)], text()
        )
    for element, source in (("layer", "resid"), ("attn_norm", "resid")):
        row = only(table, metric="r2_heldout", layer=1, element=element)
        assert row.value is None
        assert row.reason == f"{source} is the same for every fit token"
    assert len(table.where(metric="linearity", layer=1)) == 0


def test_zero_output_has_neither_spread_nor_direction():
    view = view_of("gpt2")
    with planted(view, {("ffn", 0): lambda x: x * 0}):
        table = tx.measure(view, [Nonlinearity(elements=("ffn",), cosine=("ffn",))], text())
    at = {"layer": 0, "element": "ffn"}
    assert only(table, metric="r2_heldout", **at).value is None
    row = only(table, metric="cosine_closed_form", **at)
    assert row.value is None and "zero" in row.reason


def test_fewer_fit_tokens_than_inputs():
    data = tx.data.from_tokens(torch.randint(5, 97, (23, 2), generator=torch.Generator().manual_seed(4)))
    table = tx.measure(view_of("gpt2"), [Nonlinearity(elements=("ffn", "layer"), cosine=("ffn",), ridge=0.0)], data)
    fit = 2 * int((assign(data, tune_fraction=0.0).part == 0).sum())
    assert fit < WIDTH
    for element in ("ffn", "layer"):
        row = only(table, metric="r2_heldout", layer=0, element=element)
        assert row.value is None
        assert row.reason == f"{fit} fit tokens cannot determine a map of {WIDTH} inputs"
    assert len(table.where(metric="cosine_closed_form")) == 0
    assert 0 < value(table, metric="rank", layer=0, element="layer") < fit


def test_nan_is_refused():
    view = view_of("gpt2")
    with planted(view, {("ffn", 0): lambda x: x * float("nan")}), pytest.raises(InputError, match="NaN"):
        tx.measure(view, [Nonlinearity(elements=("ffn",), cosine=())], text(23))


def numbers(table: Table) -> list[tuple]:
    return [(row.metric, row.layer, row.element, row.value) for row in table.where(lambda row: row.metric != "ridge")]


@pytest.mark.parametrize("ridge", [0.0, None])
def test_batch_size_and_order_of_documents_do_not_matter(ridge: float | None):
    rows = torch.randint(5, 97, (53, 13), generator=torch.Generator().manual_seed(5))
    probes = ["jump", "similarity", Nonlinearity(elements=("ffn", "attn", "activation"), ridge=ridge)]
    order = torch.randperm(53, generator=torch.Generator().manual_seed(6))
    tables = [
        tx.measure(view_of("gpt2"), probes, tx.data.from_tokens(ids), batch_size=size)
        for ids, size in ((rows, 8), (rows, 3), (rows[order], 53))
    ]
    for other in tables[1:]:
        assert [row[:3] for row in numbers(other)] == [row[:3] for row in numbers(tables[0])]
        assert [row[3] for row in numbers(other)] == pytest.approx(
            [row[3] for row in numbers(tables[0])], rel=1e-9, abs=1e-10
        )
        errors = [[row.stderr for row in table if row.stderr is not None] for table in (other, tables[0])]
        assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "bert", "gemma2"])
def test_padding_holding_nan_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    from transect.view import capture

    view, data = view_of(name), text(47)
    probes = ["jump", "similarity", Nonlinearity(trained="cosine_adam", train_epochs=1)]
    clean = tx.measure(view, probes, data, batch_size=7)
    masks, plain_run, plain_value = [], View.run, capture.site_value

    def run(self, ids, mask=None, *, head=False):
        masks[:] = [mask]
        return plain_run(self, ids, mask, head=head)

    def poisoned(*args):
        kept = plain_value(*args)
        poison = torch.full_like(kept, float("nan"))
        return torch.where(masks[0][..., None], kept, poison)

    monkeypatch.setattr(View, "run", run)
    monkeypatch.setattr(capture, "site_value", poisoned)
    assert (data.lengths < data.seq_len).any()
    assert tx.measure(view, probes, data, batch_size=7).rows == clean.rows
