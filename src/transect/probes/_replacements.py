"""What takes the place of an ablated part: zeros, random weights, the mean, or a map fitted on other documents."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transect.metrics.angles import widened
from transect.metrics.ridge import Fit
from transect.probes._fits import Group
from transect.probes._trained import Approximator, TwoLinear
from transect.view import edits
from transect.view.randomise import randomise
from transect.view.sites import HALVES, Element
from transect.view.variants import Change
from transect.view.view import View

TRAINED = ("cosine_adam", "mse_adam", "relu_control", "two_linear")
METHODS = ("zero", "noise", "mean", "linear", *TRAINED)
FITTED = ("mean", "linear", *TRAINED)
_SCALED = ("cosine_adam", "relu_control", "two_linear")  # a cosine leaves the size of y* free


@dataclass(slots=True, eq=False)
class Replacement:
    """What is fitted for one part of one layer: the mean output, a ridge map, trained approximators and their scale.

    For a whole layer the mean is that of its update, so that the residual stays.
    """

    element: Element
    methods: tuple[str, ...]
    whole_layer: bool
    total: Tensor | None = None  # [e] float64
    rows: int = 0
    group: Group | None = None
    trained: dict[str, Approximator] = field(default_factory=dict)
    products: dict[str, Tensor] = field(default_factory=dict)  # [2] sums of <y, y*> and <y*, y*>

    def __post_init__(self) -> None:
        if set(self.methods) - {"zero", "noise", "mean"}:
            self.group = Group(self.element.source, (self.element.target,), weighted=False)

    def add(self, phase: str, x: Tensor, y: Tensor) -> None:
        """Fit and tune rows."""
        x, y = widened(x), widened(y)
        gained = (y - x if self.whole_layer else y).sum(0, dtype=torch.float64)
        self.total = gained if self.total is None else self.total + gained
        self.rows += len(y)
        if self.group is not None:
            self.group.add(phase, x, [y])

    def solve(self, dtype: torch.dtype, seed: int) -> None:
        """Solve the ridge map and start the approximators: linear ones from it, the others from random weights."""
        if self.group is None or not self.group.filled:
            return
        self.group.solve(None, dtype)
        if not self.group.fits:
            return
        fit = self.group.fits[0]
        assert isinstance(fit, Fit)
        sizes = (fit.weight.shape[0], fit.weight.shape[1])
        for method in (name for name in self.methods if name in TRAINED):
            if method == "two_linear":
                self.trained[method] = TwoLinear.fresh(sizes, fit.weight, seed)
            elif method == "relu_control":
                self.trained[method] = Approximator.truncated_normal(method, sizes, fit.weight, seed)
            else:
                bias = fit.mean_y - fit.mean_x @ fit.weight
                self.trained[method] = Approximator(method, fit.weight.clone(), bias)

    def train(self, x: Tensor, y: Tensor, last: bool) -> None:
        """One step of each approximator; in the last epoch their scale is found in place of it."""
        x, y = widened(x), widened(y)
        for method, approximator in self.trained.items():
            if not last:
                approximator.step(x, y)
            elif method in _SCALED:
                out = approximator(x).detach().double()
                found = torch.stack([(y.double() * out).sum(), out.square().sum()])
                self.products[method] = self.products.get(method, torch.zeros_like(found)) + found

    def reason(self, method: str) -> str | None:
        """Why there is nothing to put in place; None when there is."""
        if method == "mean" and not self.rows:
            return "no fit token came by"
        if method == "linear" and (self.group is None or not self.group.fits):
            return "the part's input is the same for every fit token"
        return "the part's input is the same for every fit token" if method in TRAINED and not self.trained else None

    def predict(self, method: str, x: Tensor) -> Tensor:
        """The part's replacement output [batch, positions, e] for its input [batch, positions, d]."""
        if method == "mean":
            assert self.total is not None
            mean = (self.total / self.rows).to(x.dtype)
            return x + mean if self.whole_layer else mean.expand(*x.shape[:2], -1)
        flat = widened(x).flatten(0, 1)
        if method == "linear":
            assert self.group is not None
            fit = self.group.fits[0]
            out = fit(flat)
        else:
            out = self.trained[method](flat).detach()
            if method in self.products:
                product, square = self.products[method].tolist()
                out = out * (product / square if square else 0.0)
        return out.to(x.dtype).unflatten(0, x.shape[:2])

    def head_mean(self, head: int, heads: int) -> Tensor:
        """The mean of one head's slice of `heads_out`."""
        assert self.total is not None
        return (self.total / self.rows).unflatten(0, (heads, -1))[head]

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {
            "total": self.total,
            "rows": self.rows,
            "group": self.group and self.group.pack(),
            "trained": {name: approximator.pack() for name, approximator in self.trained.items()},
            "products": dict(self.products),
        }

    def unpack(self, packed: dict) -> None:
        """Take up what `pack` gave."""
        self.total, self.rows, self.products = packed["total"], packed["rows"], packed["products"]
        if self.group is not None:
            self.group.unpack(packed["group"])
        for name, parts in packed["trained"].items():
            kind = TwoLinear if name == "two_linear" else Approximator
            self.trained[name] = kind.unpack(name, parts)


def change(part: str, head: int | None, method: str, known: Replacement | None, seed: int) -> Change:
    """The change that ablates one part (of one head, with `head`) of the layer it is made in."""
    name = f"{method} {part}" + ("" if head is None else f" {head}")

    def make(view: View, place: int) -> AbstractContextManager[None]:
        if method == "noise":
            return randomise(view, part, place, seed)
        if method == "zero":
            if part in HALVES or part == "head":
                return edits.remove(view, part, place, head)
            width = view.site_width(place, _TARGETS[part])
            return edits.replace(view, part, place, lambda x: x.new_zeros(*x.shape[:2], width))
        fitted = known
        assert fitted is not None
        if head is not None:
            return edits.remove(view, "head", place, head, fill=fitted.head_mean(head, view.heads(place)))
        return edits.replace(view, part, place, lambda x: fitted.predict(method, x))

    return Change(name, make)


_TARGETS = {"ffn_up": "ffn_hidden", "attn_heads": "heads_out"}
