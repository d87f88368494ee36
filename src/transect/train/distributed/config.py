"""The settings of a run on several processes."""

from typing import Annotated, Literal

from pydantic import Field

from transect.config import Config

Count = Annotated[int, Field(ge=1)]


class ParallelConfig(Config):
    """How the processes of `torchrun` share the work; with one process nothing is shared.

    weights: `shard`, each process of a group keeps a part of every parameter, gradient and optimizer state (FSDP2);
    `replicate`, each keeps all. replicas: groups that each hold the whole model (HSDP). expert: processes over which
    the memory blocks of sparse FFNs are spread; tokens travel to them (all-to-all). tensor: processes that share the
    heads of attention and the units of FFNs. The number of processes must be a multiple of tensor * expert * replicas.
    """

    weights: Literal["shard", "replicate"] = "shard"
    replicas: Count = 1
    expert: Count = 1
    tensor: Count = 1
