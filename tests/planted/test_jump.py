"""Turns of known size are found, at the layer where they are and with the size they have."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import transect as tx
from families import FAMILIES
from plants import built, only, planted, text, turn, value, view_of
from transect.errors import InputError
from transect.probes.jump import Jump

LAYERS = 5
WIDTH = 40
ANGLES = (0.1, 0.0, 0.2, 1.3, 0.4)


def turning(angles: tuple[float, ...]) -> dict:
    """Each layer turns every state by its angle; angle 0 hands the state on."""

    def function(angle: float):
        matrix = turn(angle, WIDTH)
        return (lambda x: x) if angle == 0 else (lambda x: x @ matrix.to(x.dtype))

    return {("layer", layer): function(angle) for layer, angle in enumerate(angles)}


def by_parity(even: tuple[float, ...], odd: tuple[float, ...]) -> dict:
    """Tokens at even places turn by one list of angles, those at odd places by another."""

    def function(first: float, second: float):
        def use(x: Tensor) -> Tensor:
            place = (torch.arange(x.shape[1]) % 2 == 0)[None, :, None]
            return torch.where(place, x @ turn(first, WIDTH), x @ turn(second, WIDTH))

        return use

    return {("layer", layer): function(a, b) for layer, (a, b) in enumerate(zip(even, odd, strict=True))}


def psi(angle: float) -> float:
    return math.sin(angle / 2) ** 2


@pytest.mark.parametrize("name", ["gpt2", "bert", "gptj"])
def test_planted_turns_are_exact(name: str):
    view = view_of(name, layers=LAYERS)
    with planted(view, turning(ANGLES)):
        table = tx.measure(view, ["jump"], text(23)).where(variant="pre_norm/all")
    for layer, angle in enumerate(ANGLES):
        at = {"layer": layer, "layer_to": None}
        assert value(table, metric="displacement", **at) == pytest.approx(psi(angle), abs=1e-14)
        assert value(table, metric="block_influence", **at) == pytest.approx(2 * psi(angle), abs=1e-14)
        assert value(table, metric="update_ratio", **at) == pytest.approx(2 * math.sin(angle / 2), abs=1e-14)
        for other in range(layer + 1, LAYERS + 1):
            total = math.fmod(sum(ANGLES[layer:other]), 2 * math.pi)
            expected = min(total, 2 * math.pi - total) / math.pi
            assert value(table, metric="angular_distance", layer=layer, layer_to=other) == pytest.approx(
                expected, abs=1e-12
            )
    for metric in ("displacement", "block_influence", "update_ratio"):
        row = only(table, metric=metric, layer=1)
        assert (row.value, row.stderr, row.low, row.high) == (0, 0, 0, 0)
    assert max(range(LAYERS), key=lambda layer: value(table, metric="displacement", layer=layer)) == 3


def test_planted_jump_rate_is_exact():
    view = view_of("gpt2", layers=LAYERS)
    with planted(view, turning(ANGLES)):
        table = tx.measure(view, [Jump(zeta_from=(2, 3, 4, 5))], text(23)).where(variant="pre_norm/all")
    rises = np.maximum(np.diff([psi(angle) for angle in ANGLES]), 0)
    for start in (2, 3, 4, 5):
        row = only(table, metric="jump_rate", layer=start - 1)
        assert row.value == pytest.approx(100 * rises[start - 2 :].sum(), abs=1e-11)
        assert (row.layer_to, row.unit) == (LAYERS, "%")
    assert value(table, metric="jump_rate", layer=4) == 0  # the jump is before the last layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_that_do_nothing_move_exactly_nothing(dtype: torch.dtype):
    view = view_of("gpt2", dtype)
    with planted(view, {("layer", layer): lambda x: x for layer in range(2)}):
        table = tx.measure(view, ["jump"], text(23)).where(lambda row: row.variant.startswith("pre_norm"))
    moved = table.where(lambda row: row.metric != "stream_norm")
    assert len(moved) == 2 * (3 * 2 + 3 + 1)
    assert {row.value for row in moved} == {0.0}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_final_norm_alone_turns_the_state(name: str):
    family = FAMILIES[name]
    if name == "gpt2":  # LayerNorm of (3, 4, 5) repeated: Psi .4
        view, pattern, expected = built(family.but(n_embd=39, n_head=3), 2), [3.0, 4.0, 5.0] * 13, 0.4
        gain = torch.ones(39)
        view.final_norm.bias.data.zero_()
    else:  # RMS norm of (3, 4) repeated with gain (1, 2): Psi .020131
        view, pattern, expected = built(family, 2), [3.0, 4.0] * 20, 0.020131
        gain = torch.tensor([1.0, 2.0] * 20)
    view.final_norm.weight.data.copy_(gain)
    state = torch.tensor(pattern, dtype=torch.float64)
    with planted(view, {("layer", layer): lambda x: state.expand_as(x).clone() for layer in range(2)}):
        table = tx.measure(view, [Jump(positions=("all",))], text(23)).where(metric="displacement", layer=1)
    assert value(table, variant="pre_norm/all") == 0
    assert value(table, variant="post_norm/all") == pytest.approx(expected, abs=1e-6)


def test_positions_count_the_right_tokens():
    data = text(23)
    sequences, tokens = data.num_sequences, data.num_tokens
    single = int((data.lengths == 1).sum())
    assert single > 0  # of a sequence with one token nothing is left without the first

    def flip(x: Tensor) -> Tensor:
        """The first token alone turns round, and is huge."""
        return torch.cat([-1e6 * x[:, :1], x[:, 1:]], dim=1)

    view = view_of("gpt2")
    functions = {("layer", 0): flip, ("layer", 1): lambda x: x}
    with planted(view, functions):
        probe = Jump(positions=("all", "skip_first", "last_only"))
        table = tx.measure(view, [probe], data, batch_size=5).where(metric="displacement", layer=0)
    expected = {
        "all": (sequences / tokens, tokens),
        "skip_first": (0.0, tokens - sequences),
        "last_only": (single / sequences, sequences),
    }
    for name, (number, count) in expected.items():
        row = only(table, variant=f"pre_norm/{name}")
        assert (row.value, row.n) == (pytest.approx(number, abs=1e-12), count)


def test_no_token_left_is_an_empty_row():
    data = tx.data.from_tokens([[token] for token in range(5, 34)])
    table = tx.measure(view_of("bert"), [Jump(positions=("skip_first",))], data)
    assert [(row.metric, row.value) for row in table] == [("displacement", None)]
    assert "no token" in table.rows[0].reason


@pytest.mark.parametrize(("average", "expected"), [("mean_then_zeta", 0.0), ("zeta_then_mean", 10.0)])
def test_average(average: str, expected: float):
    data = tx.data.from_tokens(torch.randint(5, 97, (23, 8), generator=torch.Generator().manual_seed(0)))
    small, large = (2 * math.asin(math.sqrt(share)) for share in (0.1, 0.3))
    view = view_of("gpt2", layers=2)
    with planted(view, by_parity((small, large), (large, small))):
        table = tx.measure(view, [Jump(average=average)], data).where(variant="pre_norm/all")
    assert value(table, metric="jump_rate") == pytest.approx(expected, abs=1e-10)
    assert value(table, metric="displacement", layer=0) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "function"),
    [("half_one_minus_cos", psi), ("one_minus_cos", lambda a: 2 * psi(a)), ("arccos_over_pi", lambda a: a / math.pi)],
)
def test_displacement_conventions(kind: str, function):
    view = view_of("gpt2", layers=LAYERS)
    with planted(view, turning(ANGLES)):
        table = tx.measure(view, [Jump(displacement=kind, zeta_from=(2,))], text(23)).where(variant="pre_norm/all")
    found = [value(table, metric="displacement", layer=layer) for layer in range(LAYERS)]
    expected = [function(angle) for angle in ANGLES]
    assert found == pytest.approx(expected, abs=1e-12)
    rate = 100 * np.maximum(np.diff(expected), 0).sum()
    assert value(table, metric="jump_rate") == pytest.approx(rate, abs=1e-10)
    assert value(table, metric="block_influence", layer=3) == pytest.approx(2 * psi(1.3), abs=1e-12)


def test_windows_can_be_left_out():
    view, data = view_of("gpt2"), text(23)
    with_windows, without = (tx.measure(view, [Jump(windows=on)], data) for on in (True, False))
    assert len(with_windows.where(metric="angular_distance")) == 2 * 2 * 3
    rest = with_windows.where(lambda row: row.metric != "angular_distance")
    assert [(row.metric, row.layer) for row in without] == [(row.metric, row.layer) for row in rest]
    assert [row.value for row in without] == pytest.approx([row.value for row in rest], rel=1e-12)


def test_default_starts():
    table = tx.measure(view_of("gpt2", layers=LAYERS), ["jump"], text(23)).where(
        metric="jump_rate", variant="pre_norm/all"
    )
    assert [row.layer + 1 for row in table] == [2, LAYERS - 1, LAYERS]
    assert [row.value for row in table] == sorted((row.value for row in table), reverse=True)


def test_one_layer_has_no_jump_rate():
    table = tx.measure(view_of("gpt2", layers=1), ["jump"], text(23))
    assert len(table.where(metric="jump_rate")) == 0
    assert 0 < value(table, metric="displacement", variant="pre_norm/all") < 1


@pytest.mark.parametrize("start", [1, 0, 3])
def test_a_start_without_a_layer_before_it_is_refused(start: int):
    with pytest.raises(InputError, match=f"zeta_from {start} is outside 2 to 2"):
        tx.measure(view_of("gpt2"), [Jump(zeta_from=(start,))], text(23))


@pytest.mark.parametrize(
    "options", [{"positions": ("first",)}, {"displacement": "cos"}, {"average": "median"}], ids=lambda o: next(iter(o))
)
def test_unknown_options_are_refused(options: dict):
    with pytest.raises(InputError, match=next(iter(options))):
        Jump(**options)


def test_zero_states_are_finite():
    view = view_of("gpt2")
    with planted(view, {("layer", 0): lambda x: x * 0}):
        table = tx.measure(view, ["jump"], text(23)).where(variant="pre_norm/all")
    assert value(table, metric="displacement", layer=0) == pytest.approx(0.25, abs=1e-12)
    assert value(table, metric="stream_norm", layer=1) == 0
