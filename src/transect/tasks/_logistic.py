"""Multinomial logistic regression with an L2 penalty, to convergence in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-8
_ITERATIONS = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Scaler:
    """(x - mean) / spread for each coordinate; one that does not vary in training becomes 0."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Scaler":
        """By mean and standard deviation of x [n, width] float64; less than 1e-6 of its size is no variation."""
        mean, spread = x.mean(0), x.std(0, correction=0)
        varies = spread > 1e-6 * (mean.abs() + spread.max())
        return cls(mean, torch.where(varies, spread, torch.inf))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.spread


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """weights [classes, width] and bias [classes]; whether the fit came to its end.

    The biases of classes that were fitted sum to 0; that of a class without an item is -inf.
    """

    weights: Tensor
    bias: Tensor
    converged: bool

    def logits(self, x: Tensor) -> Tensor:
        """[n, classes] of x [n, width]."""
        return torch.addmm(self.bias, x, self.weights.T)


class Regression:
    """Fits of labels [n] int64 to x [n, width] float64, which share one decomposition x = U S V'.

    W lies in the span of the rows of x, so it is searched for as A V', with a column of A for each singular value,
    scaled so that the loss is about equally curved in all: few steps, whatever the condition of x.
    """

    def __init__(self, x: Tensor, labels: Tensor, classes: int) -> None:
        self.classes = classes
        self.present, self.labels = torch.unique(labels, return_inverse=True)
        left, self._values, self._right = torch.linalg.svd(x, full_matrices=False)
        self._inputs = left * self._values

    def fit(self, ridge: float, start: Fit | None = None) -> Fit:
        """argmin over W, b of the mean of -log softmax(W x + b)[label] + ridge/2 |W|^2; b is not penalised.

        start: another fit to begin at, which changes the way and not the end. It is scikit-learn's LogisticRegression
        with C = 1 / (n ridge) for three and more classes; for two, as W has a row for each, with C = 2 / (n ridge).
        By L-BFGS until no element of the gradient is above 1e-8. Cost: 4 n width classes operations a step.
        """
        curved = self._values.square() / (len(self.labels) * len(self.present))
        scale = (curved + ridge).rsqrt()
        inputs = self._inputs * scale
        free = [inputs.new_zeros(len(self.present), len(scale)), inputs.new_zeros(len(self.present))]
        if start is not None:
            free = [start.weights[self.present] @ self._right.T / scale, start.bias[self.present]]
        amounts, bias = (one.requires_grad_() for one in free)
        search = torch.optim.LBFGS(
            [amounts, bias],
            max_iter=_ITERATIONS,
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            search.zero_grad()
            with torch.enable_grad():
                value = torch.nn.functional.cross_entropy(inputs @ amounts.T + bias, self.labels)
                value = value + ridge / 2 * (amounts * scale).square().sum()
                value.backward()
            return value.detach()

        search.step(loss)
        loss()
        steepest = max(float(one.grad.abs().max()) for one in (amounts, bias) if one.grad is not None)
        weights = inputs.new_zeros(self.classes, self._right.shape[1])
        weights[self.present] = (amounts.detach() * scale) @ self._right
        biases = inputs.new_full((self.classes,), -torch.inf)
        biases[self.present] = bias.detach() - bias.detach().mean()
        return Fit(weights, biases, steepest <= 10 * TOLERANCE)
