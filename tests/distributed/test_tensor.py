"""Heads and units shared by two processes: the run is that of one."""

from pathlib import Path
from typing import Any

import _run
import pytest
from _run import Ran, alone, differences, made, placed
from _spawn import spawn

from transect.errors import InputError
from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.tensor import cut
from transect.train.distributed.world import World

pytestmark = pytest.mark.xdist_group("processes")
STEPS = 3
BIAS = {"attention": {"bias": True}, "ffn": {"bias": True}}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", BIAS),
    "bert": ("bert", {}),
    "caa": ("caa", {}),
    "caa/own_kv": ("caa", {"block": {"shared_kv": False}, "attention": {"qk_norm": "head"}}),
    "caa/masked": ("caa", {"block": {"direct_path": "masked", "empty_row": "raw"}}),
    "caa/contexts": ("bert", {"block": {"kind": "caa", "direct_path": "none"}}),
    "attention_only": ("llama", {"block": {"kind": "attention_only", "activation": "gelu"}}),
    "parallel": ("bert", {"block": "parallel"}),
    "shared": ("shared", {}),
    "linear": ("llama", {"attention": {"weights": "linear"}}),
}
PRECISIONS = {"float64": 1e-10, "float32": 1e-6}


def in_two(precision: str, steps: int) -> dict[str, Ran]:
    """The runs of one of two processes that share all heads."""
    world = World.open(ParallelConfig.parse({"tensor": 2, "weights": "replicate"}), "cpu")
    assert world.data_size == 1
    return {
        name: _run.train(placed(model, world, precision, changes), world, steps)
        for name, (model, changes) in CHANGES.items()
    }


def in_both() -> dict[str, dict[str, Ran]]:
    """One step in float32: the second would be Adam's, which makes rounding as large as the rate."""
    return {"float64": in_two("float64", STEPS), "float32": in_two("float32", 1)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(in_both, 2, tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("name", CHANGES)
def test_heads_and_units_are_shared(name: str, ran: list[Any]) -> None:
    model, changes = CHANGES[name]
    expected = alone(model, STEPS, changes=changes)
    for one in ran:
        found = differences(one["float64"][name], expected)
        assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("name", CHANGES)
def test_float32(name: str, ran: list[Any]) -> None:
    model, changes = CHANGES[name]
    expected = alone(model, 1, "float32", changes)
    for one in ran:
        found = differences(one["float32"][name], expected)
        assert max(found["losses"], found["gradients"]) < 1e-6, found


def parts() -> list[tuple[int, ...]]:
    """Shapes of what one of two processes holds."""
    world = World.open(ParallelConfig.parse({"tensor": 2, "weights": "replicate"}), "cpu")
    model = placed("llama", world)
    return [tuple(p.to_local().shape) for p in model.parameters() if hasattr(p, "to_local")]


def test_each_process_holds_its_part(tmp_path: Path) -> None:
    """3 layers: q, k and v by outputs, out by inputs; gate and up by outputs, down by inputs."""
    expected = 3 * [(12, 20), (6, 20), (6, 20), (20, 12), (26, 20), (26, 20), (20, 26)]
    assert spawn(parts, 2, tmp_path) == [expected, expected]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "kv_heads": ("llama", {"attention": {"kv_heads": 1}}, "layers.0.attn has attention.kv_heads 1, which 2"),
    "units": ("llama", {"ffn": {"width": 53}}, "layers.0.ffn has ffn.width 53, which 2"),
    "qk_norm": ("llama", {"attention": {"qk_norm": "full"}}, "give head or none"),
    "sparse": ("avg_k", {}, "a sparse FFN has no units to share; give parallel.expert"),
    "sink": ("caa/masked", {}, "block.empty_row sink"),
}


class OfTwo:
    """A mesh of two processes, as far as what is refused asks for it."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused(name: str) -> None:
    model, changes, says = REFUSED[name]
    whole = made(model, changes=changes)
    with pytest.raises(InputError, match=says) as caught:
        cut(whole, OfTwo())  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value) and "parallel.tensor is 2" in str(caught.value)
