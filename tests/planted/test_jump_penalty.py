"""The penalty on jumps has the values, weights and gradients that follow by calculation."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import transect as tx
from transect.errors import InputError
from transect.metrics.angles import displacement
from transect.models.config import ModelConfig
from transect.models.penalties.base import LayerSums, combined, loss_positions
from transect.models.penalties.jump import Jump, JumpConfig
from transect.models.plug import Unfit

PSI = (0.10, 0.04, 0.06, 0.03, 0.20)
WIDTH = 37
LAYERS = 5
WEIGHTS = {
    0.0: (0.2,) * 5,
    0.25: (0.114051, 0.146444, 0.188038, 0.241445, 0.310022),
    0.5: (0.058012, 0.095646, 0.157694, 0.259993, 0.428656),
    1.0: (0.011656, 0.031685, 0.086129, 0.234122, 0.636409),
    2.0: (0.000290, 0.002143, 0.015838, 0.117025, 0.864704),
}
LAST_THREE_OF_12 = {
    0.25: (0.1412, 0.1813, 0.2328),
    0.5: (0.1451, 0.2392, 0.3944),
    1.0: (0.0855, 0.2325, 0.6321),
    2.0: (0.0158, 0.1170, 0.8647),
}
Stack = list[torch.nn.Linear]


def jump(layers: int = LAYERS, **settings) -> Jump:
    return Jump(JumpConfig.parse({"strength": 1.0} | settings), layers)


def sums_of(psi: tuple[float, ...], tokens: int = 7) -> list[LayerSums]:
    values = [torch.tensor([value, 0.5, 2.0, 3.0], dtype=torch.float64) * tokens for value in psi]
    return [LayerSums(value, torch.tensor(tokens)) for value in values]


def stack(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Stack:
    layers = [torch.nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) / 5
    return layers


def walked(
    penalty: Jump, layers: Stack, x: Tensor, counted: Tensor | None = None, saved: bool = False
) -> list[LayerSums]:
    """The sums of a residual stack, as a model computes them; with `saved` inside checkpointed regions."""

    def one(place: int, x: Tensor) -> tuple[Tensor, LayerSums]:
        after = x + torch.tanh(layers[place](x))
        return after, penalty.layer(place, x, after, counted)

    found = []
    for place in range(len(layers)):
        x, sums = checkpoint(one, place, x, use_reentrant=False) if saved else one(place, x)
        found.append(sums)
    return found


def gradients(loss: Tensor, layers: Stack) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [parameter for layer in layers for parameter in layer.parameters()]))


@pytest.mark.parametrize("alpha", WEIGHTS)
def test_softmax_weights(alpha: float):
    assert jump(alpha=alpha).weights == pytest.approx(WEIGHTS[alpha], abs=5e-7)
    assert sum(jump(alpha=alpha).weights) == pytest.approx(1, abs=1e-15)
    if alpha in LAST_THREE_OF_12:
        assert jump(12, alpha=alpha).weights[-3:] == pytest.approx(LAST_THREE_OF_12[alpha], abs=5e-5)


def test_a_large_alpha_leaves_the_last_layer():
    assert jump(96, alpha=50.0).weights == pytest.approx([0.0] * 95 + [1.0], abs=1e-20)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"alpha": 0}, 0.086000),
        ({"alpha": 0.25}, 0.097793),
        ({}, 0.112620),
        ({"alpha": 1}, 0.141906),
        ({"alpha": 2}, 0.177517),
        ({"weights": "last_only"}, 0.20),
        ({"weights": "uniform"}, 0.086),
        ({"weights": "last_k", "k": 2}, (0.03 + 0.20) / 2),
        ({"weights": [1, 0, 0, 2, 0.5]}, 0.10 + 2 * 0.03 + 0.5 * 0.20),
        ({"weights": "uniform", "hinge": True}, (0.02 + 0.17) / 5),
        ({"weights": [9, 1, 2, 4, 8], "hinge": True}, 2 * 0.02 + 8 * 0.17),
    ],
)
def test_weighted_sum(settings: dict, expected: float):
    output = jump(**settings).total(sums_of(PSI))
    assert float(output.loss) == pytest.approx(expected, abs=6e-7)
    assert float(output.stats["penalty"]) == float(output.loss)
    assert output.stats["displacement"].tolist() == pytest.approx(PSI, abs=1e-15)
    assert float(output.stats["jump_rate"]) == pytest.approx(17, abs=1e-12)
    assert output.stats["stream_norm"].tolist() == pytest.approx([2] * 5 + [3], abs=1e-15)
    assert output.stats["update_ratio"].tolist() == pytest.approx([0.5] * 5, abs=1e-15)


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({}, {0: 0.3, 10: 0.3, 10**6: 0.3}),
        ({"schedule": "warmup", "schedule_steps": 8}, {0: 0, 2: 0.075, 8: 0.3, 99: 0.3}),
        ({"schedule": "decay", "schedule_steps": 8}, {0: 0.3, 2: 0.225, 8: 0, 99: 0}),
    ],
)
def test_schedules(settings: dict, at: dict[int, float]):
    penalty = jump(strength=0.3, **settings)
    for step, strength in at.items():
        assert penalty.active(step) == (strength > 0)
        output = penalty.total(sums_of(PSI), step)
        assert float(output.loss) == pytest.approx(strength * float(output.stats["penalty"]), rel=1e-12)
    if settings:
        with pytest.raises(InputError, match="say the training step"):
            penalty.active()
    else:
        assert penalty.active()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": [1, 2]}, r"weights is \[1.0, 2.0\]: give one number for each of 5 layers"),
        ({"weights": [1, 2, 3, 4, -5]}, "weights"),
        ({"weights": "last_k"}, "k is None: weights last_k need it"),
        ({"k": 3}, "k is 3: weights last_k need it"),
        ({"weights": "last_k", "k": 6}, "k is 6: there are 5 layers"),
        ({"schedule": "warmup"}, "schedule_steps is None: warmup and decay need it"),
        ({"schedule_steps": 3}, "schedule_steps is 3: warmup and decay need it"),
        ({"alpha": -1}, "alpha is -1: "),
        ({"strength": -0.1}, "strength is -0.1: "),
        ({"eps": 0}, "eps is 0: "),
        ({"stop_grad": "first"}, "stop_grad is 'first': "),
        ({"lamda": 1}, "lamda is not a setting; did you mean 'alpha'|lamda is not a setting"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, said: str):
    with pytest.raises(InputError, match=said) as error:
        jump(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "model", "where"),
    [
        ({"weights": "last_k", "k": 3}, {"layers": 2}, "here.k"),
        ({"weights": [1, 2, 3]}, {"layers": 2}, "here.weights"),
        ({"hinge": True}, {"layers": 1}, "here.hinge"),
        ({"final_state": "post_norm"}, {"layers": 2, "norm": {"layout": "post"}}, "here.final_state"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict, model: dict, where: str):
    built = ModelConfig.parse({"vocab_size": 11, "width": 8, "attention": {"heads": 2}} | model)
    with pytest.raises(Unfit) as error:
        JumpConfig.parse(settings).check(built, built, "here")
    assert error.value.where == where
    JumpConfig().check(built, built, "here")


def test_one_layer_has_nothing_to_compare_with():
    assert jump(1).total(sums_of(PSI[:1])).loss == pytest.approx(0.1)
    assert "jump_rate" not in jump(1).stats(sums_of(PSI[:1]))
    with pytest.raises(InputError, match="hinge"):
        jump(1, hinge=True)


def test_lambda_and_its_schedule_have_two_names():
    config = JumpConfig.parse({"lambda": 0.25, "lambda_schedule": "decay", "schedule_steps": 3})
    assert (config.strength, config.schedule) == (0.25, "decay")
    assert JumpConfig.parse(config.plain()) == config
    assert config.but(strength=0.5).strength == 0.5


def test_gradient_at_45_degrees():
    before = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    after = torch.tensor([[[1.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    loss = jump(1).total([jump(1).layer(0, before, after, None)]).loss
    loss.backward()
    assert before.grad is not None and after.grad is not None
    assert float(loss.detach()) == pytest.approx(0.146447, abs=5e-7)
    assert after.grad.flatten().tolist() == pytest.approx([-0.176777, 0.176777], abs=5e-7)
    assert before.grad.flatten().tolist() == pytest.approx([0, -0.353553], abs=5e-7)
    assert float((before.detach() * before.grad).sum()) == pytest.approx(0, abs=1e-15)
    assert float((after.detach() * after.grad).sum()) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("half_one_minus_cos", lambda angle: math.sin(angle) / 2),
        ("one_minus_cos", math.sin),
        ("arccos_over_pi", lambda angle: 1 / math.pi),
    ],
)
@pytest.mark.parametrize("angle", [1e-3, 0.4, 1.9, 3.0])
def test_slope_of_each_displacement(name: str, slope, angle: float):
    """Turning the later state by a small angle costs the derivative by the angle."""
    before = torch.tensor([[[3.0, 0.0]]], dtype=torch.float64)
    turned = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
    after = 2 * torch.stack([turned.cos(), turned.sin()])[None, None]
    jump(1, displacement=name).layer(0, before, after, None).values[0].backward()
    assert float(turned.grad) == pytest.approx(slope(angle), rel=1e-9)


@pytest.mark.parametrize("name", ["half_one_minus_cos", "one_minus_cos", "arccos_over_pi"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.25, 0.0, -1.0])
def test_multiples_of_a_state(name: str, dtype: torch.dtype, factor: float, generator: torch.Generator):
    before = torch.randn(2, 3, WIDTH, generator=generator).to(dtype).requires_grad_()
    after = (factor * before.detach()).requires_grad_()
    values = jump(1, displacement=name).layer(0, before, after, None).values
    values[0].backward()
    values = values.detach()
    if factor > 0:
        assert values[0] == 0
    if factor < 0:
        assert float(values[0]) == pytest.approx(6 * (2 if name == "one_minus_cos" else 1), rel=1e-5)
    assert float(values[1]) == pytest.approx(6 * abs(1 - factor), rel=1e-6, abs=1e-6 if factor == 1 else 0)
    for state in (before, after):
        assert state.grad is not None and torch.isfinite(state.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_states_stay_finite(dtype: torch.dtype, generator: torch.Generator):
    zero = torch.zeros(2, 3, WIDTH, dtype=dtype)
    other = torch.randn(2, 3, WIDTH, generator=generator).to(dtype)
    for pair in ((zero, other), (other, zero), (zero, zero.clone())):
        states = [state.clone().requires_grad_() for state in pair]
        values = jump(1).layer(0, *states, None).values
        values[0].backward()
        assert torch.isfinite(values).all()
        assert all(torch.isfinite(state.grad).all() for state in states)


@pytest.mark.parametrize("stop", ["none", "prev", "next", "both"])
def test_stopped_gradients(stop: str, generator: torch.Generator):
    before, after = (torch.randn(2, 3, WIDTH, generator=generator).requires_grad_() for _ in range(2))
    penalty = jump(1, stop_grad=stop)
    sums = penalty.layer(0, before, after, None)
    assert torch.equal(sums.values, jump(1).layer(0, before, after, None).values)
    loss = penalty.total([sums]).loss
    assert loss.requires_grad == (stop != "both")
    if stop != "both":
        loss.backward()
    assert (before.grad is not None) == (stop in ("none", "next"))
    assert (after.grad is not None) == (stop in ("none", "prev"))


def test_layers_without_weight_cost_no_gradient_and_are_logged(generator: torch.Generator):
    layers, x = stack(generator), torch.randn(2, 3, WIDTH, generator=generator)
    last, hinged = jump(weights="last_only"), jump(weights="last_only", hinge=True)
    assert [sums.values.requires_grad for sums in walked(last, layers, x)] == [False] * 4 + [True]
    assert [sums.values.requires_grad for sums in walked(hinged, layers, x)] == [False] * 3 + [True, True]
    full = jump().stats(walked(jump(), layers, x))
    for name, value in last.stats(walked(last, layers, x)).items():
        assert torch.equal(value, full[name])


@pytest.mark.parametrize("settings", [{}, {"hinge": True}, {"displacement": "arccos_over_pi"}])
def test_planted_rotations(settings: dict):
    angles = (0.3, 0.0, 1.1, 0.2, 2.0)
    state = torch.tensor([[[2.0, -1.0]]], dtype=torch.float64)
    penalty, sums = jump(weights="uniform", **settings), []
    for place, angle in enumerate(angles):
        cos, sin = math.cos(angle), math.sin(angle)
        after = state @ torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64) if angle else state
        sums.append(penalty.layer(place, state, after, None))
        state = after
    psi = [math.sin(angle / 2) ** 2 for angle in angles]
    if settings.get("displacement"):
        psi = [angle / math.pi for angle in angles]
    found = penalty.total(sums)
    assert found.stats["displacement"].tolist() == pytest.approx(psi, abs=1e-15)
    assert found.stats["displacement"][1] == 0
    assert found.stats["update_ratio"].tolist() == pytest.approx([2 * math.sin(a / 2) for a in angles], abs=1e-14)
    rises = sum(max(0, b - a) for a, b in pairwise(psi))
    assert float(found.loss) == pytest.approx((rises if settings.get("hinge") else sum(psi)) / 5, abs=1e-15)
    assert float(found.stats["jump_rate"]) == pytest.approx(100 * (psi[4] - psi[3]), abs=1e-12)


def test_orthogonal_branches():
    """|h_0| = 1 and each layer adds a unit vector orthogonal to all before: Psi falls, no jump."""
    penalty, sums = jump(12), []
    state = torch.eye(13, dtype=torch.float64)[:1, None]
    for place in range(12):
        after = state + torch.eye(13, dtype=torch.float64)[place + 1]
        sums.append(penalty.layer(place, state, after, None))
        state = after
    stats = penalty.stats(sums)
    psi = stats["displacement"]
    assert [float(psi[i]) for i in (0, 1, 2, 11)] == pytest.approx([0.146447, 0.091752, 0.066987, 0.019616], abs=5e-7)
    assert stats["jump_rate"] == 0
    assert stats["stream_norm"].tolist() == pytest.approx([math.sqrt(1 + place) for place in range(13)], abs=1e-14)
    assert stats["update_ratio"].tolist() == pytest.approx([1 / math.sqrt(1 + place) for place in range(12)], abs=1e-14)


@pytest.mark.parametrize(("hinge", "dtype"), [(False, torch.float32), (False, torch.float64), (True, torch.float64)])
def test_padding_does_not_count(hinge: bool, dtype: torch.dtype, generator: torch.Generator):
    layers, penalty = stack(generator, dtype), jump(hinge=hinge)
    x = torch.randn(3, 7, WIDTH, generator=generator).to(dtype)
    counted = torch.rand(3, 7, generator=generator) < 0.6
    loss = penalty.total(walked(penalty, layers, x, counted)).loss
    alone = penalty.total(walked(penalty, layers, x[counted][None])).loss
    torch.testing.assert_close(loss, alone, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    elsewhere = torch.where(counted[..., None], x, 1e4 * torch.randn(3, 7, WIDTH, generator=generator, dtype=dtype))
    other = penalty.total(walked(penalty, layers, elsewhere, counted)).loss
    assert torch.equal(other, loss)
    for own, moved in zip(gradients(loss, layers), gradients(other, layers), strict=True):
        assert torch.equal(own, moved) and own.abs().sum() > 0


def test_padding_may_hold_anything(generator: torch.Generator):
    before, after = (torch.randn(2, 3, WIDTH, generator=generator) for _ in range(2))
    counted = torch.tensor([[True, True, False], [True, False, False]])
    expected = jump(1).layer(0, before, after, counted)
    before[~counted], after[~counted] = math.nan, math.inf
    for own, found in zip(jump(1).layer(0, before, after, counted), expected, strict=True):
        assert torch.equal(own, found)


def test_cuts_into_micro_batches_add_up(generator: torch.Generator):
    layers, penalty = stack(generator), jump()
    x = torch.randn(7, 5, WIDTH, generator=generator)
    counted = torch.rand(7, 5, generator=generator) < 0.5
    counted[3] = False  # a part without any counted token
    whole_sums = walked(penalty, layers, x, counted)
    whole = penalty.total(whole_sums)
    tokens = counted.sum()
    cuts = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 7)]
    parts = [walked(penalty, layers, x[cut], counted[cut]) for cut in cuts]
    losses = [penalty.total(part, tokens=tokens).loss for part in parts]
    assert losses[2] == 0
    torch.testing.assert_close(sum(losses), whole.loss, rtol=1e-6, atol=0)
    for own, cut in zip(gradients(whole.loss, layers), gradients(sum(losses), layers), strict=True):
        torch.testing.assert_close(cut, own, rtol=1e-5, atol=1e-6 * float(own.abs().max()))
    for name, value in penalty.stats(combined(parts)).items():
        torch.testing.assert_close(value.float(), penalty.stats(whole_sums)[name], rtol=1e-6, atol=1e-5)


def test_sums_of_many_parts_keep_their_digits():
    """2^24 + 1 is no float32: the last part would be lost."""
    sizes = [(2.0**24, 5), (1.0, 2)]
    parts = [[LayerSums(torch.tensor([size, 1.0, 1.0, 1.0]), torch.tensor(count))] for size, count in sizes]
    whole = combined(parts)[0]
    assert whole.values[0].item() == 2**24 + 1 and whole.count == 7


@pytest.mark.parametrize("settings", [{}, {"hinge": True}, {"stop_grad": "prev"}])
def test_checkpointed_regions_change_no_bit(settings: dict, generator: torch.Generator):
    layers, penalty = stack(generator), jump(**settings)
    x = torch.randn(3, 7, WIDTH, generator=generator)
    plain, saved = (penalty.total(walked(penalty, layers, x, saved=saved)).loss for saved in (False, True))
    assert torch.equal(plain, saved)
    for own, recomputed in zip(gradients(plain, layers), gradients(saved, layers), strict=True):
        assert torch.equal(own, recomputed)


def test_strength_zero_trains_as_without(generator: torch.Generator):
    """Ten steps of a stack that asks `active` first end in the same bits."""
    x, y = (torch.randn(3, 7, WIDTH, generator=generator) for _ in range(2))
    ends = []
    for penalty in (None, jump(strength=0.0), jump(strength=0.5)):
        layers = stack(torch.Generator().manual_seed(3))
        optimiser = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=1e-2)
        for step in range(10):
            state, sums = x, []
            for place, layer in enumerate(layers):
                after = state + torch.tanh(layer(state))
                if penalty is not None and penalty.active(step):
                    sums.append(penalty.layer(place, state, after, None))
                state = after
            loss = (state - y).square().mean()
            if penalty is not None and sums:
                loss = loss + penalty.total(sums, step).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ends.append([loss.detach(), *(p.detach() for layer in layers for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1], strict=True))
    assert not torch.equal(ends[0][0], ends[2][0])


def test_training_with_it_lowers_the_turns(generator: torch.Generator):
    layers, penalty = stack(generator), jump(weights="uniform")
    x = torch.randn(3, 7, WIDTH, generator=generator)
    optimiser = torch.optim.AdamW([p for layer in layers for p in layer.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = penalty.total(walked(penalty, layers, x)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_positions_of_the_loss():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, -100]])
    causal = torch.tensor([[True, False, True, False], [False, True, False, False]])
    assert torch.equal(loss_positions(labels, causal=True), causal)
    assert torch.equal(loss_positions(labels, causal=False), labels != -100)
    real = torch.ones(2, 4, dtype=torch.bool)
    assert jump().counted(causal, real) is causal
    assert jump(penalty_positions="all").counted(causal, real) is real
    assert jump().counted(None, real) is real
    assert jump().counted(None, None) is None


def test_states_of_bfloat16_count_in_float32(generator: torch.Generator):
    before, after = (torch.randn(2, 3, WIDTH, generator=generator).bfloat16() for _ in range(2))
    sums = jump(1).layer(0, before, after, None)
    assert sums.values.dtype == torch.float32
    assert float(sums.values[0]) == pytest.approx(float(displacement(before, after).double().sum()), rel=1e-6)


def test_public_name():
    assert tx.penalties.Jump is Jump
    with pytest.raises(AttributeError, match="penalties are jump"):
        _ = tx.penalties.Leap
