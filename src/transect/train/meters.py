"""What a training run is watched by: speed, use of the device, memory, sizes of gradients and of the stream."""

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from transect.models.budget import budget
from transect.models.config import ModelConfig
from transect.models.transformer import TransectPreTrainedModel, TrunkOutput
from transect.recipes.recipe import Recipe
from transect.train.distributed.world import World
from transect.train.peaks import device_peak


class Throughput:
    """Tokens per second over the last `window` steps. Only time inside steps counts, so that neither evaluation nor
    writing makes training look slow; a first step that compiles falls out of the window.

    seconds: inside steps, since the start.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self.seconds = 0.0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Around everything that a step of so many tokens takes; one that raises counts for nothing."""
        begin = self._clock()
        yield
        took = self._clock() - begin
        self.seconds += took
        self._steps.append((took, tokens))

    def per_second(self) -> float | None:
        """None before the first step, or where the clock stood still."""
        seconds = sum(took for took, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds > 0 else None


class Utilisation:
    """MFU: the model's FLOPs per second over those that the devices can do; 0 .. 1, dimensionless.

    flops: of a token, forward and backward, what `budget` counts: of sparse FFNs only the blocks that a token gets, of
    attention only the keys that it sees in one document as long as the sequence (packed ones see fewer), nothing that
    is recomputed, and the map to the vocabulary only at the `predicted` share of positions. peak: FLOP/s of all
    devices, or None, and then `reason` says why. Source: Chowdhery et al., arXiv 2204.02311, appendix B, which counts
    every key where attention is causal.
    """

    def __init__(
        self,
        model: ModelConfig,
        seq_len: int,
        device: torch.device,
        precision: str,
        devices: int = 1,
        predicted: float = 1.0,
        peak: float | None = None,
    ) -> None:
        """precision: that of products. peak: FLOP/s of one device, if the user says so."""
        cost = budget(model, seq_len)
        self.flops = cost.training_flops - 3 * (1 - predicted) * cost.part("head").flops
        known, self.reason = (peak, "") if peak is not None else device_peak(device, precision)
        self.peak = None if known is None else devices * known

    def of(self, tokens_per_second: float | None) -> float | None:
        """At so many tokens per second over all devices; None where the speed or the peak is not known."""
        if tokens_per_second is None or self.peak is None:
            return None
        return self.flops * tokens_per_second / self.peak


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors ever took on a GPU, or that this process ever took of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.([^.]+)")


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, float]:
    """L2 norm of the gradient by part: `layers.3.ffn`, `embeddings`, `final_norm`, `head`; parts without one left out.

    Call it on all processes, with whole gradients, before they are clipped. Cost: one pass over the gradients and one
    wait for the device; of sharded ones a sum over processes for each part. Layers that share weights have one norm.
    """
    found: dict[str, dict[object, list[Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            mesh = getattr(parameter.grad, "device_mesh", None)
            found.setdefault(_part(name), {}).setdefault(mesh, []).append(parameter.grad)
    norms = [_norm([_norm(gradients) for gradients in meshes.values()]) for meshes in found.values()]
    return dict(zip(found, torch.stack(norms).tolist(), strict=True)) if norms else {}


def _part(name: str) -> str:
    layer = _LAYER.search(name)
    return f"layers.{layer[1]}.{layer[2]}" if layer else name.removeprefix("model.").partition(".")[0]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm = get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class StreamNorms:
    """Inside the `with`, each forward pass of a model of ours adds to `sums`; its results stay the same.

    sums [L + 1, 2] float64: for each of resid[0..L] the sum of the L2 norms of real tokens' states, and their number;
    None before the first pass. Sums add up over passes and processes; the mean is `sums[:, 0] / sums[:, 1]`.
    The trunk is asked for its hidden states, and its layers have no hooks, so that compiled, sharded, recomputed and
    shared ones give the same. Cost: one pass over the streams, which then stay until the trunk is through.
    """

    def __init__(self, model: TransectPreTrainedModel) -> None:
        self.trunk = model.trunk
        self.sums: Tensor | None = None

    def __enter__(self) -> Self:
        self._asked = False
        before = self.trunk.register_forward_pre_hook(self._ask, with_kwargs=True)
        after = self.trunk.register_forward_hook(self._read, with_kwargs=True)
        self._hooks = (before, after)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _ask(self, trunk: nn.Module, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._asked = bool(given.get("output_hidden_states"))
        return args, given | {"output_hidden_states": True}

    def _read(self, trunk: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, TrunkOutput) or output.hidden_states is None:
            raise TypeError("stream norms need the trunk's output as it is; call the model with return_dict left out")
        mask = given.get("attention_mask")
        found = stream_sums(output.hidden_states, None if mask is None else mask.bool())
        self.sums = found if self.sums is None else self.sums + found
        return output if self._asked else replace(output, hidden_states=None)


@torch.no_grad()
def stream_sums(streams: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
    """For each stream [batch, positions, width] the sum of its tokens' L2 norms, and their number, [streams, 2].

    real [batch, positions] is False at padding. Norms are computed in float32 or better, sums in float64.
    """
    rows = []
    for stream in streams:
        wide = stream.detach().to(torch.promote_types(stream.dtype, torch.float32))
        norms = torch.linalg.vector_norm(wide, dim=-1)
        norms = norms if real is None else norms[real.to(norms.device)]
        rows.append(torch.stack([norms.double().sum(), norms.new_tensor(norms.numel(), dtype=torch.float64)]))
    return torch.stack(rows)


class Meters:
    """All of a run's meters: what a step took and gave, and how large the stream is at the steps that are watched.

    step_flops: of the model in one step, over all processes; before: seconds of earlier sittings, for whoever goes on;
    stream_norms: mean L2 norm of resid[0..L] at the last watched step, over all processes' tokens, None before.
    """

    def __init__(self, recipe: Recipe, seq_len: int, world: World, clock: Callable[[], float] = time.perf_counter):
        config, model = recipe.train, recipe.model
        self.world = world
        self.step_tokens = config.batch_size * seq_len
        predicted = 1.0 if model.causal else recipe.data.mask_rate
        self.utilisation = Utilisation(
            model, seq_len, world.device, config.precision, world.size, predicted, config.peak_flops
        )
        self.step_flops = self.utilisation.flops * self.step_tokens
        self.throughput = Throughput(clock=clock)
        self.before = 0.0
        self.stream_norms: list[float] | None = None

    @property
    def seconds(self) -> float:
        """Spent in steps of this sitting."""
        return self.throughput.seconds

    @contextmanager
    def step(self, model: TransectPreTrainedModel, watched: bool) -> Iterator[None]:
        """Around one step, waiting for its batch included; the same `watched` on all processes."""
        with self.throughput.step(self.step_tokens):
            if not watched:
                yield
                return
            with StreamNorms(model) as streams:
                yield
            if streams.sums is not None:
                sums, counts = self.world.sum(streams.sums).unbind(1)
                self.stream_norms = (sums / counts).tolist()

    def read(self) -> dict[str, tuple[float | None, str, str]]:
        """Numbers for the log by name: value, unit, and the reason where there is no value."""
        speed = self.throughput.per_second()
        none = "no step is done yet"
        return {
            "tokens_per_second": (speed, "tokens/s", none),
            "mfu": (self.utilisation.of(speed), "1", self.utilisation.reason or none),
            "peak_memory": (float(peak_memory(self.world.device)), "bytes", ""),
        }
