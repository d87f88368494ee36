"""Linear probe: how well a linear map reads labels from the states of each layer, which stay as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from transect.errors import InputError
from transect.results import Row
from transect.tasks._classifier import pooled
from transect.tasks._grading import Grader
from transect.tasks._labelled import LabelledTask, Parts
from transect.tasks._logistic import Fit, Regression, Scaler
from transect.tasks._sequences import Coded, Padded, Tokens, coded, groups, padded, states
from transect.tasks.base import Subject
from transect.view.capture import Seen, stream
from transect.view.sites import NEXT
from transect.view.view import View

POOLS = ("mean", "first", "last")


@dataclass(frozen=True, kw_only=True)
class LinearProbe(LabelledTask):
    """Accuracy and macro F1 of a logistic regression on the states of each layer, resid[0] to resid[L].

    A text is the mean of its states over the tokens that the tokenizer did not add, or the state of its first or last
    token, each coordinate scaled to mean 0 and variance 1 by training. ridges: strengths of the L2 penalty; layer by
    layer the one with the highest accuracy on the held-out part counts, of equal ones that with the lowest loss.
    data: a set of kind `labelled`. layers: `all`, or which of 0 to L; resid[L] is the state before a final norm.
    Rows: by layer, part says the ridge; variant `majority`, always the most frequent label of training.
    Range and unit: 0 to 1. Errors are over items.
    Source: Alain and Bengio, arXiv 1610.01644.
    Raises: InputError for texts without labels, a single class, a label of the test that training has not, and layers
    that are not there.
    Cost: one forward pass over all texts; a fit for each layer and
    ridge, some tens of products with the training vectors; memory of a vector for each text and layer.
    """

    title: ClassVar[str] = "Linear probe by layer"
    source: ClassVar[str] = "arXiv 1610.01644"
    needs_head: ClassVar[bool] = False

    layers: Literal["all"] | tuple[int, ...] = "all"
    pool: str = "mean"
    ridges: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in POOLS:
            raise InputError(f"linear_probe.pool is {self.pool!r}; allowed are {', '.join(POOLS)}")
        if not self.ridges or not min(self.ridges) > 0:
            raise InputError(f"linear_probe.ridges is {list(self.ridges)}; give strengths above 0")

    def check(self, subject: Subject) -> None:
        self.tokens(subject.view)
        self._layers(subject.view)
        self._parts(subject)

    def rows(self, subject: Subject) -> Iterator[Row]:
        view, parts = subject.view, self._parts(subject)
        length = self.tokens(subject.view)
        training, held_out, test = (
            coded(view, examples, parts.classes, length) for examples in (parts.training, parts.held_out, parts.test)
        )
        layers = self._layers(view)
        vectors = self._vectors(subject, (training, held_out, test), layers)
        grader = Grader(test, Row(metric="", value=0.0, unit="1", domain=self.label, split=self.test), subject.seed)
        for layer, (x, y, z) in zip(layers, zip(*vectors, strict=True), strict=True):
            ridge, found, scaler = self._fitted(x, training, y, held_out)
            named = {"layer": layer, "site": "resid", "part": f"ridge {ridge:g}"}
            predicted = found.logits(scaler(z)).argmax(1).numpy()
            for row in grader.rows(predicted, **named):
                yield row if found.converged else row.missing("the fit did not come to its end; give higher ridges")
        majority = np.full(len(test), parts.classes.index(parts.majority))
        yield from grader.rows(majority, variant="majority")
        yield from self.left_out_rows(parts)

    def _parts(self, subject: Subject) -> Parts:
        parts = self.parts(subject)
        if not parts.classes:
            raise InputError(
                f"{self.data} is a set of options, and linear_probe reads classes; give fine_tuning such sets"
            )
        return parts

    def _layers(self, view: View) -> tuple[int, ...]:
        if self.layers == "all":
            return tuple(range(view.num_layers + 1))
        for layer in self.layers:
            if not 0 <= layer <= view.num_layers:
                raise InputError(f"linear_probe.layers has {layer}; {view.name} has resid 0 to {view.num_layers}")
        return tuple(dict.fromkeys(self.layers))

    def _vectors(self, subject: Subject, parts: tuple[Coded, ...], layers: tuple[int, ...]) -> list[Tensor]:
        """Of each part [layers, items, width] float64, in one pass over all texts."""
        items = [sequence for part in parts for sequence in part.sequences]
        made = _vectors(subject, items, layers, self.pool)
        if not bool(torch.isfinite(made).all()):
            raise InputError(
                f"{subject.view.name} gives NaN or infinity on these texts; check the weights or use float32"
            )
        return list(made.split([len(part) for part in parts], dim=1))

    def _fitted(self, x: Tensor, training: Coded, held: Tensor, held_out: Coded) -> tuple[float, Fit, Scaler]:
        """The best ridge, its fit and the scaling before it."""
        scaler = Scaler.of(x)
        others, asked = scaler(held), torch.from_numpy(held_out.labels)
        regression = Regression(scaler(x), torch.from_numpy(training.labels), training.classes)
        best: tuple[tuple[float, float], float, Fit] | None = None
        found: Fit | None = None
        for ridge in sorted(self.ridges, reverse=True):  # from smooth to rough, each a good start for the next
            found = regression.fit(ridge, found)
            logits = found.logits(others)
            right = float((logits.argmax(1) == asked).double().mean())
            losses = torch.nn.functional.cross_entropy(logits, asked, reduction="none")
            score = right, -float(losses[losses.isfinite()].mean())  # infinite for a class that training lacks
            if best is None or score > best[0]:
                best = score, ridge, found
        assert best is not None
        return best[1], best[2], scaler


def _vectors(subject: Subject, items: list[tuple[Tokens, ...]], layers: tuple[int, ...], pool: str) -> Tensor:
    """One vector of each layer's states for each item [layers, items, width]."""
    view = subject.view
    last = view.num_layers
    made = torch.empty(len(layers), len(items), view.width, dtype=torch.float64)
    wanted: dict[int, list[str]] = {}
    for layer in layers:
        wanted.setdefault(min(layer, last - 1), []).append(NEXT if layer == last else "resid")
    done = 0
    for numbers in groups(items, subject.batch_size):
        batch = padded(view, [items[number] for number in numbers])

        def consume(layer: int, seen: Seen, batch: Padded = batch, numbers: list[int] = numbers) -> None:
            for site, tensor in seen.items():
                place = layers.index(last if site == NEXT else layer)
                made[place, numbers] = pooled(tensor.double(), batch, pool).cpu()

        with torch.inference_mode(), stream(view, wanted, consume):
            states(view, batch)
        done += len(numbers)
        subject.tick(done, len(items))
    return made
