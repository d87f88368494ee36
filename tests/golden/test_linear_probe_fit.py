"""The logistic regression against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from transect.tasks._logistic import Regression, Scaler


def made(n: int, width: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, width)) @ np.diag(np.logspace(1, -3, width)) @ generator.normal(size=(width, width))
    scores = x @ generator.normal(size=(width, classes)) + 3 * generator.normal(size=(n, classes))
    return x, scores.argmax(1)


@pytest.mark.parametrize("ridge", [1.0, 0.03, 0.001])
@pytest.mark.parametrize(("n", "width", "classes"), [(101, 13, 5), (211, 7, 2), (29, 53, 3)])
def test_weights_and_predictions_are_scikit_learns(n: int, width: int, classes: int, ridge: float):
    raw, labels = made(n, width, classes, n)
    x = Scaler.of(torch.from_numpy(raw))(torch.from_numpy(raw))
    assert x.mean(0).abs().max() < 1e-12 and (x.std(0, correction=0) - 1).abs().max() < 1e-12
    found = Regression(x, torch.from_numpy(labels), classes).fit(ridge)
    strength = (1 if classes > 2 else 2) / (n * ridge)
    oracle = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000).fit(x.numpy(), labels)
    weights, bias = found.weights.numpy(), found.bias.numpy()
    if classes == 2:
        weights, bias = weights[1:] - weights[:1], bias[1:] - bias[:1]
    assert found.converged
    size = np.abs(oracle.coef_).max()
    assert np.abs(weights - oracle.coef_).max() < 1e-5 * size
    expected = oracle.intercept_ - (oracle.intercept_.mean() if classes > 2 else 0)
    assert np.abs(bias - expected).max() < 1e-5 * max(size, 1)
    assert np.array_equal(found.logits(x).argmax(1).numpy(), oracle.predict(x.numpy()))


def test_where_the_search_begins_changes_nothing():
    raw, labels = made(101, 13, 5, 101)
    x = torch.from_numpy(raw / raw.std())
    regression = Regression(x, torch.from_numpy(labels), 5)
    cold, warm = regression.fit(0.01), regression.fit(0.01, regression.fit(1.0))
    assert (cold.weights - warm.weights).abs().max() < 1e-6 * cold.weights.abs().max()


def test_a_coordinate_that_does_not_vary_in_training_says_nothing():
    x = torch.randn(41, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 17.3 + 1e-9 * x[:, 1]
    scaler = Scaler.of(x)
    assert (scaler(x)[:, 1] == 0).all()
    assert (scaler(x + 5)[:, 1] == 0).all()


def test_a_class_without_an_item_is_never_predicted_and_changes_no_other():
    raw, labels = made(101, 13, 5, 101)
    x = torch.from_numpy(raw / raw.std())
    shifted = torch.from_numpy(np.where(labels == 4, 5, labels))
    found, plain = Regression(x, shifted, 7).fit(0.1), Regression(x, torch.from_numpy(labels), 5).fit(0.1)
    assert found.converged
    assert torch.equal(found.weights[[0, 1, 2, 3, 5]], plain.weights)
    assert torch.isneginf(found.bias[[4, 6]]).all()
    assert not set(found.logits(x).argmax(1).tolist()) & {4, 6}
