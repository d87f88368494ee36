"""Four processes in every layout, and sixty-four that are not there."""

from pathlib import Path
from typing import Any, NamedTuple

import _run
import pytest
from _run import Ran, alone, differences, placed
from _spawn import spawn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.world import World

pytestmark = pytest.mark.xdist_group("processes")
STEPS = 3
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cut in four": ("llama", {}),
    "copies": ("bert", {"weights": "replicate"}),
    "two copies, cut in two": ("shared", {"replicas": 2}),
    "experts in two, the rest in four": ("avg_k", {"expert": 2}),
    "experts in four": ("avg_k/eight", {"expert": 4}),
    "two copies, experts in two": ("avg_k", {"expert": 2, "replicas": 2}),
    "copies, experts in two": ("avg_k", {"expert": 2, "weights": "replicate"}),
    "heads in two, weights in two": ("llama", {"tensor": 2}),
    "heads in two, copies": ("bert", {"tensor": 2, "weights": "replicate"}),
    "heads in two, two copies": ("caa", {"tensor": 2, "replicas": 2}),
}


def in_layouts() -> dict[str, Ran]:
    """The runs of one of four processes."""
    ran = {}
    for layout, (name, settings) in LAYOUTS.items():
        world = World.open(ParallelConfig.parse(settings), "cpu")
        ran[layout] = _run.train(placed(name, world), world, STEPS)
    return ran


def test_every_layout_is_one_process(tmp_path: Path) -> None:
    """Losses, norms, weights and gradients after three steps, float64."""
    ran = spawn(in_layouts, 4, tmp_path)
    expected = {name: alone(name, STEPS) for name in {name for name, _ in LAYOUTS.values()}}
    for layout, (name, _) in LAYOUTS.items():
        for one in ran:
            assert one[layout].norms == ran[0][layout].norms
            found = differences(one[layout], expected[name])
            assert max(found.values()) < 1e-9, (layout, found)


class Held(NamedTuple):
    """What one of many processes holds of the tables and of other weights."""

    data_rank: int
    data_size: int
    values: tuple[int, ...]
    up: tuple[int, ...]


def held(settings: dict[str, Any], rank: int, size: int) -> Held:
    """A process among others that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        world = World.open(ParallelConfig.parse(settings), "cpu")
        changes = {"ffn": {"blocks": 16}} if settings.get("expert") else {}
        model = placed("avg_k" if settings.get("expert") else "llama", world, changes=changes)
        parameters = {name: parameter for name, parameter in model.named_parameters()}
        table = parameters.get("model.layers.0.ffn.memory.values", parameters["model.layers.0.attn.q.weight"])
        up = parameters.get("model.layers.0.ffn.up.weight", parameters["model.layers.0.attn.q.weight"])
        assert isinstance(table, DTensor) and isinstance(up, DTensor)
        return Held(world.data_rank, world.data_size, tuple(table.to_local().shape), tuple(up.to_local().shape))
    finally:
        dist.destroy_process_group()


def test_sixty_four_processes() -> None:
    """Eight copies of the model, each cut in eight: of 52 units seven, and three for the last, in each."""
    whole = {"replicas": 8}
    assert held(whole, 0, 64)[:2] == (0, 64)
    shapes = [held(whole, rank, 64).up for rank in (0, 6, 7, 8, 15, 63)]
    assert shapes == [(7, 20), (7, 20), (3, 20), (7, 20), (3, 20), (3, 20)]
    experts = {"replicas": 8, "expert": 4}  # 16 blocks in four parts, each of which two processes cut again
    assert [held(experts, rank, 64).values for rank in (0, 1, 7, 63)] == [(2, 7, 20)] * 4
    heads = {"replicas": 8, "tensor": 2}  # of 26 units of each half, seven, and five for the last, in four
    found = [held(heads, rank, 64) for rank in (0, 1, 6, 63)]
    assert [one.up for one in found] == [(7, 20), (7, 20), (5, 20), (5, 20)]
    assert [one.data_rank for one in found] == [0, 0, 3, 31]
    assert found[0].data_size == 32
