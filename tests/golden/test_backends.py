"""Every way to compute a sparse FFN memory against the plain one: outputs and gradients."""

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transect.models.activations import ACTIVATIONS
from transect.models.memory.backends import gather, grouped_mm, masked, reference, tiles
from transect.models.memory.backends import tables as tables_of
from transect.models.memory.backends.slopes import backward_of
from transect.models.memory.backends.tables import Tables
from transect.models.memory.choice import Picker
from transect.models.memory.memory import Memory

WAYS = {"masked": masked.mix, "tiles": tiles.mix, "grouped_mm": grouped_mm.mix, "gather": gather.mix}
SKIPPING = ("tiles", "grouped_mm", "gather")
"""Ways that never read a block that nothing chose."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF_TOLERANCE = 2e-2
N, B, G, D, SLOTS = 31, 7, 5, 13, 3

every_way = pytest.mark.parametrize("way", WAYS)


def drawn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def tables(
    generator: torch.Generator,
    shape: tuple[int, int, int] = (B, G, D),
    gated: bool = True,
    biases: bool = True,
    dtype: torch.dtype = torch.float64,
    activation: str = "gelu",
) -> Tables:
    def part(wanted: bool, *sizes: int) -> Tensor | None:
        return drawn(generator, *sizes, dtype=dtype) if wanted else None

    keys, values = drawn(generator, *shape, dtype=dtype), drawn(generator, *shape, dtype=dtype)
    bias, up_bias = part(biases, *shape[:2]), part(biases and gated, *shape[:2])
    return Tables(keys, part(gated, *shape), values, bias, up_bias, activation)


def picks(generator: torch.Generator, tokens: int = N, slots: int = SLOTS, blocks: int = B) -> Tensor:
    """Distinct blocks for each token, the last block never; a few dropped, two tokens without any."""
    chosen = torch.rand(tokens, blocks - 1, generator=generator).topk(slots, dim=1).indices
    chosen[torch.rand(tokens, slots, generator=generator) < 0.1] = -1
    chosen[:2] = -1
    return chosen


def results(mix: Callable, x: Tensor, blocks: Tensor, weights: Tensor, own: Tables, above: Tensor) -> list[Tensor]:
    """The output and the gradients of x, weights and every table."""
    given = [x, weights, *(part for part in own[:-1] if part is not None)]
    made = mix(x, blocks, weights, own)
    return [made.detach(), *torch.autograd.grad(made, given, above)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        assert one.dtype == found[0].dtype
        scale = max(float(other.abs().max()), 1e-30) if other.numel() else 1.0
        error = float((one.double() - other.double()).abs().max()) / scale if other.numel() else 0.0
        assert error <= tolerance, (place, error)


def compare(way: str, generator: torch.Generator, blocks: Tensor, own: Tables, tolerance: float) -> None:
    x = drawn(generator, len(blocks), own.values.shape[2], dtype=own.values.dtype)
    weights = drawn(generator, *blocks.shape, dtype=own.values.dtype)
    above = drawn(generator, *x.shape, dtype=own.values.dtype).detach()
    found = results(WAYS[way], x, blocks, weights, own, above)
    assert_equal(found, results(reference.mix, x, blocks, weights, own, above), tolerance)


@every_way
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_reference(way, activation, gated, biases, dtype, generator):
    own = tables(generator, gated=gated, biases=biases, dtype=dtype, activation=activation)
    compare(way, generator, picks(generator), own, TOLERANCE[dtype])


def all_dropped(generator: torch.Generator) -> Tensor:
    return torch.full((N, SLOTS), -1)


SELECTIONS = {
    "one token": lambda generator: picks(generator, tokens=3)[2:],
    "no token": lambda generator: torch.zeros(0, SLOTS, dtype=torch.long),
    "one block takes all": lambda generator: torch.full((N, 1), 4),
    "every block for every token": lambda generator: torch.rand(N, B, generator=generator).argsort(1),
    "all dropped": all_dropped,
}


@every_way
@pytest.mark.parametrize("selection", SELECTIONS)
def test_equals_the_reference_at_the_edges(way, selection, generator):
    compare(way, generator, SELECTIONS[selection](generator), tables(generator), 1e-10)


@every_way
def test_block_size_one(way, generator):
    compare(way, generator, picks(generator, slots=11, blocks=23), tables(generator, (23, 1, D)), 1e-10)


@every_way
def test_many_tiles_and_chunks(way, generator, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)  # 64 rows, the least
    monkeypatch.setitem(tables_of.CHUNK_BYTES, "cpu", 1 if way == "masked" else 1000)
    blocks = torch.where(torch.rand(211, 1, generator=generator) < 0.8, 4, 1)
    compare(way, generator, blocks, tables(generator), 1e-10)


@every_way
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_bfloat16_is_near_the_reference_in_float64(way, gated, generator):
    """Against the same rounded numbers; bfloat16 has 8 bits, so 2e-2 of the largest value."""
    half = tables(generator, (B, 8, 16), gated=gated, dtype=torch.bfloat16)
    blocks = picks(generator)
    x, weights = drawn(generator, N, 16, dtype=torch.bfloat16), drawn(generator, N, SLOTS, dtype=torch.bfloat16)
    above = drawn(generator, N, 16, dtype=torch.bfloat16).detach()
    exact = [one.detach().double().requires_grad_() for one in (x, weights)]
    full = Tables._make([None if t is None else t.detach().double().requires_grad_() for t in half[:-1]] + ["gelu"])
    expected = results(reference.mix, exact[0], blocks, exact[1], full, above.double())
    assert_equal(results(WAYS[way], x, blocks, weights, half, above), expected, HALF_TOLERANCE)


@pytest.mark.parametrize("way", SKIPPING)
def test_blocks_that_nothing_chose_may_hold_nan(way, generator):
    own, blocks = tables(generator), picks(generator)
    spoiled = Tables._make([t if t is None or isinstance(t, str) else t.detach().clone() for t in own])
    for table in spoiled[:-1]:
        table[B - 1] = torch.nan
        table.requires_grad_()
    x, weights, above = drawn(generator, N, D), drawn(generator, N, SLOTS), drawn(generator, N, D).detach()
    found = results(WAYS[way], x, blocks, weights, spoiled, above)
    assert_equal(found, results(reference.mix, x, blocks, weights, own, above), 1e-10)
    assert all(gradient[B - 1].eq(0).all() for gradient in found[3:])


@pytest.mark.parametrize("mix", [reference.mix, masked.mix], ids=["reference", "masked"])
def test_large_numbers_in_blocks_that_nothing_chose_do_not_matter(mix, generator):
    own, blocks = tables(generator), picks(generator)
    x, weights, above = drawn(generator, N, D), drawn(generator, N, SLOTS), drawn(generator, N, D).detach()
    expected = results(reference.mix, x, blocks, weights, own, above)
    with torch.no_grad():
        for table in own[:-1]:
            table[B - 1] = 1e15
    assert_equal(results(mix, x, blocks, weights, own, above), expected, 1e-10)


@pytest.mark.parametrize("way", ["reference", *WAYS])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_gradcheck(way, gated, generator):
    own, blocks = tables(generator, (5, 2, 3), gated=gated), picks(generator, tokens=7, slots=2, blocks=5)
    present = [part is not None for part in own[:-1]]

    def of_parts(x: Tensor, weights: Tensor, *parts: Tensor) -> Tensor:
        left = iter(parts)
        whole = Tables._make([next(left) if held else None for held in present] + ["gelu"])
        return {"reference": reference.mix, **WAYS}[way](x, blocks, weights, whole)

    given = (drawn(generator, 7, 3), drawn(generator, 7, 2), *(part for part in own[:-1] if part is not None))
    assert torch.autograd.gradcheck(of_parts, given)


@every_way
def test_takes_broadcast_gradients(way, generator):
    """`sum` sends back one number seen N d times, which `grouped_mm` refuses."""
    own, blocks = tables(generator, (B, 8, 16), dtype=torch.float32), picks(generator)
    x, weights = drawn(generator, N, 16, dtype=torch.float32), drawn(generator, N, SLOTS, dtype=torch.float32)
    expected = torch.autograd.grad(reference.mix(x, blocks, weights, own).sum(), x)[0]
    found = torch.autograd.grad(WAYS[way](x, blocks, weights, own).sum(), x)[0]
    assert_equal([found], [expected], 1e-5)


def test_chunks_fit_the_cache_of_a_cpu_and_are_few_elsewhere():
    """2048 tokens by 1024 blocks of 8 cells are 64 MiB."""
    own = Tables(torch.empty(1024, 8, 16), None, torch.empty(1024, 8, 16), None, None, "gelu")
    x = torch.empty(2048, 16)
    assert len(masked._chunks(own, x)) == 16
    assert masked._chunks(own, x.to("meta")) == [slice(0, 1024)]


@pytest.mark.parametrize(
    ("size", "width", "dtype", "used"),
    [
        (8, 16, torch.float32, 6),
        (8, 16, torch.bfloat16, 6),
        (8, 16, torch.float64, 0),
        (5, 16, torch.float32, 2),  # what has rows of 5 numbers is refused
        (8, 13, torch.float32, 0),
    ],
)
def test_grouped_mm_is_used_where_its_rules_allow(size, width, dtype, used, generator, monkeypatch):
    calls, plain = [], torch.nn.functional.grouped_mm

    def counted(*given, offs):
        calls.append(1)
        return plain(*given, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    own = tables(generator, (B, size, width), gated=False, biases=False, dtype=dtype)
    x, weights = drawn(generator, N, width, dtype=dtype), drawn(generator, N, SLOTS, dtype=dtype)
    blocks, above = picks(generator), drawn(generator, N, width, dtype=dtype).detach()
    found = results(grouped_mm.mix, x, blocks, weights, own, above)
    assert len(calls) == used
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    assert_equal(found, results(reference.mix, x, blocks, weights, own, above), tolerance)


def test_a_table_at_an_odd_address_is_multiplied_block_by_block(generator):
    """Memory-mapped weights need not begin at a multiple of 16 bytes."""
    room = torch.randn(B * 8 * 16 + 1, generator=generator)
    table, rows = room[1:].view(B, 8, 16), torch.randn(N, 8, generator=generator)
    ends = torch.arange(1, B + 1, dtype=torch.int32) * 4
    ends[-1] = N
    expected = [part @ table[i] for i, part in enumerate(rows.tensor_split(ends[:-1].tolist()))]
    assert torch.allclose(grouped_mm.product(rows, table, ends), torch.cat(expected), atol=1e-5)


def test_values_alone_by_both_ways(generator):
    blocks, values = picks(generator, slots=11, blocks=23), drawn(generator, 23, 1, D)
    weights, above = drawn(generator, N, 11), drawn(generator, N, D).detach()

    def both(read: Callable) -> list[Tensor]:
        made = read(blocks, weights, values)
        return [made.detach(), *torch.autograd.grad(made, [weights, values], above)]

    assert_equal(both(gather.read), both(reference.read), 1e-10)
    by_hand = sum(weights[5, s] * values[blocks[5, s], 0] for s in range(11) if blocks[5, s] >= 0)
    assert torch.allclose(reference.read(blocks, weights, values)[5], by_hand)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_the_activations(name, generator):
    z, gradient = drawn(generator, 101), torch.randn(101, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(ACTIVATIONS[name](z), z, gradient)[0]
    assert torch.allclose(backward_of(name)(gradient.clone(), z.detach()), expected, rtol=0, atol=1e-12)


def test_an_activation_without_a_written_derivative(generator, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "sine", torch.sin)
    z = torch.randn(11, generator=generator)
    assert torch.allclose(backward_of("sine")(torch.ones(11), z), z.cos())


@pytest.mark.parametrize("backend", ["reference", "masked"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_without_a_break(backend, compiler, generator):
    if compiler == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    memory = Memory(D, B, G, gated=True, bias=True, picker=Picker(backend))
    x, blocks = drawn(generator, N, D, dtype=torch.float32), picks(generator)
    weights = drawn(generator, N, SLOTS, dtype=torch.float32)
    given = [x, weights, *memory.parameters()]
    expected = torch.autograd.grad(memory(x, blocks, weights).square().sum(), given)
    compiled = torch.compile(memory, backend=compiler, fullgraph=True)
    found = torch.autograd.grad(compiled(x, blocks, weights).square().sum(), given)
    assert_equal(list(found), list(expected), 1e-5)


@pytest.mark.parametrize("backend", ["auto", "grouped", "gather"])
def test_compiled_around_what_runs_eagerly(backend, generator):
    memory = Memory(D, B, G, gated=True, picker=Picker(backend))
    x, blocks = drawn(generator, N, D, dtype=torch.float32), picks(generator)
    weights = drawn(generator, N, SLOTS, dtype=torch.float32)
    given = [x, weights, *memory.parameters()]
    expected = torch.autograd.grad(memory(x, blocks, weights).square().sum(), given)
    compiled = torch.compile(memory, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, blocks, weights).square().sum(), given)
    assert_equal(list(found), list(expected), 1e-5)
