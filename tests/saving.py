"""A tiny training run whose every bit is its seed's and its step's, to be saved and gone on with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from families import VOCAB
from own_models import own_model
from transect.train.balance import Loads
from transect.train.checkpoints import Checkpoints
from transect.train.config import CheckpointConfig, TrainConfig
from transect.train.optimizers.base import build
from transect.train.saved import model_state, optimizer_state

SEQUENCES, LENGTH = 5, 13


@dataclass(frozen=True)
class Alone:
    """What checkpoints need of a world of one process."""

    rank: int = 0
    size: int = 1
    is_main: bool = True


@dataclass
class TinyRun:
    """A model and its optimizer at a step; text and noise of a step follow from its number.

    With a world, all its processes read the same text.
    """

    name: str = "standard"
    optimizer: Any = "adamw"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    world: Any = None
    step: int = 0
    model: Any = field(init=False)
    opt: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = own_model(self.name, self.dtype, self.seed).train()
        if self.world is not None:
            self.world.place(self.model, TrainConfig())
        self.opt = build(TrainConfig(optimizer=self.optimizer).optimizer, self.model)

    def train(self, steps: int) -> "TinyRun":
        for _ in range(steps):
            torch.manual_seed(1000 + self.step)
            ids = torch.randint(5, VOCAB, (SEQUENCES, LENGTH))
            loads = Loads(self.model)
            if self.world is not None:
                self.world.last_micro_batch(self.model, True)
            made = self.model(input_ids=ids, labels=ids)
            made.loss.backward()
            if self.world is not None:
                self.world.finish_gradients(self.model)
            loads.add(made.stats or {})
            self.opt.step(0.9)
            loads.rebalance()
            self.opt.zero_grad()
            self.step += 1
        return self

    def progress(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.step * SEQUENCES * LENGTH, "seconds": 0.1 + 0.2, "loss": None}

    def save(self, checkpoints: Checkpoints, wait: bool = True) -> "TinyRun":
        checkpoints.save(self.model, self.opt, self.progress(), tokenizer(), wait=wait)
        return self

    def load(self, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
        progress = checkpoints.load(step, self.model, self.opt)
        self.step = progress["step"]
        return progress

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a checkpoint must keep."""
        found = model_state(self.model) | optimizer_state(self.model, self.opt.parts)
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def kept(run: Path, **config: Any) -> Checkpoints:
    """The checkpoints of a run of one process."""
    return Checkpoints(run / "checkpoints", CheckpointConfig(**config), Alone())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Every tensor of both, bit by bit, with its type."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each id."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", eos_token="w2")
