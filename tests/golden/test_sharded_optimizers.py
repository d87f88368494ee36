"""The steps of a sharded optimizer are those of one process, however its parameters are cut."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from transect import registry
from transect.models.memory.memory import Memory
from transect.train.config import TrainConfig
from transect.train.optimizers.base import build

SETTINGS = {
    **{name: {"kind": name, "lr": 0.01} for name in registry.available("transect.train.optimizers")},
    "adamw, l2": {"kind": "adamw", "lr": 0.01, "l2": True},
    "muon, keller": {"kind": "muon", "lr": 0.01, "scale": "keller", "nesterov": False},
}


class Uneven(nn.Module):
    """Matrices and stacks that two processes cannot share evenly, tall and wide; FSDP2 shards no single number."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(13, 7), nn.Linear(5, 11)
        self.memory = Memory(13, 3, 5, bias=True)
        self.single = Memory(13, 1, 5)
        self.table = nn.Embedding(17, 7)
        self.number = nn.Parameter(torch.ones(()))


def _given(module: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()}


def _steps(module: nn.Module, kind: str) -> dict[str, Tensor]:
    optimizer = build(TrainConfig.parse({"optimizer": SETTINGS[kind]}).optimizer, module)
    for step in range(4):
        for name, gradient in _given(module, step).items():
            parameter = module.get_parameter(name)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step(0.7)
        optimizer.zero_grad()
    ends = {name: p.detach() for name, p in module.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in ends.items()}


def _fresh() -> Uneven:
    torch.manual_seed(0)
    return Uneven()


def _rows(module: nn.Module) -> None:
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)), ignored_params={module.number})


def _columns(module: nn.Module) -> None:
    """Along columns, and inside blocks, as tensor parallel maps are."""
    mesh = init_device_mesh("cpu", (2,))
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.ndim > 1:
                setattr(part, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(1)])))


def _partly(module: nn.Module) -> None:
    """Some parameters are left whole on each process, as replicas are."""
    kept = {*module.tall.parameters(), module.number, module.memory.values}
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)), ignored_params=kept)


def _two_meshes(module: nn.Module) -> None:
    """Blocks of a memory over one mesh, the rest over another, as experts are."""
    experts = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))["b"]
    for name in ("keys", "values", "key_bias"):
        table = distribute_tensor(getattr(module.memory, name).data, experts, [Shard(0)])
        setattr(module.memory, name, nn.Parameter(table))
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)), ignored_params={*module.memory.parameters(), module.number})


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "rows": _rows,
    "columns": _columns,
    "partly": _partly,
    "two meshes": _two_meshes,
}


def _process(rank: int, folder: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        found = {}
        for way, shard in WAYS.items():
            for kind in kinds:
                module = _fresh()
                shard(module)
                found[way, kind] = _steps(module, kind)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path):
    mp.spawn(_process, args=(str(tmp_path), list(SETTINGS)), nprocs=2)
    whole = {kind: _steps(_fresh(), kind) for kind in SETTINGS}
    start = dict(_fresh().named_parameters())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(found) == len(WAYS) * len(SETTINGS)
        for (way, kind), ends in found.items():
            for name, end in ends.items():
                assert (whole[kind][name] - start[name].detach()).abs().max() > 1e-3, name
                torch.testing.assert_close(end, whole[kind][name], rtol=1e-5, atol=1e-5, msg=f"{way} {kind} {name}")
