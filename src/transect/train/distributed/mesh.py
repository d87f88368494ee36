"""Where each process stands: copies of the model, parts of the weights, experts, heads."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

from transect.errors import InputError
from transect.train.distributed.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """replicas x shard x expert x tensor processes, the last innermost, so that neighbours share heads or experts.

    shard: over how many processes each expert table, and with `expert` times as many every other weight, is cut.
    """

    replicas: int = 1
    shard: int = 1
    expert: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, config: ParallelConfig, size: int) -> Self:
        """The layout of so many processes; raises InputError where the settings do not fit them."""
        if config.expert > 1 and config.tensor > 1:
            raise InputError(
                f"parallel.expert is {config.expert} and parallel.tensor {config.tensor}: sparse FFNs are not cut by "
                "tensor; give one of them"
            )
        if config.weights == "replicate" and config.replicas > 1:
            raise InputError(
                f"parallel.replicas is {config.replicas}: with weights: replicate each process holds the model; "
                "leave replicas at 1"
            )
        fixed = config.replicas * config.expert * config.tensor
        if size % fixed:
            raise InputError(
                f"parallel: {size} process{'es do' if size > 1 else ' does'} not fit replicas {config.replicas} x "
                f"expert {config.expert} x tensor {config.tensor}; start a multiple of {fixed}"
            )
        return cls(config.replicas, size // fixed, config.expert, config.tensor)

    @property
    def data(self) -> int:
        """Processes that have different text: all but those that share heads."""
        return self.replicas * self.shard * self.expert


class Meshes:
    """The process groups of a layout, made by all processes together.

    Two meshes over the same processes: `weights` (replica, data, tensor), on which everything but expert tables lies,
    and `tables` (replica, shard, expert, tensor), on which those do.
    """

    def __init__(self, layout: Layout, device: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.layout, self.device = layout, device
        replicas, shard, expert, tensor = layout.replicas, layout.shard, layout.expert, layout.tensor
        names = ("replica", "data", "tensor")
        self.weights = init_device_mesh(device, (replicas, shard * expert, tensor), mesh_dim_names=names)
        self.tables = self.weights
        if expert > 1:
            names = ("replica", "shard", "expert", "tensor")
            self.tables = init_device_mesh(device, (replicas, shard, expert, tensor), mesh_dim_names=names)
        self._all = self.weights
        if replicas > 1:
            self._all = init_device_mesh(device, (layout.data, tensor), mesh_dim_names=("data", "tensor"))

    @property
    def data(self) -> "ProcessGroup":
        """Processes of different text, which have the same heads."""
        return self._all["data"].get_group()

    @property
    def tensor(self) -> "DeviceMesh":
        """Processes that share heads and units, and have the same text."""
        return self.weights["tensor"]

    @property
    def expert(self) -> "DeviceMesh":
        """Processes among which memory blocks are spread."""
        return self.tables["expert"]

    @cached_property
    def shards(self) -> "DeviceMesh":
        """What weights are cut over: one dimension, or copies x parts."""
        return self.weights["replica", "data"] if self.layout.replicas > 1 else self.weights["data"]

    @cached_property
    def table_shards(self) -> "DeviceMesh":
        """What the part of an expert table that all of these have is cut over."""
        return self.tables["replica", "shard"] if self.layout.replicas > 1 else self.tables["shard"]

    @cached_property
    def same_blocks(self) -> "ProcessGroup | None":
        """Processes with the same whole part of each expert table; None where there is one, or it is cut further."""
        if self.layout.replicas > 1 and self.layout.shard == 1:
            return self.tables["replica"].get_group()
        return self.tables["shard"].get_group() if self.layout.shard > 1 else None
