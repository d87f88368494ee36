"""A few training steps by hand, in one process or in many: what each test compares."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from families import enliven
from transect.models.config import ModelConfig, merged
from transect.models.heads import TransectForCausalLM, TransectForMaskedLM
from transect.models.loss import LossRule
from transect.models.transformer import TransectPreTrainedModel
from transect.train.config import TrainConfig
from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.world import World

SEQUENCES, POSITIONS, MICRO = 8, 11, 2
CLIP = 3.0
IGNORED = -100


_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "width": 20,
    "layers": 3,
    "max_positions": 13,
    "attention": {"heads": 4, "kv_heads": 2, "head_width": 6},
    "ffn": {"kind": "dense", "width": 52},
}
_SPARSE = {"kind": "sparse", "blocks": 6, "active_blocks": 3, "block_size": 7}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "attention": {"bias": False, "qk_norm": "head"},
        "norm": {"type": "rms"},
        "ffn": {"gated": True, "activation": "silu", "bias": False},
        "head": {"tied": False},
        "residual": {"ffn": "learned"},
    },
    "bert": {
        "objective": "masked",
        "positions": "learned",
        "norm": {"layout": "post"},
        "embedding": {"norm": True, "types": 2},
        "head": {"transform": "gelu", "bias": True},
    },
    "avg_k": {"ffn": _SPARSE | {"selector": {"kind": "avg_k", "gate": "softmax_all", "balance": 0.1}}},
    "avg_k/eight": {"ffn": _SPARSE | {"blocks": 8, "selector": {"kind": "avg_k", "gate": "softmax_kept"}}},
    "caa": {"block": {"kind": "caa", "outer_ratio": 0.5}},
    "caa/masked": {"block": {"kind": "caa", "outer_ratio": 0.5, "direct_path": "masked", "empty_row": "sink"}},
    "shared": {"share": [0, 1], "layers": 5, "residual": {"attn": "learned"}},
}


class Ran(NamedTuple):
    """losses and norms [steps], weights after the last step, gradients of the last step by name."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


def made(name: str, dtype: torch.dtype = torch.float64, changes: dict[str, Any] | None = None) -> Any:
    """A model of `MODELS`, the same in every process."""
    settings = ModelConfig.parse(merged(merged(_BASE, MODELS[name]), changes or {}))
    model = (TransectForCausalLM if settings.causal else TransectForMaskedLM).make(settings).to(dtype)
    enliven(model, 0)
    return model


def placed(name: str, world: World, precision: str = "float64", changes: dict[str, Any] | None = None) -> Any:
    """The same in training, shared out."""
    model = made(name, torch.float64 if precision == "float64" else torch.float32, changes)
    world.place(model, TrainConfig.parse({"precision": precision}))
    return model.train()


def batch(step: int, causal: bool, vocabulary: int) -> tuple[Tensor, Tensor]:
    """ids and labels [SEQUENCES, POSITIONS]; the first micro-batch has nothing to predict, sequence i has i + 1."""
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(5, vocabulary, (SEQUENCES, POSITIONS), generator=source)
    labels = torch.full_like(ids, IGNORED)
    for row in range(MICRO, SEQUENCES):
        places = torch.randperm(POSITIONS - 1, generator=source)[: row + 1] + (1 if causal else 0)
        labels[row, places] = ids[row, places]
    return ids, labels


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: TransectPreTrainedModel, world: World, steps: int, clip: float = CLIP) -> Ran:
    """Steps of AdamW with micro-batches of `MICRO` sequences of this process's slice of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    settings = model.settings
    ran = Ran([], [], {}, {})
    for step in range(steps):
        ids, labels = batch(step, settings.causal, settings.vocab_size)
        tokens = int((labels != IGNORED).sum())
        mine = SEQUENCES // world.data_size
        own = slice(world.data_rank * mine, (world.data_rank + 1) * mine)
        parts = list(zip(ids[own].split(MICRO), labels[own].split(MICRO), strict=True))
        total = torch.zeros((), dtype=torch.float64)
        for place, (some, wanted) in enumerate(parts):
            world.last_micro_batch(model, place == len(parts) - 1)
            rule = LossRule(tokens=tokens, share=len(some) / SEQUENCES, z_loss=1e-3)
            loss = model(input_ids=some, labels=wanted, rule=rule).loss
            loss.backward()
            total += loss.detach()
        world.finish_gradients(model)
        ran.losses.append(float(world.sum(total)))
        ran.norms.append(float(world.clip(model, clip)))
        if step == steps - 1:
            kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            ran.gradients.update({name: whole(gradient) for name, gradient in kept.items()})
        optimizer.step()
        optimizer.zero_grad()
    ran.weights.update({name: whole(parameter) for name, parameter in model.named_parameters()})
    return ran


def alone(name: str, steps: int, precision: str = "float64", changes: dict[str, Any] | None = None) -> Ran:
    """The run in one process."""
    world = World.open(ParallelConfig(), "cpu")
    return train(placed(name, world, precision, changes), world, steps)


def differences(one: Ran, other: Ran) -> dict[str, float]:
    """The largest absolute difference of each part; an assertion fails where they are not of the same parameters."""
    assert one.weights.keys() == other.weights.keys()
    assert one.gradients.keys() == other.gradients.keys()
    found = {
        "losses": max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)),
        "norms": max(abs(a - b) for a, b in zip(one.norms, other.norms, strict=True)),
    }
    for part in ("weights", "gradients"):
        pairs = [(tensor, getattr(other, part)[name]) for name, tensor in getattr(one, part).items()]
        found[part] = max(float((a - b).abs().max()) for a, b in pairs)
    return found
