"""Weights cut over two processes, or copied: the run is that of one process."""

from pathlib import Path
from typing import Any

import _run
import pytest
import torch
from _run import CLIP, Ran, alone, differences, placed
from _spawn import spawn

from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.world import World

pytestmark = pytest.mark.xdist_group("processes")
STEPS = 20
WEIGHTS = ("shard", "replicate")
NAMES = ("llama", "bert", "avg_k", "caa", "shared")
SINGLE = ("llama", "avg_k")
"""Models that are trained in float32 too."""


def around_evaluation() -> tuple[list[int], list[int], list[int]]:
    """Parameters, by their identities, before and after a pass without gradients and after a step."""
    world = World.open(ParallelConfig(), "cpu")
    model = placed("llama", world)
    seen = [[id(parameter) for parameter in model.parameters()]]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    seen.append([id(parameter) for parameter in model.parameters()])
    _run.train(model, world, 1)
    seen.append([id(parameter) for parameter in model.parameters()])
    return seen[0], seen[1], seen[2]


def in_parts() -> dict[tuple[str, str, str], Ran]:
    """The runs of one of two processes."""
    ran = {}
    for weights in WEIGHTS:
        world = World.open(ParallelConfig.parse({"weights": weights}), "cpu")
        for precision, names in (("float64", NAMES), ("float32", SINGLE)):
            for name in names:
                ran[weights, precision, name] = _run.train(placed(name, world, precision), world, STEPS)
    return ran


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(in_parts, 2, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name: str, ran: list[Any]) -> None:
    """Losses, norms, weights and gradients after 20 steps with accumulation, uneven positions and clipping."""
    expected = alone(name, STEPS)
    assert min(expected.norms) < CLIP < max(expected.norms)  # some steps are clipped, some are not
    for weights in WEIGHTS:
        for one in ran:
            run = one[weights, "float64", name]
            assert run.norms == ran[0][weights, "float64", name].norms
            found = differences(run, expected)
            assert max(found.values()) < 1e-9, (weights, found)


@pytest.mark.parametrize("name", SINGLE)
def test_float32(name: str, ran: list[Any]) -> None:
    expected = alone(name, STEPS, "float32")
    for weights in WEIGHTS:
        for one in ran:
            found = differences(one[weights, "float32", name], expected)
            assert found["losses"] < 1e-4, (weights, found)


def test_weights_are_cut_again_after_evaluation(tmp_path: Path) -> None:
    """What an optimizer and a checkpoint hold is what the model has."""
    for before, after, then in spawn(around_evaluation, 2, tmp_path):
        assert before == after == then
