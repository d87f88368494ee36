"""Train a view's model and a classifier on labelled sequences, in place and under whatever edits are open."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from transect.data.order import Purpose, draws
from transect.errors import InputError
from transect.metrics.angles import widened
from transect.tasks._classifier import POOLS, Classifier, Pool
from transect.tasks._frozen import chosen
from transect.tasks._sequences import Coded, groups, padded
from transect.tasks.base import Tick, silent
from transect.train.config import ScheduleConfig
from transect.train.optimizers.adamw import AdamW
from transect.train.optimizers.base import Optimizer, build
from transect.train.schedule import factor
from transect.train.step import noise_seed
from transect.view.view import View

BETAS = (0.9, 0.999)
EPS = 1e-6
_TRAINABLE = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is fine-tuned: AdamW with betas (0.9, 0.999) and eps 1e-6, without decay of biases and norms.

    The rate rises from 0 in the first `warmup` of all steps and falls in a line to 0 at the end of `epochs`. clip:
    largest norm of the gradient, or none. dropout: before the classifier's map; the model keeps its own. pool: see
    `Classifier`. adapters: the width of bottlenecks behind every sub-layer, which are then trained with the norms in
    place of all weights. patience: so many epochs in a row that are not better on the held-out part end the training.
    Defaults are those of papers/ffn_wider_cea, X8, and of papers/nonlinearity_commutativity, section 5.
    """

    lr: float = 2e-5
    epochs: int = 10
    batch_size: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float | None = 1.0
    dropout: float = 0.1
    pool: Pool = "auto"
    adapters: int | None = None
    patience: int | None = 3

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        ranges = (
            ("lr", self.lr > 0, "above 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("warmup", 0 <= self.warmup <= 1, "a share of all steps, 0 to 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip", self.clip is None or self.clip > 0, "above 0, or none"),
            ("dropout", 0 <= self.dropout < 1, "from 0 to below 1"),
            ("pool", self.pool in POOLS, f"one of {', '.join(POOLS)}"),
            ("adapters", self.adapters is None or self.adapters >= 1, "a width of at least 1, or none"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1 epoch, or none"),
        )
        for name, fits, allowed in ranges:
            if not fits:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be {allowed}")


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """A trained classifier on a model that stands at the weights of its best epoch.

    epoch: which, counted from 1; accuracy and nats (mean cross-entropy) on the held-out part by epoch, empty without
    one. Only valid while the model has the weights and the edits it was trained with.
    """

    classifier: Classifier
    epoch: int
    accuracy: tuple[float, ...]
    nats: tuple[float, ...]

    def predict(self, view: View, items: Coded, batch_size: int = 32) -> np.ndarray:
        """The likeliest class or option of each item [items] int64; batch_size changes nothing but rounding."""
        return _scored(view, self.classifier, items, batch_size)[0]


def refusal(view: View) -> str | None:
    """Why the model of a view cannot be trained further; None where it can."""
    kinds = {parameter.dtype for parameter in view.base.parameters()}
    wrong = sorted(str(kind).removeprefix("torch.") for kind in kinds - set(_TRAINABLE))
    if wrong:
        return (
            f"{view.name} has {wrong[0]} weights, and steps of fine-tuning are too small for them; load it in float32"
        )
    return None


@contextmanager
def restored(view: View) -> Iterator[None]:
    """Give the view's model its weights and buffers back when the block ends, bit for bit, whatever ended it.

    Cost: memory for a second copy of them.
    """
    tensors = [*view.model.parameters(), *view.model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def fine_tune(
    view: View,
    training: Coded,
    held_out: Coded | None,
    settings: Settings,
    seed: int,
    frozen: Sequence[str] = (),
    tick: Tick = silent,
) -> Tuned:
    """Train the view's model in place with a new classifier, and leave it at its best epoch on the held-out part.

    The best epoch is that of the highest held-out accuracy, of equal ones that of the lower loss; without a held-out
    part it is the last. Edits that are open stay part of the model; layers are numbered as loaded. frozen: parts whose
    weights do not move, `attn:3`, `ffn:3`, `ffn2:3` (their maps), `layer:3` (all of it), `embeddings` (lookup tables).
    The order of items, dropout and new weights follow from the seed alone: the same seed gives the same bits on one
    machine. tick hears of steps. Callers wrap it in `restored` to have the old weights back.
    Raises InputError for settings out of range, an unknown part, weights that cannot be trained, and a loss that is not
    finite. Cost: three forward passes' work for a training item and epoch; memory of AdamW and of one more copy of the
    trained weights.
    """
    settings.check()
    reason = refusal(view)
    if reason is not None:
        raise InputError(reason)
    classifier = Classifier(view, training.classes, settings.pool, settings.dropout, settings.adapters, seed)
    flags = [(parameter, parameter.requires_grad) for parameter in view.model.parameters()]
    moving = {id(one) for one in chosen(view, frozen, norms_only=settings.adapters is not None)}
    devices = [view.device] if view.device.type == "cuda" else []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in moving)
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            return _Training(view, classifier, training, held_out, settings, seed).run(tick)
    finally:
        view.model.eval()
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)


class _Training:
    """One run; it stands at a step."""

    def __init__(
        self, view: View, classifier: Classifier, training: Coded, held_out: Coded | None, settings: Settings, seed: int
    ) -> None:
        self.view, self.classifier, self.seed = view, classifier, seed
        self.training, self.held_out, self.settings = training, held_out, settings
        whole = nn.ModuleDict({"model": view.base, "classifier": classifier})
        self.parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        config = AdamW.Config(lr=settings.lr, betas=BETAS, eps=EPS, weight_decay=settings.weight_decay)
        self.optimizer: Optimizer = build(config, whole)
        self.per_epoch = -(-len(training) // settings.batch_size)
        self.steps = self.per_epoch * settings.epochs
        self.schedule = ScheduleConfig(kind="linear", warmup=round(settings.warmup * self.steps), final=0.0)

    def run(self, tick: Tick) -> Tuned:
        """All epochs, or as many as patience allows."""
        scores: list[tuple[float, float]] = []  # accuracy, and the loss with its sign turned: the higher the better
        best, kept = 0, None
        for epoch in range(self.settings.epochs):
            self._epoch(epoch, tick)
            if self.held_out is None:
                best = epoch
                continue
            predicted, nats = _scored(self.view, self.classifier, self.held_out, self.settings.batch_size)
            scores.append((float((predicted == self.held_out.labels).mean()), -float(nats.mean())))
            if scores[epoch] > scores[best] or kept is None:
                best, kept = epoch, [parameter.detach().clone() for parameter in self.parameters]
            elif self.settings.patience is not None and epoch - best >= self.settings.patience:
                break
        if kept is not None:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)
        self.view.model.eval()
        self.classifier.eval()
        return Tuned(self.classifier, best + 1, tuple(a for a, _ in scores), tuple(-n for _, n in scores))

    def _epoch(self, epoch: int, tick: Tick) -> None:
        self.view.model.train()
        self.classifier.train()
        order = np.argsort(draws(self.seed, Purpose.ORDER, np.array([epoch]), np.arange(len(self.training))))
        for number in range(self.per_epoch):
            step, start = epoch * self.per_epoch + number, number * self.settings.batch_size
            torch.manual_seed(noise_seed(self.seed, step, start))
            self._step(step, order[start : start + self.settings.batch_size])
            tick(step + 1, self.steps)

    def _step(self, step: int, items: np.ndarray) -> None:
        logits = self.classifier(self.view, padded(self.view, [self.training.sequences[n] for n in items]))
        labels = torch.from_numpy(self.training.labels[items]).to(logits.device)
        loss = nn.functional.cross_entropy(widened(logits), labels)
        loss.backward()
        clip = torch.inf if self.settings.clip is None else self.settings.clip
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        if not bool(torch.isfinite(norm) & torch.isfinite(loss)):
            rate = self.settings.lr
            raise InputError(
                f"fine-tuning {self.view.name} at lr {rate:g} leaves finite numbers in step {step + 1}; lower lr"
            )
        self.optimizer.step(factor(self.schedule, step, self.steps))
        self.optimizer.zero_grad()


def _scored(view: View, classifier: Classifier, items: Coded, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest class or option of each item, and the cross-entropy of the right one in nats, [items] each."""
    view.model.eval()
    classifier.eval()
    predicted, nats = np.zeros(len(items), dtype=np.int64), np.zeros(len(items))
    for numbers in groups(items.sequences, batch_size):
        with torch.inference_mode():
            logits = classifier(view, padded(view, [items.sequences[n] for n in numbers]))
            labels = torch.from_numpy(items.labels[numbers]).to(logits.device)
            losses = nn.functional.cross_entropy(widened(logits), labels, reduction="none")
        predicted[numbers] = logits.argmax(1).cpu().numpy()
        nats[numbers] = losses.double().cpu().numpy()
    return predicted, nats
