"""Derivatives of the activations, for back ends with a backward pass of their own."""

from collections.abc import Callable

import torch
from torch import Tensor

from transect.models.activations import ACTIVATIONS


def backward_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(gradient of f(z), z) -> gradient of z, for the activation of that name."""
    return _BACKWARD.get(name) or _by_autograd(ACTIVATIONS[name])


def _gelu(gradient: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(gradient, z)


def _gelu_tanh(gradient: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(gradient, z, approximate="tanh")


def _relu(gradient: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, z, 0)


def _relu2(gradient: Tensor, z: Tensor) -> Tensor:
    return z.relu().mul_(gradient).mul_(2)


def _silu(gradient: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(gradient, z)


def _identity(gradient: Tensor, z: Tensor) -> Tensor:
    return gradient


_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "silu": _silu,
    "identity": _identity,
}


def _by_autograd(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(gradient: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            source = z.detach().requires_grad_()
            return torch.autograd.grad(function(source), source, gradient)[0]

    return backward
