"""Maps that stand in the place of a part and go on learning with the model around them."""

import torch
from torch import Tensor, nn

from transect.probes._replacements import Replacement
from transect.view.view import View


class Learnt(nn.Module):
    """The replacement of one part by one method, its numbers as parameters; at first it gives what `predict` gave.

    The scale of maps trained on a cosine is a number that stays.
    """

    def __init__(self, known: Replacement, method: str, view: View) -> None:
        super().__init__()
        self.whole_layer, self.relu, self.scale = known.whole_layer, method == "relu_control", 1.0
        if method == "mean":
            assert known.total is not None
            maps, bias = [], known.total / known.rows
        elif method == "linear":
            assert known.group is not None
            fit = known.group.fits[0]
            maps, bias = [(fit.weight, None)], fit.mean_y - fit.mean_x @ fit.weight
        else:
            trained = known.trained[method]
            first = getattr(trained, "first", None)
            maps = [(trained.weight, None)] if first is None else [tuple(first), (trained.weight, None)]
            bias = trained.bias
            if method in known.products:
                product, square = known.products[method].tolist()
                self.scale = product / square if square else 0.0

        def own(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach().to(view.device, view.dtype, copy=True))

        self.weights = nn.ParameterList(own(weight) for weight, _ in maps)
        self.biases = nn.ParameterList(own(one) for one in [*(b for _, b in maps if b is not None), bias])

    def predict(self, method: str, x: Tensor) -> Tensor:
        """The part's output [batch, positions, e] for its input [batch, positions, d]."""
        if not len(self.weights):
            return x + self.biases[0] if self.whole_layer else self.biases[0].expand(*x.shape[:2], -1)
        out = x
        for weight, bias in zip(self.weights, self.biases, strict=True):
            out = torch.matmul(out, weight) + bias
        return (out.relu() if self.relu else out) * self.scale

    def head_mean(self, head: int, heads: int) -> Tensor:
        """The mean of one head's slice of `heads_out`."""
        return self.biases[0].unflatten(0, (heads, -1))[head]
