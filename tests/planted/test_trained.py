"""The paper's approximator: what it reaches, where it starts, and that it is the same every time."""

import pytest
import torch

import transect as tx
from plants import only, planted, text, value, values, view_of
from transect.probes._trained import Approximator
from transect.probes.nonlinearity import Nonlinearity
from transect.results import Table

NAME = "gpt2"


def measured(element: str = "ffn", data: tx.data.Dataset | None = None, **options) -> Table:
    probe = Nonlinearity(elements=(element,), cosine=(element,), ridge=0.0, **options)
    return tx.measure(view_of(NAME), [probe], data or text()).where(layer=1)


@pytest.mark.parametrize("kind", ["cosine_adam", "mse_adam"])
def test_without_epochs_it_is_the_closed_form(kind: str):
    table = measured(trained=kind, train_epochs=0)
    assert value(table, metric="linearity", variant=kind) == pytest.approx(
        value(table, metric="cosine_closed_form"), abs=1e-12
    )
    for how in "AB":
        found = [value(table, metric="linearity_normalized", variant=f"{how}/{fit}") for fit in (kind, "closed_form")]
        assert found[0] == pytest.approx(found[1], abs=1e-11)


def test_an_affine_element_is_learnt_from_a_random_start():
    view = view_of(NAME)
    matrix = torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 40**0.5
    options = {
        "elements": ("ffn",),
        "cosine": ("ffn",),
        "ridge": 0.0,
        "trained": "cosine_adam",
        "init": "truncated_normal",
    }
    with planted(view, {("ffn", 1): lambda x: x @ matrix + 0.1}):
        before, after = (
            tx.measure(view, [Nonlinearity(**options, train_epochs=epochs)], text(97)).where(layer=1)
            for epochs in (0, 251)
        )
    assert value(before, metric="linearity") < 0.5
    assert value(after, metric="linearity") > 0.999
    assert value(after, metric="cosine_closed_form") == pytest.approx(1, abs=1e-9)


def test_training_raises_the_cosine_of_the_fit_documents_start():
    start, end = (measured(trained="cosine_adam", train_epochs=epochs) for epochs in (0, 13))
    assert value(end, metric="linearity") > value(start, metric="linearity")


def test_two_runs_are_equal_and_do_not_depend_on_batches_or_order():
    for kind in ("cosine_adam", "mse_adam", "relu_control"):
        for init in ("closed_form", "truncated_normal"):
            assert values(measured(trained=kind, init=init)) == values(measured(trained=kind, init=init))
    rows = torch.randint(5, 97, (53, 13), generator=torch.Generator().manual_seed(5))
    probe = Nonlinearity(elements=("ffn",), cosine=("ffn",), trained="cosine_adam")
    first, second = (
        tx.measure(view_of(NAME), [probe], tx.data.from_tokens(ids), batch_size=size).where(metric="linearity")
        for ids, size in ((rows, 8), (rows.flip(0), 3))
    )
    assert [row.value for row in first] == pytest.approx([row.value for row in second], abs=1e-9)


def test_relu_control_differs_and_cannot_be_negative():
    relu, linear = (measured(trained=kind) for kind in ("relu_control", "cosine_adam"))
    assert value(relu, metric="linearity") < value(linear, metric="linearity")
    approximator = Approximator("relu_control", torch.eye(3), torch.zeros(3))
    assert approximator(torch.tensor([[1.0, -2.0, 0.5]])).tolist() == [[1.0, 0.0, 0.5]]


def test_random_start_is_the_papers():
    made = Approximator.truncated_normal("cosine_adam", (211, 97), torch.zeros(1, dtype=torch.float64), 3)
    weight = made.weight.detach()
    assert weight.abs().max() <= 0.04 and (weight.abs() > 0.03).any()
    assert float(weight.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)  # a normal cut at two of its deviations
    assert float(made.bias.detach().abs().max()) == 0
    assert torch.equal(weight, Approximator.truncated_normal("cosine_adam", (211, 97), weight, 3).weight)


@pytest.mark.parametrize(("kind", "scale"), [("cosine_adam", 1.0), ("mse_adam", 0.0)])
def test_one_step_follows_its_loss(kind: str, scale: float):
    """A cosine loss leaves the scale of y* free: a map of the right direction and wrong size does not move."""
    x = torch.randn(31, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = Approximator(kind, 2 * torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    made.step(x, x)
    gradient = float(made.weight.grad.abs().max())
    assert (gradient < 1e-12) is (scale == 1.0)


def test_an_elementwise_function_has_no_approximator():
    table = measured("activation", trained="cosine_adam")
    row = only(table, metric="linearity")
    assert row.value is None and "element-wise" in row.reason
    assert 0 < value(table, metric="cosine_closed_form") < 1


def test_probes_of_one_run_train_by_themselves():
    """Two probes with other numbers of epochs give the same rows together as alone."""
    probes = [
        Nonlinearity(elements=("ffn",), cosine=("ffn",), trained="cosine_adam", train_epochs=epochs)
        for epochs in (1, 5)
    ]
    together = tx.measure(view_of(NAME), probes, text()).where(metric="linearity", layer=1)
    alone = [tx.measure(view_of(NAME), [probe], text()).where(metric="linearity", layer=1).rows[0] for probe in probes]
    assert together.rows == alone
    assert alone[0].value != alone[1].value
