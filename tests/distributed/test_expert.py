"""Memory blocks spread over two processes: the memory, the selectors, the model and the step are those of one."""

from typing import Any, NamedTuple

import _run
import pytest
import torch
from _run import Ran, alone, differences, made, placed, whole
from _spawn import spawn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from transect.errors import InputError
from transect.models.memory.choice import Picker
from transect.models.memory.memory import Memory
from transect.train.distributed.config import ParallelConfig
from transect.train.distributed.expert import SpreadMemory
from transect.train.distributed.world import World

pytestmark = pytest.mark.xdist_group("processes")
STEPS = 5
WIDTH, BLOCKS, SIZE, ACTIVE = 13, 6, 5, 3
SPARSE: dict[str, Any] = {"kind": "sparse", "blocks": 6, "active_blocks": 3, "block_size": 7}
INSIDE = SPARSE | {"blocks": 8, "active_blocks": 2, "selector": "top_k"}
CELLS: dict[str, Any] = {"kind": "sparse", "blocks": 36, "active_blocks": 5, "block_size": 1}
MOE = {"kind": "sparse", "blocks": 4, "active_blocks": 1, "block_size": 11, "selector": "switch"}


def _avg_k(score: str, **options: Any) -> dict[str, Any]:
    return {"kind": "avg_k", "block_score": score, "gate": "sigmoid", **options}


FFNS: dict[str, dict[str, Any]] = {
    "avg_k": SPARSE | {"selector": _avg_k("mean_key", balance=0.1)},
    "max_norm_key": SPARSE | {"bias": True, "selector": _avg_k("max_norm_key", score_bias=True)},
    "random_key": SPARSE | {"selector": _avg_k("random_key", normalise_keys=True)},
    "top_k": SPARSE | {"gated": True, "shared_blocks": 1, "selector": "top_k"},
    "rand_hash": SPARSE | {"bias": True, "selector": "rand_hash"},
    "lorkm": CELLS | {"selector": "lorkm"},
    "pkm_ffn": CELLS | {"selector": {"kind": "pkm_ffn", "gate": "softmax_kept"}},
}
BLOCKS_OF: dict[str, dict[str, Any]] = {
    "caa": {"block": {"kind": "caa", "outer_ratio": 0.5}, "ffn": INSIDE},
    "moe_before_ffn": {"block": {"kind": "moe_before_ffn", "moe": MOE}},
}
CHANGES = {name: {"ffn": ffn} for name, ffn in FFNS.items()} | BLOCKS_OF
KINDS: dict[str, dict[str, bool]] = {
    "plain": {},
    "gated": {"gated": True, "bias": True},
    "cells": {"with_keys": False},
}


class Mixed(NamedTuple):
    """What a memory made of some tokens, and gradients of them, of the weights, of the tables by name."""

    made: Tensor
    x: Tensor
    weights: Tensor
    tables: dict[str, Tensor]


def tokens(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, blocks and weights of one process: the first has 17 tokens, all of the upper blocks; the second 5, and drops.

    So nothing stays with the first, and nothing of the first's tokens is the second's to drop.
    """
    source = torch.Generator().manual_seed(rank)
    count = (17, 5)[rank]
    x = torch.randn(count, WIDTH, generator=source, dtype=torch.float64)
    first = BLOCKS // 2 if rank == 0 else 0
    blocks = torch.stack([torch.randperm(BLOCKS - first, generator=source)[:ACTIVE] for _ in range(count)]) + first
    if rank == 1:
        blocks[0] = -1
        blocks[1, 1:] = -1
    return x, blocks, torch.rand(count, ACTIVE, generator=source, dtype=torch.float64)


def memory(kind: str, backend: str) -> Memory:
    torch.manual_seed(7)
    size = 1 if kind == "cells" else SIZE
    return Memory(WIDTH, BLOCKS, size, picker=Picker(backend), **KINDS[kind]).to(torch.float64)


def mixed(held: Memory, given: tuple[Tensor, Tensor, Tensor]) -> Mixed:
    x, blocks, weights = given[0].clone().requires_grad_(), given[1], given[2].clone().requires_grad_()
    out = held(x, blocks, weights)
    (out.sin() * torch.arange(1, len(x) + 1)[:, None]).sum().backward()
    assert weights.grad is not None
    zero = torch.zeros_like(x)
    tables = {name: whole(table.grad) for name, table in held.named_parameters() if table.grad is not None}
    return Mixed(out.detach(), zero if x.grad is None else x.grad, weights.grad, tables)


def memories() -> dict[tuple[str, str], list[Mixed]]:
    """What a memory spread over both makes of this process's tokens, and one spread over this process alone."""
    world = World.open(ParallelConfig.parse({"expert": 2}), "cpu")
    assert world.meshes is not None
    single = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "expert"))["expert"]
    found = {}
    for kind in KINDS:
        for backend in ("reference", "masked", "grouped", "gather"):
            meshes = (world.meshes.expert, single)
            found[kind, backend] = [
                mixed(SpreadMemory(memory(kind, backend), mesh), tokens(world.rank)) for mesh in meshes
            ]
    return found


class Seen(NamedTuple):
    """Means of all blocks' keys as gathered, and what a memory makes of tokens under autocast: type and numbers."""

    means: Tensor
    dtype: torch.dtype
    made: Tensor


def seen(held: Memory, rank: int) -> Seen:
    x, blocks, weights = tokens(rank)
    with torch.autocast("cpu", torch.bfloat16):
        made = held.float()(x.float(), blocks, weights.float())
    return Seen(held.of_blocks(lambda keys, bias, where: keys.mean(1)).detach(), made.dtype, made.detach().float())


def spread_and_seen() -> Seen:
    world = World.open(ParallelConfig.parse({"expert": 2}), "cpu")
    assert world.meshes is not None
    return seen(SpreadMemory(memory("gated", "grouped"), world.meshes.expert), world.rank)


def runs() -> dict[str, Ran]:
    """Training, the layers computed again in the backward pass too."""
    world = World.open(ParallelConfig.parse({"expert": 2}), "cpu")
    ran = {}
    for name, changes in CHANGES.items():
        ran[name] = _run.train(placed("llama", world, changes=changes), world, STEPS)
    model = placed("llama", world, changes=CHANGES["avg_k"])
    model.trunk.gradient_checkpointing = True
    return ran | {"recomputed": _run.train(model, world, STEPS)}


def both() -> tuple[dict[tuple[str, str], list[Mixed]], dict[str, Ran], Seen]:
    return memories(), runs(), spread_and_seen()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(both, 2, tmp_path_factory.mktemp("expert"))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_travel(kind: str, ran: list[Any]) -> None:
    """Outputs and all gradients of the whole memory; those of tables over the tokens of both processes."""
    given = [tokens(rank) for rank in range(2)]
    for backend in ("reference", "masked", "grouped", "gather"):
        spread = [found[0][kind, backend][0] for found in ran]
        expected = [mixed(memory(kind, backend), some) for some in given]
        for one, other in zip(spread, expected, strict=True):
            for part in ("made", "x", "weights"):
                torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=0, atol=1e-12)
        assert spread[0].tables.keys() == expected[0].tables.keys()
        for name in spread[0].tables:
            total = expected[0].tables[name] + expected[1].tables[name]
            for one in spread:
                torch.testing.assert_close(one.tables[name], total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_has_the_same_bits(kind: str, ran: list[Any]) -> None:
    expected = mixed(memory(kind, "reference"), tokens(0))
    found = ran[0][0][kind, "reference"][1]
    for part in ("made", "x", "weights"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    for name, gradient in expected.tables.items():
        assert torch.equal(found.tables[name], gradient)


@pytest.mark.parametrize("name", [*CHANGES, "recomputed"])
def test_training_is_that_of_one_process(name: str, ran: list[Any]) -> None:
    expected = alone("llama", STEPS, changes=CHANGES["avg_k" if name == "recomputed" else name])
    assert any(".memory." in path for path in expected.gradients)
    for _, found, _ in ran:
        worst = differences(found[name], expected)
        assert max(worst.values()) < 1e-9, worst


def test_selectors_see_the_same_keys_and_autocast_holds(ran: list[Any]) -> None:
    for rank, (_, _, found) in enumerate(ran):
        expected = seen(memory("gated", "grouped"), rank)
        assert torch.equal(found.means, expected.means)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found.made, expected.made, rtol=2e-2, atol=2e-2 * float(expected.made.abs().max()))


REFUSED = {
    "vanilla_m": ({"ffn": CELLS | {"selector": "vanilla_m"}}, "selector vanilla_m of model.layers.0.ffn reads every"),
    "mean_activation": ({"ffn": SPARSE | {"selector": _avg_k("mean_activation")}}, "selector avg_k of"),
    "uneven": ({"ffn": SPARSE | {"blocks": 7, "selector": "top_k"}}, "has 7 blocks, which 2 processes"),
    "dense": ({}, "the model has no sparse FFN; give expert: 1"),
}


class OfTwo:
    """A mesh of two processes, as far as what is refused asks for it."""

    def size(self) -> int:
        return 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_spread_is_refused(name: str) -> None:
    from transect.train.distributed.expert import spread

    changes, says = REFUSED[name]
    model = made("llama", changes=changes)
    before = [path for path, _ in model.named_parameters()]
    with pytest.raises(InputError, match=says) as caught:
        spread(model, OfTwo())  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value) and "expert" in str(caught.value)
    assert [path for path, _ in model.named_parameters()] == before
