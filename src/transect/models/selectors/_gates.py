"""What a chosen block's output is multiplied with, and scores in enough digits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transect.models.memory.backends.tables import wide_type

GateName = Literal["binary", "softmax_all", "softmax_kept", "sigmoid", "straight_through"]
GateScale = Literal["none", "times_b", "times_B"]


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 if that is what it was."""
    return x.to(wide_type(x.dtype))


def routed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b [tokens, blocks] in float32 or better, under autocast too: Switch's selective precision.

    Fewer digits make many scores equal, and ties go to the first blocks.
    """
    x = wide(x)
    with _whole(x.device.type):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def gate(kind: GateName, kept: Tensor, log_partition: Callable[[], Tensor]) -> Tensor:
    """The gate of each kept score [tokens, b], in float32 or better.

    binary 1; softmax_all exp(s_i) / sum over all blocks; softmax_kept the same over the kept ones; sigmoid of the
    score; straight_through 1 with the gradient of softmax_all (which gate it copies is ASSUMED 0.5). log_partition
    gives the log of the sum over all blocks [tokens], and is asked only where it is needed. Source: Avg-K, section 4.
    """
    kept = wide(kept)
    if kind == "binary":
        return torch.ones_like(kept)
    if kind == "softmax_kept":
        return kept.softmax(-1)
    if kind == "sigmoid":
        return kept.sigmoid()
    share = (kept - log_partition()[:, None]).exp()
    return share if kind == "softmax_all" else 1 + share - share.detach()


def gate_factor(scale: GateScale, active: int, blocks: int) -> float:
    """1, b or B: what brings a softmax over b or B nearly equal scores back to 1."""
    return {"none": 1.0, "times_b": float(active), "times_B": float(blocks)}[scale]


def jittered(x: Tensor, noise: float) -> Tensor:
    """x times numbers drawn evenly from 1 - noise to 1 + noise, as Switch does with its router's input."""
    return x * torch.empty_like(x).uniform_(1 - noise, 1 + noise) if noise else x


def _whole(device: str) -> AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
