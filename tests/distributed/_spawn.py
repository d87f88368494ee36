"""Several processes on one machine, each doing the same piece of work, joined by gloo."""

import os
import socket
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from transect.registry import available

PRELOADED = [
    "torch.distributed.fsdp",
    "transect.models.heads",
    "transect.train.config",
    "transect.train.optimizers.adamw",
    "transect.train.distributed.shard",
    "transect.train.distributed.tensor",
    *(
        f"{package}.{name}"
        for package in ("transect.models.blocks", "transect.models.ffn", "transect.models.selectors")
        for name in available(package)
    ),
]


def spawn(work: Callable[..., Any], size: int, folder: Path, *given: Any, as_torchrun: bool = False) -> list[Any]:
    """What `work(*given)` returned in each of `size` processes, which see each other through `torch.distributed`.

    work is a function of a module. An exception in any of them is raised here. as_torchrun: the processes are not
    joined, only told by their environment how to.
    """
    context = multiprocessing.get_context("forkserver")
    assert isinstance(context, ForkServerContext)
    context.set_forkserver_preload(PRELOADED)  # torch is imported once for all tests
    folder = folder / f"{work.__name__}-{size}"
    folder.mkdir(parents=True)
    port = _free_port() if as_torchrun else None
    multiprocessing.start_processes(_run, (size, folder, work, given, port), size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank: int, size: int, folder: Path, work: Callable[..., Any], given: tuple, port: int | None) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped")
    if port is not None:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
        torch.save(work(*given), folder / f"{rank}.pt")
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)
    torch.save(work(*given), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
