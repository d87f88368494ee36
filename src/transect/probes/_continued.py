"""Train a model under an edit: the edit stays open, what it put in place learns too, and everything is restored."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from transect.after_edit import Transfer
from transect.tasks._fine_tune import BETAS, EPS
from transect.tasks._frozen import chosen
from transect.train.config import ScheduleConfig
from transect.train.optimizers.adamw import AdamW
from transect.train.optimizers.base import build
from transect.train.schedule import factor
from transect.train.step import noise_seed
from transect.view import edits
from transect.view.variants import Change, Variant
from transect.view.view import View

DECAY = 0.01
CLIP = 1.0
WARMUP = 0.1
BACKWARD = 3  # a forward and a backward pass, in forward passes
_MAPS = "maps_of_edits"

Ticker = Callable[[int], None]
"""Hears of tokens that went through the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """An edited model to train: its edit, the maps the edit put in place, parts that do not move.

    reason: why it cannot be trained; None when it can.
    """

    variant: Variant
    maps: nn.ModuleList = field(default_factory=nn.ModuleList)
    frozen: tuple[str, ...] = ()
    reason: str | None = None


def intact(view: View) -> Course:
    """The unedited model."""
    return Course(Variant(tuple(range(view.num_layers))))


@contextmanager
def within(view: View, course: Course) -> Iterator[None]:
    """The view's model edited, with the edit's maps among its parameters."""
    order = course.variant.order
    with ExitStack() as stack:
        if order != tuple(range(view.num_layers)):
            stack.enter_context(edits.order(view, order))
        for layer, change in course.variant.changes:
            if layer in order:
                stack.enter_context(change.make(view, order.index(layer)))
        if len(course.maps):
            view.base.add_module(_MAPS, course.maps)
            stack.callback(delattr, view.base, _MAPS)
        yield


def tensors(view: View) -> list[Tensor]:
    """The weights and buffers of the model as it stands."""
    return [*view.model.parameters(), *view.model.buffers()]


def copies(view: View) -> list[Tensor]:
    """The values of `tensors`, in the machine's memory."""
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors(view)]


def load(view: View, values: list[Tensor]) -> None:
    """Give the unedited model the values that `copies` took of it."""
    with torch.no_grad():
        for tensor, value in zip(tensors(view), values, strict=True):
            tensor.copy_(value)


def with_weights(variant: Variant, owners: list[Tensor], values: list[Tensor]) -> Variant:
    """The variant with other values in some of the model's tensors; it shares no layer with the unedited model."""

    @contextmanager
    def make(view: View, place: int) -> Iterator[None]:
        before = [owner.data for owner in owners]
        try:
            for owner, value in zip(owners, values, strict=True):
                owner.data = value
            yield
        finally:
            for owner, value in zip(owners, before, strict=True):
                owner.data = value

    change = Change("trained weights", make)
    return Variant(variant.order, (*variant.changes, (variant.order[0], change)))


def descend(
    view: View,
    module: nn.Module,
    losses: Callable[[int], Iterator[tuple[Tensor, int]]],
    steps: int,
    transfer: Transfer,
    frozen: tuple[str, ...],
    seed: int,
    tick: Ticker,
) -> str | None:
    """Train a module, which holds the view's model, in place; returns why it failed, None when it did not.

    losses(step): the parts whose sum is the loss of a step, each with its tokens; each part's graph is gone before the
    next is asked for. Dropout follows from the seed and the step alone. Edits that are open stay part of the model.
    Parts of `transfer.freeze` that the edit leaves out need no holding.
    """
    parameters = list(module.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    frozen = (*frozen, *(part for part in transfer.freeze if _runs(view, part)))
    movable = {id(parameter) for parameter in chosen(view, frozen, norms_only=False)}
    held = {id(parameter) for parameter in view.base.parameters()} - movable
    devices = [view.device] if view.device.type == "cuda" else []
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) not in held)
        moving = [parameter for parameter in parameters if parameter.requires_grad]
        config = AdamW.Config(lr=transfer.lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
        optimizer = build(config, module)
        schedule = ScheduleConfig(kind="linear", warmup=round(WARMUP * steps), final=0.0)
        module.train()
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for step in range(steps):
                torch.manual_seed(noise_seed(seed, step, 0))
                for loss, tokens in losses(step):
                    loss.backward()
                    tick(BACKWARD * tokens)
                norm = nn.utils.clip_grad_norm_(moving, CLIP)
                if not bool(torch.isfinite(norm)):
                    return f"training at lr {transfer.lr:g} leaves finite numbers in step {step + 1}; lower transfer.lr"
                optimizer.step(factor(schedule, step, steps))
                optimizer.zero_grad()
        return None
    finally:
        module.eval()
        view.model.eval()
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)


def _runs(view: View, part: str) -> bool:
    number = part.partition(":")[2]
    return not number.isdecimal() or int(number) in view.executed
