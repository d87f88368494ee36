"""What edited models make of labelled texts: accuracy of a fine-tuned model under an edit, and trained under it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from transect.after_edit import Transfer
from transect.data.order import Purpose, draws
from transect.effects import Recovered, recovered
from transect.errors import InputError
from transect.metrics.angles import widened
from transect.metrics.errors import Error, bootstrap
from transect.probes._continued import BACKWARD, Course, Ticker, copies, descend, intact, load, within
from transect.probes.base import Setting
from transect.results import Row
from transect.tasks._classifier import Classifier
from transect.tasks._fine_tune import Tuned, restored
from transect.tasks._labelled import Example
from transect.tasks._sequences import Coded, coded, padded
from transect.view.view import View

DROPOUT = 0.1
_SAMPLE = 64  # texts whose lengths stand for all


@dataclass(slots=True, eq=False)
class LabelState:
    """The fine-tuned model, and which test items [2, cases + 1, items] are right: directly, and after training.

    The unedited model comes first; reasons say of which cases training failed.
    """

    training: Coded
    test: Coded
    right: Tensor
    weights: list[Tensor] = field(default_factory=list)
    classifier: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {name: getattr(self, name) for name in ("right", "weights", "classifier", "reasons")}


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Trainings on labelled texts. fresh: cases start from the model as it is, not from the fine-tuned one.

    direct: how many of the cases, the first ones, cost something without training.
    The unedited model that cases are compared with after training was trained from the same start, as long and on the
    same items in the same order.
    """

    transfer: Transfer
    setting: Setting
    cases: int
    direct: int
    fresh: bool

    def start(self, packed: dict | None) -> LabelState:
        """Nothing trained, or what a file holds."""
        view = self.setting.view
        training, test, classes = self.transfer.examples(view, self.setting.seed)
        learnt, asked = (coded(view, examples, classes, self.transfer.length) for examples in (training, test))
        if packed is not None:
            return LabelState(learnt, asked, **packed)
        return LabelState(learnt, asked, torch.zeros(2, self.cases + 1, len(test), dtype=torch.bool))

    def memory(self) -> int:
        """Six copies of the weights while one model is trained, and what errors are drawn from."""
        _, test, _ = self.transfer.examples(self.setting.view, self.setting.seed)
        weights = sum(parameter.nbytes for parameter in self.setting.view.model.parameters())
        return 6 * weights + 8 * (6 * self.cases + 9) * (len(test) + 1100)

    def trainings(self) -> tuple[int, ...]:
        """The first fine-tuning, and every case; tokens are foretold from a few texts."""
        view, transfer = self.setting.view, self.transfer
        training, test, classes = transfer.examples(view, self.setting.seed)
        learning = BACKWARD * transfer.epochs * _tokens(view, training, classes, transfer.length)
        asking = _tokens(view, test, classes, transfer.length)
        each = 2 * asking + learning if transfer.continued else asking
        return learning + asking, *(each for _ in range(self.cases + self._more))

    @property
    def _more(self) -> int:
        """Whether the unedited model has a second training of its own."""
        return int(self.transfer.continued and not self.fresh)

    def train(self, state: LabelState, number: int, course_of: Callable[[int], Course], tick: Ticker) -> None:
        """One training: the first fine-tuning, the unedited model's second one, or that of a case."""
        view = self.setting.view
        if number == 0:
            self._fine_tune(state, tick)
            return
        at = number - self._more
        course = course_of(at - 1) if at else intact(view)
        with self._fine_tuned(state) as classifier, within(view, course):
            state.right[0, at] = self._right(state, classifier, tick)
            if self.transfer.continued and not self.fresh:
                self._learn(state, at, course, classifier, tick)
        if self.transfer.continued and self.fresh:
            course = course_of(at - 1)
            with restored(view), within(view, course):
                self._learn(state, at, course, self._new(state), tick)

    def _fine_tune(self, state: LabelState, tick: Ticker) -> None:
        view = self.setting.view
        classifier = self._new(state)
        with restored(view):
            reason = self._descend(state, intact(view), classifier, 0, tick)
            if reason is not None:
                raise InputError(f"{view.name}: {reason}")
            state.right[0, 0] = self._right(state, classifier, tick)
            state.weights = copies(view)
        state.classifier = {name: one.detach().to("cpu", copy=True) for name, one in classifier.state_dict().items()}
        if self.fresh:
            state.right[1, 0] = state.right[0, 0]

    def _learn(self, state: LabelState, at: int, course: Course, classifier: Classifier, tick: Ticker) -> None:
        """Train under the edit that is open, and ask for the test."""
        first = 0 if self.fresh else self.transfer.epochs
        reason = course.reason or self._descend(state, course, classifier, first, tick)
        if reason is None:
            state.right[1, at] = self._right(state, classifier, tick)
        else:
            state.reasons[at] = reason

    @contextmanager
    def _fine_tuned(self, state: LabelState) -> Iterator[Classifier]:
        """The fine-tuned model with its classifier."""
        classifier = self._new(state)
        classifier.load_state_dict(state.classifier)
        with restored(self.setting.view):
            load(self.setting.view, state.weights)
            yield classifier

    def _new(self, state: LabelState) -> Classifier:
        return Classifier(self.setting.view, state.training.classes, dropout=DROPOUT, seed=self.setting.seed)

    def _right(self, state: LabelState, classifier: Classifier, tick: Ticker) -> Tensor:
        predicted = Tuned(classifier, 0, (), ()).predict(self.setting.view, state.test)
        tick(sum(_length(item) for item in state.test.sequences))
        return torch.from_numpy(predicted == state.test.labels)

    def _descend(
        self, state: LabelState, course: Course, classifier: Classifier, first: int, tick: Ticker
    ) -> str | None:
        """All epochs; `first` is the number of the first one, which says the order of items."""
        view, items, size = self.setting.view, state.training, self.transfer.batch_size
        per_epoch = -(-len(items) // size)

        def losses(step: int) -> Iterator[tuple[Tensor, int]]:
            epoch, place = divmod(step, per_epoch)
            key = draws(self.setting.seed, Purpose.ORDER, np.array([first + epoch]), np.arange(len(items)))
            chosen = np.argsort(key)[place * size : (place + 1) * size]
            sequences = [items.sequences[number] for number in chosen]
            logits = classifier(view, padded(view, sequences))
            labels = torch.from_numpy(items.labels[chosen]).to(logits.device)
            yield nn.functional.cross_entropy(widened(logits), labels), sum(map(_length, sequences))

        module = nn.ModuleDict({"model": view.base, "classifier": classifier})
        steps = per_epoch * self.transfer.epochs
        return descend(view, module, losses, steps, self.transfer, course.frozen, self.setting.seed + first, tick)

    def found(self, state: LabelState) -> list[tuple[str, "Accuracies"]]:
        """What the rows of each stage say, with what stands behind their variant."""
        wrong = (~state.right).double().permute(0, 2, 1).numpy()
        label, keys, seed = str(self.transfer.label), state.test.keys, self.setting.seed
        direct = Accuracies.of(wrong[0], keys, seed, label)
        if not self.transfer.continued:
            return [("", direct)]
        shares = recovered(wrong[0][:, : self.direct + 1], wrong[1][:, : self.direct + 1], keys, seed)
        continued = Accuracies.of(wrong[1], keys, seed, label)
        return [("", direct), ("/continued", replace(continued, shares=shares, reasons=state.reasons))]


@dataclass(frozen=True, slots=True, eq=False)
class Accuracies:
    """Accuracy and its change [cases + 1, 2], the unedited model first, with errors over test items."""

    values: np.ndarray
    errors: list[Error | None]
    items: int
    label: str
    shares: Recovered | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, wrong: np.ndarray, keys: np.ndarray, seed: int, label: str) -> "Accuracies":
        """From 1 where an item [items, cases + 1] is wrong."""

        def statistic(totals: np.ndarray) -> np.ndarray:
            right = 1 - totals / len(keys)
            return np.stack([right, right - right[:, :1]], axis=-1).reshape(len(totals), -1)

        values, errors = bootstrap(wrong, keys, statistic, seed)
        return cls(values.reshape(-1, 2), errors, len(keys), label)

    def rows(self, case: int | None, like: Row) -> Iterator[Row]:
        """The rows of one case; `like` holds its layers, its edit and how it is called."""
        at = 0 if case is None else case + 1
        like = replace(like, unit="1", n=self.items, documents=self.items, domain=self.label, split="test")
        for column, metric in enumerate(("accuracy", "accuracy_change")):
            row = replace(like, metric=metric)
            if at == 0 and metric != "accuracy":
                continue
            reason = self.reasons.get(at)
            error = self.errors[2 * at + column]
            yield row.measured(float(self.values[at, column]), error) if reason is None else row.missing(reason)
        if self.shares is not None and 0 < at <= self.shares.cases:
            yield self.shares.row(at, like, self.reasons.get(at))


def _length(item: tuple) -> int:
    return sum(len(tokens.ids) for tokens in item)


def _tokens(view: View, examples: list[Example], classes: tuple[str, ...], length: int) -> int:
    some = coded(view, examples[:_SAMPLE], classes, length).sequences
    return round(len(examples) * sum(map(_length, some)) / len(some))
