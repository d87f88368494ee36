"""One step: micro-batches forward and backward, gradients summed over processes, clipped, applied unless not finite."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from transect.data.hashing import splitmix64
from transect.data.samples import TrainBatch
from transect.models.build import LanguageModel
from transect.models.loss import LossRule
from transect.train.balance import Loads
from transect.train.config import TrainConfig
from transect.train.distributed.world import World
from transect.train.meters import gradient_norms
from transect.train.optimizers.base import Optimizer


@dataclass(frozen=True, slots=True, eq=False)
class Done:
    """What one step came to, over all processes.

    losses: the parts of the loss by name, in nats, weights included; norm: of the gradient, before clipping; applied:
    False for a step that was skipped because a loss or the gradient was not finite; loads: blocks chosen, by layer.
    norms: of the gradient by part of the model, of a step that is watched.
    """

    losses: dict[str, float]
    norm: float
    applied: bool
    loads: Loads
    norms: dict[str, float]

    @property
    def total(self) -> float:
        """The loss that was differentiated."""
        return sum(self.losses.values())


class Stepper:
    """Takes steps; keeps nothing of them but the model and the optimizer."""

    def __init__(self, model: LanguageModel, optimizer: Optimizer, world: World, config: TrainConfig) -> None:
        self.model, self.optimizer, self.world, self.config = model, optimizer, world, config

    def take(self, step: int, first: int, batch: TrainBatch, factor: float, watched: bool) -> Done:
        """Step number `step`, counted from 0, on this process' samples, of which the run's `first` is the first.

        The loss is a mean over all predicted tokens of the step, whatever the micro-batches and processes.
        """
        world, model = self.world, self.model
        model.train()
        counted = world.sum(torch.tensor([batch.predicted, real_tokens(batch)], device=world.device)).tolist()
        loads = Loads(model)
        parts: dict[str, Tensor] = {}
        pieces = list(micro_batches(batch, self.config.micro_batch))
        for number, (offset, piece) in enumerate(pieces):
            world.last_micro_batch(model, number == len(pieces) - 1)
            torch.manual_seed(noise_seed(self.config.seed, step, first + offset))
            rule = LossRule(
                tokens=counted[0],
                share=real_tokens(piece) / counted[1],
                chunk=self.config.loss_chunk,
                z_loss=self.config.z_loss,
            )
            with autocast(world.device, self.config.precision):
                made = model(**inputs(piece, world.device), step=step, rule=rule)
            made.loss.backward()
            loads.add(made.stats)
            for name, loss in made.losses.items():
                parts[name] = parts.get(name, 0) + loss.detach()
        world.finish_gradients(model)
        norms = gradient_norms(model) if watched else {}
        norm = float(world.clip(model, self.config.clip))
        names = sorted(parts)
        summed = world.sum(torch.stack([parts[name].double() for name in names])).tolist()
        losses = dict(zip(names, summed, strict=True))
        loads.sum(world)
        applied = bool(np.isfinite([norm, *losses.values()]).all())
        if applied:
            self.optimizer.step(factor)
            loads.rebalance()
        self.optimizer.zero_grad()
        return Done(losses, norm, applied, loads, norms)


def micro_batches(batch: TrainBatch, size: int | None) -> Iterator[tuple[int, TrainBatch]]:
    """The batch in pieces of at most `size` sequences, each with its place in the batch."""
    count = len(batch.ids)
    size = count if size is None else size
    if size >= count:
        yield 0, batch
        return
    for start in range(0, count, size):
        tensors = {
            field.name: value[start : start + size]
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        yield start, replace(batch, **tensors)


def inputs(batch: TrainBatch, device: torch.device) -> dict[str, Tensor]:
    """What the model's heads call the parts of a batch."""
    named = {
        "input_ids": batch.ids,
        "labels": batch.labels,
        "document_ids": batch.document_ids,
        "token_type_ids": batch.token_type_ids,
        "next_sentence_label": batch.next_sentence_label,
        "attention_mask": batch.attention_mask,
    }
    return {name: value.to(device, non_blocking=True) for name, value in named.items() if value is not None}


def real_tokens(batch: TrainBatch) -> int:
    """Tokens that are not padding."""
    return batch.ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())


def noise_seed(seed: int, step: int, sample: int) -> int:
    """What dropout and noise are drawn from, so that they follow from the run's seed and the place in the run alone."""
    state = np.array([seed % 2**64], dtype=np.uint64)
    for number in (step, sample):
        state = splitmix64(state ^ np.uint64(number))
    return int(state[0] >> np.uint64(1))


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Products in bfloat16 where that is asked for; weights keep their type."""
    if precision != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
