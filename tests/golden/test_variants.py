"""Passes that start in the middle, and many edited models at once: the same bits as each model run by itself."""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, VARIANTS, random_ids, tiny_model
from transect.errors import InputError
from transect.view import edits
from transect.view.resume import resumed
from transect.view.variants import Change, Ran, Variant, planned_evaluations, run_all
from transect.view.view import View
from transect.view.walk import OrderError

NAMES = [name for name in (*FAMILIES, *VARIANTS) if name != "bloom/post_norm_residual"]  # refused: no known layout
LOOPED = "albert/two_inner"
MASK = torch.arange(11) < torch.tensor([11, 7, 2])[:, None]


@functools.cache
def view_of(name: str, layers: int | None = None) -> View:
    return View(tiny_model(name, torch.float32, layers=layers))


@pytest.fixture
def ids(generator: torch.Generator) -> Tensor:
    return random_ids(tuple(MASK.shape), generator)


def kept(view: View, ids: Tensor, head: bool = True) -> tuple[Tensor, list[object]]:
    """A whole pass and what every layer returned."""
    with torch.no_grad(), resumed(view, ()) as made:
        return view.run(ids, MASK, head=head), made


@contextmanager
def counted(view: View):
    """One entry for every time that the first part of a layer with weights of its own is really run."""
    calls: list[int] = []
    handles = []
    for layer in {id(module): module for module in view.layers}.values():
        inner = next(m for m in layer.modules() if m is not layer and not list(m.children()) and list(m.parameters()))
        handles.append(inner.register_forward_hook(lambda *_: calls.append(1)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def forwards(view: View) -> list[object]:
    return [module.__dict__.get("forward") for module in view.model.modules()]


def hooks(view: View) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules())


# passes from the middle


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_from_every_layer_has_the_bits_of_a_whole_one(name: str, ids: Tensor):
    view = view_of(name)
    with torch.no_grad():
        plain = {head: view.run(ids, MASK, head=head) for head in (True, False)}
    for head, expected in plain.items():
        whole, made = kept(view, ids, head)
        assert torch.equal(whole, expected) and len(made) == view.num_layers
        for start in range(view.num_layers + 1):
            with torch.no_grad(), counted(view) as calls, resumed(view, made[:start]) as rest:
                assert torch.equal(view.run(ids, MASK, head=head), expected)
            assert len(rest) == view.num_layers - start
            one = len(calls) / max(view.num_layers - start, 1)
            assert one == int(one) and (one > 0) == (start < view.num_layers)  # each layer as often as the others


def test_exactly_the_layers_behind_the_known_ones_are_computed(ids: Tensor):
    view = view_of("llama", 5)
    _, made = kept(view, ids)
    for start in range(6):
        with torch.no_grad(), counted(view) as calls, resumed(view, made[:start]):
            view.run(ids, MASK)
        assert len(calls) == 5 - start


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "albert", "gemma2", "mixtral"])
def test_a_pass_from_the_middle_inside_a_swap_and_an_edit(name: str, ids: Tensor):
    view = view_of(name)
    with ExitStack() as stack:
        stack.enter_context(edits.swap(view, 0, 2))
        stack.enter_context(edits.remove(view, "attn", 1))
        stack.enter_context(edits.replace(view, "ffn", 0, torch.cos))
        with torch.no_grad():
            expected = view.run(ids, MASK, head=True)
        whole, made = kept(view, ids)
        assert torch.equal(whole, expected)
        for start in range(4):
            with torch.no_grad(), resumed(view, made[:start]):
                assert torch.equal(view.run(ids, MASK, head=True), expected)
    assert not torch.equal(kept(view, ids)[0], expected)


@pytest.mark.parametrize("element", ["ffn_sublayer", "layer", "ffn_residual", "attn_sublayer"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_edit_in_a_known_layer_is_not_made_again(name: str, element: str, ids: Tensor):
    view, calls = view_of(name), []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return torch.cos(x)

    with edits.replace(view, element, 1, function):
        whole, made = kept(view, ids)
        calls.clear()
        with torch.no_grad(), resumed(view, made[:2]):
            assert torch.equal(view.run(ids, MASK, head=True), whole)
        assert not calls
        with torch.no_grad():
            assert torch.equal(view.run(ids, MASK, head=True), whole)
        assert calls


@pytest.mark.parametrize("name", NAMES)
def test_two_passes_inside_one_edit(name: str, ids: Tensor):
    """OPT's whole model calls its decoder directly, so that the base model's own call is never seen."""
    view = view_of(name)
    with torch.no_grad(), edits.remove(view, "ffn", 1):
        first, second = (view.run(ids, MASK, head=True) for _ in range(2))
        states = [view.run(ids, MASK) for _ in range(2)]
    assert torch.equal(first, second) and torch.equal(*states)


def test_known_outputs_of_another_text_are_what_goes_on(ids: Tensor):
    """What makes the comparisons above worth something."""
    view = view_of("llama")
    other = (ids + 1) % 97
    whole, made = kept(view, ids)
    with torch.no_grad(), resumed(view, made[:2]):
        assert torch.equal(view.run(other, MASK, head=True), whole)
    assert not torch.equal(kept(view, other)[0], whole)


def test_everything_is_restored_after_an_exception(ids: Tensor):
    view = view_of("gpt2")
    _, made = kept(view, ids)
    special = view.layers[1].forward
    before = (forwards(view), hooks(view), view.known)
    with resumed(view, made[:2]):
        assert "forward" in vars(view.layers[0]) and view.known == 2
    with pytest.raises(OrderError), resumed(view, made[:2]):
        view.layers[1](made[0])
    assert (forwards(view), hooks(view), view.known) == before and "forward" not in vars(view.layers[0])
    vars(view.layers[1])["forward"] = special  # as libraries that move layers between devices do
    try:
        with resumed(view, made[:2]):
            assert vars(view.layers[1])["forward"] is not special
        assert vars(view.layers[1])["forward"] is special
    finally:
        del vars(view.layers[1])["forward"]


def test_a_replacement_may_run_a_layer_that_is_known(ids: Tensor):
    """The calls a replacement makes of the model's own layers are no part of the pass."""
    view = view_of("gpt2")
    first: nn.Module = view.layers[0]

    def function(x: Tensor) -> Tensor:
        out = first(x)
        return out if isinstance(out, Tensor) else out[0]

    with edits.replace(view, "layer", 2, function):
        whole, made = kept(view, ids)
        with torch.no_grad(), resumed(view, made[:2]) as rest:
            assert torch.equal(view.run(ids, MASK, head=True), whole)
        assert len(rest) == 1


# many edited models


def swapped(i: int, j: int, layers: int) -> tuple[int, ...]:
    order = list(range(layers))
    order[i], order[j] = j, i
    return tuple(order)


def all_pairs(layers: int) -> list[Variant]:
    return [Variant(swapped(i, j, layers)) for i in range(layers) for j in range(i + 1, layers)]


def neighbours(layers: int) -> list[Variant]:
    return [Variant(swapped(i, i + 1, layers)) for i in range(layers - 1)]


def naive(view: View, ids: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """Logits and last states of a variant run by itself, without anything known."""
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(edits.order(view, variant.order))
        for layer, change in variant.changes:
            stack.enter_context(change.make(view, variant.order.index(layer)))
        return view.run(ids, MASK, head=True), view.run(ids, MASK)


def ran(view: View, ids: Tensor, variants: Sequence[Variant]) -> dict[int | None, Ran]:
    found = list(run_all(view, ids, MASK, variants))
    assert found[0].number is None and len({one.number for one in found}) == len(found) == len(variants) + 1
    assert sum(one.layers_run for one in found) == planned_evaluations(variants, view.num_layers)[0]
    return {one.number: one for one in found}


def assert_as_naive(view: View, ids: Tensor, variants: Sequence[Variant]) -> dict[int | None, Ran]:
    found = ran(view, ids, variants)
    plain = [Variant(tuple(range(view.num_layers))), *variants]
    for number, variant in zip((None, *range(len(variants))), plain, strict=True):
        logits, hidden = naive(view, ids, variant)
        got = found[number].logits
        assert got is not None and torch.equal(got, logits), variant
        assert torch.equal(found[number].hidden[MASK], hidden[MASK]), variant
    return found


@pytest.mark.parametrize("layers", [2, 3, 5, 7])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_all_swaps_cost_what_they_must_and_are_those_of_swap(name: str, layers: int, ids: Tensor):
    view = view_of(name, layers)
    variants = all_pairs(layers)
    found = assert_as_naive(view, ids, variants)
    assert sum(one.layers_run for one in found.values()) == (layers - 1) * layers * (layers + 1) // 3 + layers
    pairs = [(i, j) for i in range(layers) for j in range(i + 1, layers)]
    for number, (i, j) in enumerate(pairs):
        with torch.no_grad(), edits.swap(view, i, j):
            assert torch.equal(view.run(ids, MASK, head=True), found[number].logits)
    assert len({found[number].logits.double().sum().item() for number in found}) == len(pairs) + 1


def test_twelve_layers_take_572_and_12_layers_instead_of_792_and_12(ids: Tensor):
    view = view_of("gpt2", 12)
    assert planned_evaluations(all_pairs(12), 12) == (572 + 12, 792 + 12)
    with counted(view) as calls:
        found = ran(view, ids, all_pairs(12))
    assert sum(one.layers_run for one in found.values()) == 584
    assert len(calls) / 584 == 1


def test_planned_are_the_different_beginnings():
    variants = [*mixture(5), *all_pairs(5), *neighbours(5)]
    paths = [tuple((layer, ()) for layer in range(5)), *(variant.steps for variant in variants)]
    beginnings = {path[:length] for path in paths for length in range(1, len(path) + 1)}
    assert planned_evaluations(variants, 5) == (len(beginnings), sum(map(len, paths)))
    assert planned_evaluations(variants[::-1], 5) == planned_evaluations(variants, 5)
    assert planned_evaluations([], 5) == (5, 5)


@pytest.mark.parametrize("layers", [2, 3, 5, 7, 12])
def test_neighbours_cost_what_they_must(layers: int, ids: Tensor):
    expected = (layers - 1) * (layers + 2) // 2 + layers
    assert planned_evaluations(neighbours(layers), layers)[0] == expected
    assert sum(one.layers_run for one in ran(view_of("gpt2", layers), ids, neighbours(layers)).values()) == expected


def zero(part: str) -> Change:
    return Change(f"zero {part}", lambda view, place: edits.remove(view, part, place))


def mapped(element: str, function: Callable[[Tensor], Tensor]) -> Change:
    return Change(f"{function.__name__} {element}", lambda view, place: edits.replace(view, element, place, function))


def mixture(layers: int) -> list[Variant]:
    """Shuffles, orders longer and shorter than the model, left-out layers, changes inside layers, equal ones."""
    intact = tuple(range(layers))
    cos, sin = mapped("ffn", torch.cos), mapped("layer", torch.sin)
    found = [
        Variant((3, 0, 4, 1, 2)),
        Variant((0, 1, 0, 1, 0)),
        Variant((2,) * 7),
        Variant((0, 1, 2, 3, 4, 4, 0)),
        Variant((0, 1, 3, 4)),
        Variant((0, 1)),
        Variant((4,)),
        Variant((3, 0, 4, 1, 2)),
        Variant(intact),
        Variant((0, 2, 1, 3, 4), ((2, cos),)),
        Variant((0, 2, 1, 3, 4), ((1, cos),)),
        Variant((0, 1, 1, 2), ((1, zero("attn")),)),
        Variant(intact, ((1, cos), (1, zero("attn")))),
        Variant(intact, ((1, sin), (3, sin))),
        Variant(intact, ((1, sin),)),
    ]
    found += [Variant(intact, tuple((layer, zero("ffn")) for layer in range(top + 1))) for top in intact]
    return found + [Variant(intact, tuple((layer, zero("ffn")) for layer in range(low, layers))) for low in intact]


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "olmo2", "gptj", "mixtral", "albert"])
def test_every_kind_of_variant_is_as_if_run_alone(name: str, ids: Tensor):
    view = view_of(name, 5)
    before = (forwards(view), hooks(view), list(view.executed))
    found = assert_as_naive(view, ids, mixture(5))
    assert (forwards(view), hooks(view), list(view.executed)) == before
    assert found[0].layers_run + found[7].layers_run == 5  # equal variants, run once
    assert found[8].layers_run == 0 and torch.equal(found[8].logits, found[None].logits)


def test_a_model_without_a_head_gives_states(ids: Tensor):
    view = View(tiny_model("bert").bert)
    found = list(run_all(view, ids, MASK, neighbours(3)))
    assert [one.logits for one in found] == [None] * 3
    with torch.no_grad():
        assert torch.equal(found[0].hidden, view.run(ids, MASK))


def test_the_order_in_which_variants_are_given_does_not_matter(ids: Tensor):
    view, variants = view_of("gpt2", 5), mixture(5)
    expected = ran(view, ids, variants)
    shuffled = torch.randperm(len(variants), generator=torch.Generator().manual_seed(3)).tolist()
    found = ran(view, ids, [variants[at] for at in shuffled])
    for number, at in enumerate(shuffled):
        assert torch.equal(found[number].logits, expected[at].logits)


def test_a_change_in_a_layer_that_is_left_out_changes_nothing(ids: Tensor):
    view = view_of("gpt2", 3)
    found = ran(view, ids, [Variant((0, 2)), Variant((0, 2), ((1, zero("ffn")),))])
    assert torch.equal(found[0].logits, found[1].logits)


def test_a_looped_model_takes_changes_but_no_order(ids: Tensor):
    view = view_of(LOOPED)
    intact = tuple(range(view.num_layers))
    (plain, edited) = ran(view, ids, [Variant(intact, ((2, zero("ffn")),))]).values()
    with torch.no_grad(), edits.remove(view, "ffn", 2):
        assert torch.equal(view.run(ids, MASK, head=True), edited.logits)
    assert not torch.equal(plain.logits, edited.logits)
    with pytest.raises(InputError, match="in a loop"):
        ran(view, ids, [Variant(intact[::-1])])
