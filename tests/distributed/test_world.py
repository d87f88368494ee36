"""What a world is alone, as torchrun describes it, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from _run import made, whole
from _spawn import spawn
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from transect.errors import InputError
from transect.train.config import TrainConfig
from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.gradients import clip, sum_over
from transect.train.distributed.mesh import Layout
from transect.train.distributed.world import World

pytestmark = pytest.mark.xdist_group("processes")
SHAPES = {"cut": (7, 3), "both": (5, 2), "whole": (3,), "number": ()}


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nobody says anything about processes."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("size", [None, "1"])
def test_alone_there_is_no_process_group(size: str | None, untold: pytest.MonkeyPatch) -> None:
    if size is not None:
        untold.setenv("WORLD_SIZE", size)
    world = World.open(ParallelConfig(), "cpu")
    assert not dist.is_initialized()
    assert (world.rank, world.size, world.data_rank, world.data_size, world.is_main) == (0, 1, 0, 1, True)
    tensor = torch.ones(3)
    assert world.sum(tensor) is tensor
    assert world.any(True) is True and world.any(False) is False
    model = made("llama", torch.float32)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    world.place(model, TrainConfig.parse({"precision": "bfloat16"}))
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    world.place(model, TrainConfig.parse({"precision": "float64"}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    world.last_micro_batch(model, False)
    world.finish_gradients(model)
    world.barrier()
    world.close()


@pytest.mark.parametrize("limit", [None, 0.5, 1e9])
def test_clip_alone(limit: float | None, untold: pytest.MonkeyPatch) -> None:
    """As `torch.nn.utils` does, whose 1e-6 beside the norm we have too."""
    model, twin = made("bert"), made("bert")
    for one in (model, twin):
        source = torch.Generator().manual_seed(3)
        for parameter in one.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), float("inf") if limit is None else limit)
    norm = World.open(ParallelConfig(), "cpu").clip(model, limit)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-14, atol=0)


def test_clip_without_gradients(untold: pytest.MonkeyPatch) -> None:
    assert World.open(ParallelConfig(), "cpu").clip(made("bert"), 1.0).item() == 0.0


MISFITS: dict[str, tuple[dict[str, Any], int, str]] = {
    "multiple": ({"tensor": 2}, 3, "3 processes do not fit replicas 1 x expert 1 x tensor 2; start a multiple of 2"),
    "one": ({"expert": 2}, 1, "1 process does not fit"),
    "three": ({"expert": 2, "replicas": 3}, 8, "start a multiple of 6"),
    "both": ({"expert": 2, "tensor": 2}, 4, "give one of them"),
    "copies": ({"weights": "replicate", "replicas": 2}, 4, "leave replicas at 1"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_processes_that_do_not_fit_are_one_line(name: str, untold: pytest.MonkeyPatch) -> None:
    settings, size, says = MISFITS[name]
    untold.setenv("WORLD_SIZE", str(size))
    with pytest.raises(InputError, match=says) as caught:
        World.open(ParallelConfig.parse(settings), "cpu")
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "device", "says"),
    [
        ({"WORLD_SIZE": "two"}, "cpu", "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "cuda:0", "one device for 2 processes"),
        ({}, "gpu", "unknown device 'gpu'; give auto, cpu or cuda"),
        ({"LOCAL_RANK": "997"}, "cuda", "process 997 of this machine has no CUDA device"),
    ],
)
def test_wrong_environment(environment: dict[str, str], device: str, says: str, untold: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        untold.setenv(name, value)
    with pytest.raises(InputError, match=says) as caught:
        World.open(ParallelConfig(), device)
    assert "\n" not in str(caught.value)


def test_layout_multiplies() -> None:
    layout = Layout.of(ParallelConfig.parse({"replicas": 2, "expert": 3}), 30)
    assert layout == Layout(replicas=2, shard=5, expert=3, tensor=1)
    assert layout.data == 30


def gradients() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in SHAPES.items()}


def described() -> dict[str, Any]:
    """One of four processes that know each other by their environment alone."""
    world = World.open(ParallelConfig.parse({"weights": "replicate", "tensor": 2}), "cpu")
    found: dict[str, Any] = {"world": (world.rank, world.size, world.local_rank, world.data_rank, world.data_size)}
    found["main"], found["opened"] = world.is_main, dist.is_initialized()
    found["sum"] = world.sum(torch.tensor([1.0 + world.rank]))
    found["any"] = [world.any(world.rank == 3), world.any(False)]
    model = made("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(world.rank)
    world.place(model, TrainConfig.parse({"precision": "float64"}))
    found["weights"] = {name: whole(parameter) for name, parameter in model.named_parameters()}
    found |= _clipped(world)
    parts = [torch.full((size,), float(world.rank)) for size in (3, 1, 4, 0, 2)]
    parts.append(torch.full((2,), float(world.rank), dtype=torch.float64))
    assert world.meshes is not None
    sum_over(parts, world.meshes.data)
    found["sums"] = parts
    world.close()
    found["closed"] = not dist.is_initialized()
    return found


def _clipped(world: World) -> dict[str, Any]:
    """The norm of gradients that are cut in one way or another, and what became of them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    given = gradients()
    how = {"cut": [Shard(0), Replicate()], "both": [Shard(0), Shard(1)]}
    parts = []
    for name, tensor in given.items():
        local = tensor.clone()
        for place, cut in enumerate(how.get(name, [])):
            if isinstance(cut, Shard):
                local = local.chunk(2, cut.dim)[mesh.get_local_rank(place)]
        shape, stride = tensor.shape, tensor.stride()
        made_of = {"run_check": False, "shape": shape, "stride": stride}
        parts.append(DTensor.from_local(local.contiguous(), mesh, how[name], **made_of) if name in how else local)
    return {"norm": clip(parts, 0.5, world.size, world.device), "clipped": [whole(part) for part in parts]}


def test_as_torchrun_describes_it(tmp_path: Path) -> None:
    """Four processes, two of which share heads: two slices of a batch."""
    ran = spawn(described, 4, tmp_path, as_torchrun=True)
    assert [one["world"] for one in ran] == [(0, 4, 0, 0, 2), (1, 4, 1, 0, 2), (2, 4, 2, 1, 2), (3, 4, 3, 1, 2)]
    assert [one["main"] for one in ran] == [True, False, False, False]
    assert all(one["opened"] and one["closed"] for one in ran)
    assert [one["sum"].item() for one in ran] == [4.0, 6.0, 4.0, 6.0]  # 1 + 3 and 2 + 4
    assert all(one["any"] == [True, False] for one in ran)
    expected = dict(made("llama").named_parameters())
    given = gradients()
    norm = torch.cat([gradient.flatten() for gradient in given.values()]).norm()
    for one in ran:
        for name, parameter in one["weights"].items():
            assert torch.equal(parameter, expected[name]), name  # the first process's
        assert torch.equal(one["norm"], ran[0]["norm"])
        torch.testing.assert_close(one["norm"], norm, rtol=1e-14, atol=0)
        for found, gradient in zip(one["clipped"], given.values(), strict=True):
            torch.testing.assert_close(found, gradient * (0.5 / (norm + 1e-6)), rtol=1e-13, atol=0)
    for rank, one in enumerate(ran):
        assert [part.tolist() for part in one["sums"]] == [[2.0 + 2 * (rank % 2)] * n for n in (3, 1, 4, 0, 2, 2)]
