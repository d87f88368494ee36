"""Linear fits from streamed moments: the non-linearity paper's numbers, and NumPy and scikit-learn as oracles."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, layer_norm

from transect.metrics.linearity import insample_floor, normalized
from transect.metrics.moments import Moments
from transect.metrics.ridge import RIDGES, Fit, Solver, decompose, insample_r2, rcond_for
from transect.metrics.spectrum import mean_cosine, numeric_rank

WIDE = torch.float64
RCOND = rcond_for(WIDE)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=WIDE)


def moments(x: Tensor, y: Tensor, weights: Tensor | None = None, cuts: int = 1) -> Moments:
    """Moments added in `cuts` batches."""
    batches = list(
        zip(x.chunk(cuts), y.chunk(cuts), (None,) * cuts if weights is None else weights.chunk(cuts), strict=False)
    )
    total = Moments.start(batches[0][0], [batches[0][1]])
    for left, right, weight in batches:
        total.add(left, [right], weight)
    return total


def fitted(x: Tensor, y: Tensor, ridge: float = 0.0, weights: Tensor | None = None) -> Fit:
    return solved(moments(x, y, weights), ridge)


def solved(sums: Moments, ridge: float, target: int = 0) -> Fit:
    return Solver.of(sums, None, RCOND, WIDE)(target, ridge)


def insample(x: Tensor, y: Tensor) -> float | None:
    return insample_r2(moments(x, y), RCOND)[1][0]


def r2(fit: Fit, x: Tensor, y: Tensor, mean: Tensor | None = None) -> float:
    mean = y.mean(0) if mean is None else mean
    return float(1 - (y - fit(x)).square().sum() / (y - mean).square().sum())


def weight_of(y: Tensor) -> Tensor:
    return 1 / y.square().sum(1)


def intercept(fit: Fit) -> Tensor:
    return fit(torch.zeros(1, len(fit.mean_x), dtype=WIDE))[0]


# --- affine maps are exact


@pytest.mark.parametrize("weighted", [False, True])
def test_affine_map_scores_one(weighted: bool, generator: torch.Generator):
    x = normal(generator, 211, 13) * torch.logspace(-1, 1, 13, dtype=WIDE) + 2
    y = x @ normal(generator, 13, 7) + normal(generator, 7)
    fit = fitted(x[:149], y[:149], weights=weight_of(y[:149]) if weighted else None)
    assert r2(fit, x[149:], y[149:]) == pytest.approx(1, abs=1e-9)
    assert float(cosine_similarity(y[149:], fit(x[149:])).mean()) == pytest.approx(1, abs=1e-9)
    assert insample(x, y) == pytest.approx(1, abs=1e-9)


def test_identity_scores_one(generator: torch.Generator):
    x = normal(generator, 97, 11)
    assert r2(fitted(x[:61], x[:61]), x[61:], x[61:]) == pytest.approx(1, abs=1e-12)


def test_fitting_unit_targets_instead_of_weights_is_not_exact(generator: torch.Generator):
    x = normal(generator, 211, 5)
    y = x @ normal(generator, 5, 7) + normal(generator, 7)
    directions = y / y.norm(dim=1, keepdim=True)
    assert float(cosine_similarity(y, fitted(x, directions)(x)).mean()) < 0.999


# --- independent data


@pytest.mark.parametrize(
    ("rows", "width", "floor", "heldout", "slack"),
    [(1000, 256, 0.2563, -0.346, 0.03), (1000, 512, 0.5125, -1.056, 0.06), (2000, 512, 0.2561, -0.345, 0.02)],
)
def test_independent_gaussians(
    rows: int, width: int, floor: float, heldout: float, slack: float, generator: torch.Generator
):
    assert insample_floor(width, rows) == pytest.approx(floor, abs=5e-5)
    plain = []
    for _ in range(5):
        x, y = normal(generator, rows + 1009, width), normal(generator, rows + 1009, 53)
        fit_rows, tune_rows, score_rows = slice(0, rows), slice(rows, rows + 503), slice(rows + 503, None)
        fit, tune = moments(x[fit_rows], y[fit_rows]), moments(x[tune_rows], y[tune_rows])
        solver = Solver.of(fit, tune, RCOND, WIDE)
        assert insample_r2(fit, RCOND)[1][0] == pytest.approx(floor, abs=0.02)
        assert solver.spectrum.regular and insample_r2(fit, RCOND, regular=True)[1][0] == pytest.approx(
            insample_r2(fit, RCOND)[1][0], rel=1e-10
        )
        plain.append(r2(solver(0, 0.0), x[score_rows], y[score_rows]))
        tuned = solver(0, None)
        assert tuned.ridge == max(RIDGES)
        assert r2(tuned, x[score_rows], y[score_rows]) > -0.02
    assert np.mean(plain) == pytest.approx(heldout, abs=slack)
    assert max(plain) < 0.8 * heldout


# --- element-wise functions of Gaussians

TABLE = {
    #         R2      gamma   const   cone    A       B
    "relu": (0.7335, 0.9046, 0.5642, 0.3183, 0.8601, 0.5863),
    "gelu": (0.7233, 0.8804, 0.4326, 0.1871, 0.8528, 0.6932),
    "abs": (0.0, 0.7979, 0.7979, 0.6366, 0.4438, 0.1613),
    "square": (0.0, 0.5774, 0.5774, 0.3333, 0.3660, 0.2440),
}
FUNCTIONS = {"relu": torch.relu, "gelu": gelu, "abs": torch.abs, "square": torch.square}


@pytest.mark.parametrize("name", TABLE)
def test_elementwise_table(name: str, generator: torch.Generator):
    x = normal(generator, 20_000, 128)
    y = FUNCTIONS[name](x)
    fit_x, fit_y, x, y = x[:15_000], y[:15_000], x[15_000:], y[15_000:]
    weighted = fitted(fit_x, fit_y, weights=weight_of(fit_y))
    gamma = float(cosine_similarity(y, weighted(x)).mean())
    direction = (fit_y / fit_y.norm(dim=1, keepdim=True)).mean(0)
    constant = float(cosine_similarity(y, direction.expand_as(y)).mean())
    cone = float(mean_cosine(y))
    found = [
        r2(fitted(fit_x, fit_y), x, y),
        gamma,
        constant,
        cone,
        normalized(gamma, cone, "A"),
        normalized(gamma, cone, "B"),
    ]
    assert found == pytest.approx(TABLE[name], abs=0.015)
    if name in ("abs", "square"):  # no linear part: nothing beyond a constant, though A and B are far above 0
        assert gamma - constant == pytest.approx(0, abs=0.01)
        assert normalized(gamma, cone, "A") > 0.3 and normalized(gamma, cone, "B") > 0.15
    else:
        assert gamma - constant > 0.3


# --- a parabola by hand


def test_parabola():
    x = torch.arange(4, dtype=WIDE)[:, None]
    score = torch.tensor([[4.0], [5.0]], dtype=WIDE)
    fit = fitted(x, x**2)
    assert float(fit.weight) == pytest.approx(3, abs=1e-12)
    assert float(intercept(fit)) == pytest.approx(-1, abs=1e-12)
    assert insample(x, x**2) == pytest.approx(0.918367, abs=5e-7)
    assert r2(fit, score, score**2) == pytest.approx(-2.604938, abs=5e-7)
    assert r2(fit, score, score**2, mean=fit.mean_y) == pytest.approx(0.763945, abs=5e-7)
    ridge = fitted(x, x**2, ridge=1.0)
    assert (float(ridge.weight), float(intercept(ridge))) == pytest.approx((1.5, 1.25), abs=1e-12)


def test_weighted_parabola():
    x = torch.arange(4, dtype=WIDE)[:, None]
    y = x**2 + 1
    fit = fitted(x, y, weights=weight_of(y))
    assert (float(fit.weight), float(intercept(fit))) == pytest.approx((1.752498, 0.899308), abs=5e-7)


# --- oracles


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_ridge_is_scikit_learns(ridge: float, weighted: bool, generator: torch.Generator):
    x = normal(generator, 83, 11) @ normal(generator, 11, 11) + 3
    y = torch.tanh(x @ normal(generator, 11, 5)) + 2
    weights = weight_of(y) if weighted else None
    sums = moments(x, y, weights)
    alpha = ridge * float(torch.linalg.eigvalsh(sums.cxx).mean())
    oracle = Ridge(alpha=alpha, solver="cholesky").fit(
        x.numpy(), y.numpy(), None if weights is None else weights.numpy()
    )
    fit = solved(sums, ridge)
    np.testing.assert_allclose(fit.weight.T.numpy(), oracle.coef_, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(intercept(fit).numpy(), oracle.intercept_, rtol=1e-9, atol=1e-10)


def test_insample_is_least_squares_also_where_inputs_depend_on_each_other(generator: torch.Generator):
    x = normal(generator, 89, 7) @ normal(generator, 7, 13) + 5
    y = torch.sin(normal(generator, 89, 3) + x[:, :3])
    centred = (x - x.mean(0)).numpy()
    solution = np.linalg.lstsq(centred, (y - y.mean(0)).numpy(), rcond=1e-8)
    residual = (y - y.mean(0)).numpy() - centred @ solution[0]
    expected = 1 - np.square(residual).sum() / float((y - y.mean(0)).square().sum())
    assert insample(x, y) == pytest.approx(expected, abs=1e-10)
    assert decompose(moments(x, y), RCOND).rank == solution[2] == np.linalg.matrix_rank(centred, tol=1e-6) == 7


def brute_ridge(fit: Moments, x: Tensor, y: Tensor) -> float:
    """The choice from residuals themselves: the largest ridge within 1e-4 of the best R^2."""
    scores = {ridge: r2(solved(fit, ridge), x, y) for ridge in RIDGES}
    return max(ridge for ridge, score in scores.items() if score >= max(scores.values()) - 1e-4)


def test_ridge_path_chooses_what_the_residuals_choose(generator: torch.Generator):
    chosen = []
    for noise in (0.0, 0.03, 0.3, 1.0, 3.0, 10.0, 100.0):
        x = normal(generator, 167, 31) * torch.logspace(-2, 0, 31, dtype=WIDE) + 1
        y = x @ normal(generator, 31, 5) + noise * normal(generator, 167, 5)
        fit, tune = moments(x[:97], y[:97]), moments(x[97:], y[97:])
        chosen.append(Solver.of(fit, tune, RCOND, WIDE)(0, None).ridge)
        assert chosen[-1] == brute_ridge(fit, x[97:], y[97:])
    assert len(set(chosen)) >= 4  # the problems are of many kinds, so the choice means something
    assert Solver.of(fit, None, RCOND, WIDE)(0, None).ridge == 0
    assert chosen[0] < 1e-2 and chosen[-1] == max(RIDGES)


# --- moments


def numbers(sums: Moments) -> list[Tensor]:
    return [sums.cxx, sums.cxy(0), sums.cyy(0), sums.mean_x, sums.mean_y(0), sums.count]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_cuts_and_order_do_not_matter(offset: float, weighted: bool, generator: torch.Generator):
    x, y = normal(generator, 113, 17) + offset, normal(generator, 113, 5) - offset
    weights = torch.rand(113, generator=generator, dtype=WIDE) + 0.1 if weighted else torch.ones(113, dtype=WIDE)
    total = weights.sum()
    mean_x, mean_y = weights @ x / total, weights @ y / total
    plain = [
        ((x - mean_x) * weights[:, None]).T @ (x - mean_x),
        ((x - mean_x) * weights[:, None]).T @ (y - mean_y),
        weights @ (y - mean_y).square().sum(1),
        mean_x,
        mean_y,
        total,
    ]
    for cuts in (1, 2, 7, 113):
        order = torch.randperm(113, generator=generator)
        sums = moments(x[order], y[order], weights[order] if weighted else None, cuts)
        assert sums.rows == 113
        for found, expected in zip(numbers(sums), plain, strict=True):
            assert float((found - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


def test_gram_wider_than_a_block(generator: torch.Generator):
    x, y = normal(generator, 311, 521), normal(generator, 311, 3)
    centred = x - x.mean(0)
    torch.testing.assert_close(moments(x, y, cuts=3).cxx, centred.T @ centred, rtol=1e-10, atol=1e-9)


def test_float32_data_with_a_large_offset(generator: torch.Generator):
    x = (normal(generator, 997, 11) + 1e4).float()
    y = (x - 1e4) @ normal(generator, 11, 5).float()
    sums, wide = moments(x, y, cuts=13), moments(x.double(), y.double())
    assert sums.cxx.dtype == WIDE
    for found, expected in zip(numbers(sums), numbers(wide), strict=True):
        assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_merging_is_adding(generator: torch.Generator):
    x, y = normal(generator, 61, 7), normal(generator, 61, 3)
    whole = moments(x, y)
    first, second = Moments.empty(whole.shift_x, whole.shift_y), Moments.empty(whole.shift_x, whole.shift_y)
    first.add(x[:17], [y[:17]])
    second.add(x[17:], [y[17:]])
    first.merge(second)
    for found, expected in zip(numbers(first), numbers(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert first.rows == 61


def test_squared_error_from_moments_is_the_direct_one(generator: torch.Generator):
    x, y = normal(generator, 131, 11) + 2, normal(generator, 131, 5)
    y[:, 0] += x[:, 0] ** 2
    fit = fitted(x[:71], y[:71], ridge=0.1)
    score = moments(x[71:], y[71:], cuts=3)
    w = fit.weight
    bias = score.mean_y(0) - fit(score.mean_x[None])[0]
    sse = score.cyy(0) - 2 * (w * score.cxy(0)).sum() + (w * (score.cxx @ w)).sum() + score.count * bias.square().sum()
    assert float(sse) == pytest.approx(float((y[71:] - fit(x[71:])).square().sum()), rel=1e-10)


def test_several_targets_are_one_by_one(generator: torch.Generator):
    x, ys = normal(generator, 67, 7), [normal(generator, 67, 3), normal(generator, 67, 11)]
    both = Moments.start(x, ys)
    both.add(x, ys)
    for target, y in enumerate(ys):
        torch.testing.assert_close(solved(both, 0.1, target).weight, fitted(x, y, 0.1).weight)
        assert insample_r2(both, RCOND)[1][target] == pytest.approx(insample(x, y), abs=1e-12)


def test_packed_moments_go_on(generator: torch.Generator):
    x, y = normal(generator, 41, 5), normal(generator, 41, 3)
    sums = moments(x, y)
    twin = Moments(**sums.pack())
    for found, expected in zip(numbers(twin), numbers(sums), strict=True):
        assert torch.equal(found, expected)


# --- inputs without variance in some direction


def test_layer_norm_outputs_span_one_direction_less(generator: torch.Generator):
    x = layer_norm(normal(generator, 211, 13), (13,))
    y = normal(generator, 211, 7)
    sums = moments(x, y)
    spectrum = decompose(sums, RCOND)
    assert spectrum.rank == numeric_rank(spectrum.eigenvalues, RCOND) == 12
    for ridge in RIDGES:
        assert torch.isfinite(solved(sums, ridge).weight).all()
    linear = x @ normal(generator, 13, 7)
    assert r2(fitted(x[:131], linear[:131]), x[131:], linear[131:]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rows_have_no_spread(dtype: torch.dtype, generator: torch.Generator):
    row = torch.randn(1, 13, generator=generator, dtype=torch.float64).to(dtype)
    x, other = row.expand(97, 13).clone(), torch.randn(97, 13, generator=generator, dtype=torch.float64).to(dtype)
    rcond = rcond_for(dtype)
    for cuts in (1, 5):
        constant = moments(x, other, cuts=cuts)
        assert decompose(constant, rcond).rank == 0
        backwards = moments(other, x, cuts=cuts)
        assert insample_r2(backwards, rcond)[1] == [None]


def test_cut_follows_the_captured_dtype():
    assert rcond_for(torch.float64) == rcond_for(torch.float32) == 1e-10
    assert rcond_for(torch.bfloat16) == pytest.approx(4 * 2**-14)
    assert math.isclose(rcond_for(torch.float16), 4 * 2**-20)
