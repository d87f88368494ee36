"""One process or many: which part of each batch it has, where the model lies, how gradients become one."""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist

from transect.errors import InputError
from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.gradients import clip, held, sum_over
from transect.train.distributed.mesh import Layout, Meshes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from transect.models.transformer import TransectPreTrainedModel
    from transect.train.config import TrainConfig

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others; a first step that compiles, or a large checkpoint, takes minutes."""


class Left(NamedTuple):
    """Gradients, by the names of their parameters, that are still to be summed over a group after the backward pass."""

    group: "ProcessGroup"
    names: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; alone, every method has nothing to do.

    data_rank, data_size: this process takes the data_rank-th of data_size contiguous slices of each batch. Processes
    that share heads (`tensor`) have the same slice; those that share experts do not. All processes must make the same
    number of forward and backward passes, evaluation included: each waits for the others' parts.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meshes: Meshes | None = None
    opened: bool = False
    weights: str = "shard"
    _left: WeakKeyDictionary[nn.Module, tuple[Left, ...]] = field(default_factory=WeakKeyDictionary, repr=False)

    @classmethod
    def open(cls, config: ParallelConfig, device: str = "auto") -> Self:
        """The world that `torchrun` describes (RANK, WORLD_SIZE, LOCAL_RANK), or a process group already there.

        Without either, or with one process, no process group is made. device: `auto` takes CUDA where there is some,
        each process its own. Backends: gloo, beside it nccl on CUDA. Raises InputError where the number of processes
        does not fit the settings or the devices.
        """
        there = dist.is_available() and dist.is_initialized()
        size = dist.get_world_size() if there else _number("WORLD_SIZE", 1)
        rank = dist.get_rank() if there else _number("RANK", 0)
        near = _number("LOCAL_RANK", rank if there else 0)
        layout = Layout.of(config, size)
        chosen = _device(device, near, size)
        if size == 1:
            return cls(chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if not there:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        return cls(chosen, rank, size, near, Meshes(layout, chosen.type), not there, config.weights)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes what only one must."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many slices each batch has."""
        return 1 if self.meshes is None else self.meshes.layout.data

    @property
    def data_rank(self) -> int:
        """Which of them is this process's."""
        return 0 if self.meshes is None else self.rank // self.meshes.layout.tensor

    def place(self, model: "TransectPreTrainedModel", train: "TrainConfig") -> None:
        """Move a model to the device, in float32 or as `precision` asks in float64, and share it out, in place.

        To be called once, before the optimizer is made and anything is compiled. All processes get the weights of the
        first. Names of parameters stay what they are. Raises InputError where a part cannot be cut as asked.
        """
        model.to(self.device, torch.float64 if train.precision == "float64" else torch.float32)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if self.meshes is None:
            return
        from transect.train.distributed.expert import spread
        from transect.train.distributed.shard import shard
        from transect.train.distributed.tensor import cut

        meshes, layout = self.meshes, self.meshes.layout
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)
        left = []
        if layout.tensor > 1:
            left.append(Left(meshes.tensor.get_group(), cut(model, meshes.tensor)))
        tables = spread(model, meshes.expert) if layout.expert > 1 else ()
        if tables and meshes.same_blocks is not None and (layout.shard == 1 or self.weights == "replicate"):
            left.append(Left(meshes.same_blocks, tables))
        kept = shard(model, meshes) if self.weights == "shard" else set(model.parameters())
        names = (name for name, parameter in model.named_parameters() if parameter in kept and name not in tables)
        left.append(Left(meshes.data, tuple(names)))
        self._left[model] = tuple(one for one in left if one.names)

    def last_micro_batch(self, model: nn.Module, last: bool) -> None:
        """To be called before each forward pass of a step: gradients travel in the backward pass of the last only."""
        if self.meshes is not None and self.weights == "shard":
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(model, FSDPModule)
            model.set_requires_gradient_sync(last)

    def finish_gradients(self, model: nn.Module) -> None:
        """To be called once after the last backward pass of a step: all gradients are sums over the data processes.

        A parameter must have a gradient on all processes or on none.
        """
        for group, names in self._left.get(model, ()):
            sum_over(held(model.get_parameter(name) for name in names), group)

    def clip(self, model: nn.Module, limit: float | None) -> Tensor:
        """The norm of the whole model's gradient; above `limit` all are scaled down to it, in place.

        float64, equal to the last bit on all processes.
        """
        return clip(held(model.parameters()), limit, self.size, self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor's sum over the data processes; the tensor itself where there is one."""
        if self.meshes is None:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.meshes.data)
        return total.to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.meshes is None:
            return flag
        raised = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def close(self) -> None:
        """End the process group, if `open` made it."""
        if self.opened and dist.is_initialized():
            dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """A number that `torchrun` gives."""
    given = os.environ.get(name, str(default))
    try:
        return int(given)
    except ValueError as error:
        raise InputError(
            f"{name} is {given!r} in the environment; it must be a whole number, as torchrun sets it"
        ) from error


def _device(asked: str, near: int, size: int) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
    except RuntimeError as error:
        raise InputError(f"unknown device {asked!r}; give auto, cpu or cuda") from error
    if device.type != "cuda" or device.index is not None:
        if size > 1 and device.index is not None:
            raise InputError(
                f"device {asked!r} is one device for {size} processes; give cuda, so that each has its own"
            )
        return device
    there = torch.cuda.device_count()
    if near >= there:
        raise InputError(
            f"process {near} of this machine has no CUDA device: there are {there}; start no more processes"
        )
    return torch.device("cuda", near)
