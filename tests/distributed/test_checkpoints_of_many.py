"""Checkpoints of several processes: each writes its part, any number of processes reads the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _spawn import spawn
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from saving import TinyRun, assert_same, kept
from transect.errors import InputError
from transect.models import shards
from transect.train.checkpoints import Checkpoints
from transect.train.config import CheckpointConfig
from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.world import World

pytestmark = pytest.mark.xdist_group("processes")
NAME, ADAMW = "sparse/bias_balanced", {"kind": "adamw", "lr": 0.01}
LAYOUTS = {  # of four processes; models without an odd number of blocks or heads where these are shared
    "replicate": (NAME, {"weights": "replicate"}),
    "copies of parts": (NAME, {"replicas": 2}),
    "experts": ("sparse/pkm", {"expert": 2}),
    "copies of experts": ("sparse/pkm", {"expert": 2, "replicas": 2}),
    "copies of heads": ("attention/gqa", {"tensor": 2, "weights": "replicate"}),
}


def _checkpoints(world: World, folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", CheckpointConfig(), world)


def _world(**parallel: Any) -> World:
    return World.open(ParallelConfig.parse(parallel), "cpu")


def _whole(run: TinyRun) -> dict[str, Tensor]:
    """Every tensor with all its parts, on every process."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in run.state().items()}


def _write(folder: Path) -> dict[str, Tensor]:
    """Train, save at once and beside training, meet a full disk and damage; what the state was."""
    world = _world()
    checkpoints, run = _checkpoints(world, folder), TinyRun(NAME, ADAMW, world=world).train(3)
    state = _whole(run)
    run.save(checkpoints)
    run.step = 4
    run.save(checkpoints, wait=False).train(1)
    checkpoints.finish()
    run.load(checkpoints, 3)
    assert_same(_whole(run), state)
    _full_disk(world, run, checkpoints)
    _damage(world, run, checkpoints)
    return state


def _full_disk(world: World, run: TinyRun, checkpoints: Checkpoints) -> None:
    """What one process finds stops all of them in the same way."""
    write = shards.write

    def full(*arguments: Any) -> Any:
        if world.rank == 1:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    shards.write, run.step = full, 5
    with pytest.raises(InputError, match=r"cannot save the checkpoint of step 5 .*No space left on device; make room"):
        run.save(checkpoints)
    shards.write = write
    distributed.barrier()
    assert checkpoints.steps() == [3, 4]
    assert not (checkpoints.folder / ".step-00000005.partial").exists()


def _damage(world: World, run: TinyRun, checkpoints: Checkpoints) -> None:
    harmed = checkpoints.folder / "step-00000004/state/model/00001-of-00002.safetensors"
    content = harmed.read_bytes()
    distributed.barrier()
    if world.is_main:
        harmed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    distributed.barrier()
    with pytest.raises(InputError, match=r"00001-of-00002.safetensors is damaged: .*; go on with --resume-from 3$"):
        run.load(checkpoints, 4)
    distributed.barrier()
    if world.is_main:
        harmed.write_bytes(content)


def _read(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The state read, and how many tensors of it are in parts; training goes on."""
    world = _world()
    run = TinyRun(NAME, ADAMW, seed=9, world=world)
    run.load(_checkpoints(world, folder), 4)
    whole, parts = _whole(run), sum(isinstance(value, DTensor) for value in run.state().values())
    run.train(1)
    return whole, parts


def test_two_processes_write_and_one_and_four_read(tmp_path: Path) -> None:
    state, same = spawn(_write, 2, tmp_path, tmp_path)
    assert_same(state, same)
    alone = TinyRun(NAME, ADAMW, seed=7)
    alone.load(kept(tmp_path), 3)
    assert_same(alone.state(), state)
    for whole, parts in spawn(_read, 4, tmp_path, tmp_path):
        assert_same(whole, state)
        assert parts > 30
    folder = tmp_path / "checkpoints"
    three, four = (json.loads((folder / f"step-0000000{step}/checkpoint.json").read_text()) for step in (3, 4))
    assert three["processes"] == 2 and three["files"] == four["files"]  # written beside training: the same bytes
    sizes = [three["files"][f"state/model/0000{rank}-of-00002.safetensors"]["size"] for rank in (0, 1)]
    assert max(sizes) < 1.5 * min(sizes)  # both have a part


def _layouts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """For each layout what was saved; it is loaded over another state, and training goes on as before."""
    found = {}
    for layout, (name, parallel) in LAYOUTS.items():
        world = _world(**parallel)
        run, checkpoints = TinyRun(name, ADAMW, world=world).train(2), _checkpoints(world, folder / layout)
        found[layout] = _whole(run)
        after = _whole(run.save(checkpoints).train(1))
        other = TinyRun(name, ADAMW, seed=5, world=world)
        other.load(checkpoints, 2)
        assert_same(_whole(other), found[layout])
        assert_same(_whole(other.train(1)), after)
    return found


def test_every_layout_is_read_by_one_process_and_written_once(tmp_path: Path) -> None:
    found = spawn(_layouts, 4, tmp_path, tmp_path)[0]
    for layout, (name, _) in LAYOUTS.items():
        alone = TinyRun(name, ADAMW, seed=7)
        alone.load(kept(tmp_path / layout), 2)
        assert_same(alone.state(), found[layout])
        files = (tmp_path / layout / "checkpoints" / "step-00000002" / "state").rglob("*.safetensors")
        stored = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        assert stored == sum(tensor.nbytes for tensor in found[layout].values()), layout


def _meshes(folder: Path) -> int:
    """Tensors in every kind of parts, written and read; how many bytes this process wrote."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "part"))
    numbers = torch.arange(5.0 * 3).view(5, 3) + 1
    state: dict[str, Tensor] = {
        "copies": distribute_tensor(numbers, mesh, [Replicate(), Shard(0)]),
        "both": distribute_tensor(numbers, mesh, [Shard(0), Shard(0)]),
        "columns": distribute_tensor(numbers, mesh, [Shard(1), Shard(0)]),
        "few": distribute_tensor(numbers[:1], mesh, [Shard(0), Shard(0)]),  # more processes than rows
        "submesh": distribute_tensor(numbers, mesh["part"], [Shard(0)]),
        "everywhere": distribute_tensor(numbers, mesh, [Replicate(), Replicate()]),
        "plain": numbers.clone(),
    }
    linear = parallelize_module(torch.nn.Linear(3, 8, bias=False), mesh["part"], ColwiseParallel())
    with torch.no_grad():
        linear.weight.copy_(distribute_tensor(torch.arange(24.0).view(8, 3), mesh["part"], [Shard(0)]))
    fully_shard(linear, mesh=mesh["copy"])
    state["strided"] = linear.weight
    own = _checkpoints(_world(), folder)._pieces(state)
    if own:
        shards.write(folder / "state" / f"{distributed.get_rank()}.safetensors", own)
    distributed.barrier()
    room = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    shards.read(folder / "state", room)
    for name, tensor in state.items():
        read, given = (value.full_tensor() if isinstance(value, DTensor) else value for value in (room[name], tensor))
        assert torch.equal(read, given), name
    return sum(piece.tensor.nbytes for piece in own.values())


def test_parts_of_every_kind_are_written_once_and_read_back(tmp_path: Path) -> None:
    written = spawn(_meshes, 4, tmp_path, tmp_path)
    assert sum(written) == 4 * (6 * 15 + 3 + 24)
    forms = shards.forms(tmp_path / "state")
    room = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
    shards.read(tmp_path / "state", room)
    numbers = torch.arange(5.0 * 3).view(5, 3) + 1
    for name in ("copies", "both", "columns", "submesh", "everywhere", "plain"):
        assert torch.equal(room[name], numbers), name
    assert torch.equal(room["few"], numbers[:1]) and torch.equal(room["strided"], torch.arange(24.0).view(8, 3))
