"""Blocks shared out over threads: the numbers of one thread, gradients too, and PyTorch's threads left as they were."""

import pytest
import torch

from transect.models.memory.backends import sharing, tiles
from transect.models.memory.backends.reference import mix as reference
from transect.models.memory.backends.tables import Tables


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(sharing, "WORTH", 0)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def tables(gated: bool, generator: torch.Generator) -> Tables:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    up, up_bias = (draw(11, 3, 7), draw(11, 3)) if gated else (None, None)
    return Tables(draw(11, 3, 7), up, draw(11, 3, 7), draw(11, 3), up_bias, "gelu")


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("gated", [False, True])
def test_shared_out_equals_the_reference(gated: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 64 * 7 * 8)  # several tiles a block
    generator = torch.Generator().manual_seed(0)
    given = tables(gated, generator)
    x = torch.randn(401, 7, generator=generator, dtype=torch.float64).requires_grad_()
    blocks = torch.rand(401, 11, generator=generator).topk(4, dim=1).indices
    blocks[blocks == 5] = -1  # one block that nothing chooses, and drops
    weights = torch.randn(401, 4, generator=generator, dtype=torch.float64).masked_fill(blocks < 0, 0).requires_grad_()
    above = torch.randn(401, 7, generator=generator, dtype=torch.float64)
    trained = [x, weights, *(one for one in given if isinstance(one, torch.Tensor))]
    found = []
    for mix in (tiles.mix, reference):
        made = mix(x, blocks, weights, given)
        found.append([made, *torch.autograd.grad(made, trained, above)])
    assert torch.get_num_threads() == 3
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)


@pytest.mark.usefixtures("three_threads")
def test_a_failing_part_is_raised_and_threads_are_given_back():
    piece = tiles._Tile(0, 0, True, torch.arange(3), None, torch.zeros(3))

    def run(part: list) -> torch.Tensor:
        raise RuntimeError("in a thread")

    with pytest.raises(RuntimeError, match="in a thread"):
        sharing.shared_out(run, [piece, piece._replace(block=1), piece._replace(block=2)], 1)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({0: [5, 5], 1: [1], 2: [40], 3: [3, 3, 3], 4: [20]}, [[0, 0, 1, 2], [3, 3, 3, 4]]),
        ({0: [10], 1: [15, 15], 2: [5]}, [[0, 1, 1], [2]]),
        ({0: [9, 9, 9]}, [[0, 0, 0]]),
        ({}, [[]]),
    ],
)
def test_blocks_stay_together_and_parts_are_about_equal(sizes: dict[int, list[int]], expected: list[list[int]]):
    pieces = [
        tiles._Tile(block, 0, True, torch.arange(count), None, torch.zeros(count))
        for block, counts in sizes.items()
        for count in counts
    ]
    parts = sharing._parts(pieces, 2)
    assert [[piece.block for piece in part] for part in parts] == expected
    assert [piece for part in parts for piece in part] == pieces
