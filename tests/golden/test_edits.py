"""Edits against forward passes written by hand, in float64."""

import contextlib
import copy
import functools
from itertools import permutations

import pytest
import torch
from torch import nn

from families import WINDOW, family, random_ids, tiny_model
from loops import elements, hand_logits, layers_of
from transect.errors import InputError
from transect.view import edits
from transect.view.sites import COMMON, ELEMENTS, NEXT
from transect.view.view import View
from transect.view.walk import OrderError

HAND = ("gpt2", "bert", "llama")
LAYERS = 5
ORDERS = {
    "identity": (0, 1, 2, 3, 4),
    "permuted": (3, 0, 4, 1, 2),
    "repeated": (0, 1, 1, 3, 4),
    "omitted": (0, 2, 4),
    "one": (2,),
    "longer": (0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 4),
}
ATOL = 1e-10


@functools.cache
def view_of(name: str, layers: int | None = None) -> View:
    return View(tiny_model(name, torch.float64, layers=layers))


@pytest.fixture(params=HAND)
def view(request) -> View:
    return view_of(request.param, LAYERS)


@pytest.fixture
def ids(generator) -> torch.Tensor:
    return random_ids((2, 11), generator)


@functools.cache
def twin_of(name: str) -> nn.Module:
    """The same model again, which no edit touches."""
    return tiny_model(name, torch.float64, layers=LAYERS)


def by_hand(view: View, ids: torch.Tensor, *given, **settings) -> torch.Tensor:
    return hand_logits(twin_of(view.model.config.model_type), ids, *given, **settings)


def part_of(view: View, layer: int, element: str, *, own: bool = False):
    """An element of a layer, computed by hand with modules of the twin or of the model itself."""
    model = view.model if own else twin_of(view.model.config.model_type)
    return elements(model, layers_of(model)[layer])[element]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


def state(view: View) -> dict:
    """All that an edit could leave changed."""
    modules = list(view.model.modules())
    return {
        "container": [id(view.base.get_submodule(view.container)), *map(id, view.base.get_submodule(view.container))],
        "modules": [id(module) for module in modules],
        "config": copy.deepcopy(view.model.config.to_dict()),
        "cache": [(getattr(m, "layer_idx", None), getattr(m, "layer_id", None)) for m in modules],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "weights": [(name, id(p), p._version) for name, p in view.model.named_parameters()],
        "view": (list(map(id, view.layers)), list(map(id, view.maps)), list(view.executed), list(view.modules)),
    }


# the order of layers


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_order(view, ids, order):
    with edits.order(view, order):
        assert view.executed == list(order)
        assert view.num_layers == len(order)
        close(view.logits(ids), by_hand(view, ids, order))


def test_hand_written_orders_differ(view, ids):
    results = [by_hand(view, ids, order) for order in ORDERS.values()]
    for first, second in permutations(range(len(results)), 2):
        assert (results[first] - results[second]).abs().max() > 1e-3


def test_identity_order_is_bit_equal(view, ids):
    plain = view.logits(ids)
    with edits.order(view, range(LAYERS)):
        assert torch.equal(view.logits(ids), plain)


def test_swap(view, ids):
    with edits.swap(view, 1, 3):
        close(view.logits(ids), by_hand(view, ids, (0, 3, 2, 1, 4)))


def test_swap_twice_restores(view, ids):
    plain = view.logits(ids)
    with edits.swap(view, 1, 3), edits.swap(view, 1, 3):
        assert view.executed == list(range(LAYERS))
        assert torch.equal(view.logits(ids), plain)


@pytest.mark.parametrize("times", [0, 1, 2, 4])
def test_repeat(view, ids, times):
    with edits.repeat(view, 2, times):
        close(view.logits(ids), by_hand(view, ids, (0, 1, *[2] * times, 3, 4)))


def test_captures_follow_the_executed_order(view, ids):
    with edits.order(view, (4, 1, 1)), torch.no_grad(), view.capture(("resid", NEXT)) as capture:
        view.run(ids)
    assert len(capture.keys()) == 6
    for place, layer in enumerate((4, 1, 1)):
        with torch.no_grad():
            close(capture[NEXT, place], part_of(view, layer, "layer")(capture["resid", place]))


def test_repeated_layers_share_their_parameters(view):
    with edits.repeat(view, 2, 3):
        first, second, third = view.layers[2:5]
        assert first is not second
        assert all(a is b is c for a, b, c in zip(*(x.parameters() for x in (first, second, third)), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neo", "gemma2", "gptj", "falcon"])
def test_cache_follows_the_order(name, generator):
    view, prompt = view_of(name), random_ids((1, 5), generator)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(prompt)
    with edits.order(view, (1, 0, 0, 2, 2)):
        plain = view.model.generate(prompt, use_cache=False, **settings)
        assert torch.equal(view.model.generate(prompt, use_cache=True, **settings), plain)


def test_equal_layers_swap_without_effect(ids):
    view = View(tiny_model("gpt2", torch.float64))
    view.layers[1].load_state_dict(view.layers[2].state_dict())
    plain = view.logits(ids)
    with edits.swap(view, 1, 2):
        assert torch.equal(view.logits(ids), plain)
    with edits.swap(view, 0, 1):
        assert (view.logits(ids) - plain).abs().max() > 1e-3


def equal_norms(view: View) -> None:
    for layer in view.layers[1:]:
        first = dict(view.layers[0].named_parameters())
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if "LayerNorm" in name or "ln_" in name:
                    parameter.copy_(first[name])


@pytest.mark.parametrize("name", ["gpt2", "bert", "gpt_neox", "gemma2"])
def test_zeroed_branches_commute(name, ids):
    view = View(tiny_model(name, torch.float64))
    if name == "bert":
        equal_norms(view)
    with contextlib.ExitStack() as stack:
        for layer in range(3):
            stack.enter_context(edits.remove(view, "attn", layer))
            stack.enter_context(edits.remove(view, "ffn", layer))
        plain = view.logits(ids)
        for order in permutations(range(3)):
            with edits.order(view, order):
                assert torch.equal(view.logits(ids), plain)
    assert (view.logits(ids) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*HAND, "gpt_neox"])
def test_planted_layers_that_do_not_commute(name, ids):
    view = view_of(name)
    with edits.replace(view, "layer", 0, lambda h: h + 1), edits.replace(view, "layer", 1, lambda h: 2 * h):
        for order, planted in (((0, 1), lambda h: 2 * h + 2), ((1, 0), lambda h: 2 * h + 1)):
            with edits.order(view, order), torch.no_grad(), view.capture(("resid", NEXT)) as capture:
                view.run(ids)
            close(capture[NEXT, 1], planted(capture["resid", 0]))


# removal


@pytest.mark.parametrize("part", ["attn", "ffn"])
def test_remove_sublayer(view, ids, part):
    with edits.remove(view, part, 2):
        expected = by_hand(view, ids, changed={2: {part: torch.zeros_like}})
        close(view.logits(ids), expected)


@pytest.mark.parametrize("name", HAND)
def test_removed_ffn_adds_exactly_zero(name, ids):
    view = view_of(name, LAYERS)
    with torch.no_grad(), edits.remove(view, "ffn", 2), view.capture(("resid_mid", "ffn_out", NEXT), [2]) as capture:
        view.run(ids)
        middle = capture["resid_mid", 2]
        expected = view.layers[2].output.LayerNorm(middle) if name == "bert" else middle
    assert not capture["ffn_out", 2].any()
    assert torch.equal(capture[NEXT, 2], expected)


def test_remove_head(view, ids):
    heads = part_of(view, 2, "attn_heads")
    for head in range(4):

        def silenced(x, head=head):
            kept = heads(x).unflatten(-1, (4, -1)).clone()
            kept[..., head, :] = 0
            return kept.flatten(-2)

        with edits.remove(view, "head", 2, head):
            close(view.logits(ids), by_hand(view, ids, changed={2: {"attn_heads": silenced}}))


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_remove_layer(view, ids, layer):
    with edits.remove(view, "layer", layer):
        close(view.logits(ids), by_hand(view, ids, [other for other in range(LAYERS) if other != layer]))


def test_removal_moves_with_its_layer(view, ids):
    changed = {1: {"ffn": torch.zeros_like}}
    expected = by_hand(view, ids, (0, 3, 2, 1, 4), changed)
    with edits.remove(view, "ffn", 1), edits.swap(view, 1, 3):
        close(view.logits(ids), expected)
    with edits.swap(view, 1, 3), edits.remove(view, "ffn", 3):
        close(view.logits(ids), expected)


def test_removal_of_a_repeated_layer(view, ids):
    changed = {1: {"attn": torch.zeros_like}}
    with edits.remove(view, "attn", 1), edits.repeat(view, 1, 3):
        close(view.logits(ids), by_hand(view, ids, (0, 1, 1, 1, 2, 3, 4), changed))


def test_nested_orders(view, ids):
    with edits.order(view, (4, 2, 0)), edits.order(view, (2, 0, 0)):
        assert view.executed == [0, 4, 4]
        close(view.logits(ids), by_hand(view, ids, (0, 4, 4)))


# residuals


@pytest.mark.parametrize("residual", ["attn", "ffn", "both"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_scale_residual(view, ids, weight, residual):
    weights = (1.0 if residual == "ffn" else weight, 1.0 if residual == "attn" else weight)
    with edits.scale_residual(view, 2, weight, residual):
        close(view.logits(ids), by_hand(view, ids, stream_weights={2: weights}))


def test_scaled_residual_moves_with_its_layer(view, ids):
    with edits.scale_residual(view, 1, 0.0), edits.swap(view, 1, 3):
        expected = by_hand(view, ids, (0, 3, 2, 1, 4), stream_weights={1: (0.0, 0.0)})
        close(view.logits(ids), expected)


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "cohere", "phi"])
@pytest.mark.parametrize("residual", ["attn", "ffn", "both"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_scale_the_one_residual_of_a_parallel_layer(name, ids, weight, residual):
    view = view_of(name)
    with torch.no_grad(), view.capture(("resid", "attn_out", "ffn_out"), [1]) as capture:
        view.run(ids)
    expected = weight * capture["resid", 1] + capture["attn_out", 1] + capture["ffn_out", 1]
    with (
        torch.no_grad(),
        edits.scale_residual(view, 1, weight, residual),
        view.capture((NEXT,), [1]) as capture,
    ):
        view.run(ids)
    close(capture[NEXT, 1], expected)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_scale_residual_of_scaled_branches(ids, weight):
    view = view_of("granite")
    with torch.no_grad(), view.capture(("resid", "attn_out"), [1]) as plain:
        view.run(ids)
    with torch.no_grad(), edits.scale_residual(view, 1, weight, "attn"), view.capture(("resid_mid",), [1]) as capture:
        view.run(ids)
    close(capture["resid_mid", 1], weight * plain["resid", 1] + plain["attn_out", 1])


# replacement


def test_hand_written_elements_cover_all(view):
    assert set(elements(view.model, layers_of(view.model)[0])) == set(COMMON)


@pytest.mark.parametrize("element", COMMON)
def test_replace_by_the_same_computation_changes_nothing(view, ids, element):
    plain = view.logits(ids)
    part = part_of(view, 2, element, own=True)
    calls = []

    def counted(x):
        calls.append(x.shape)
        return part(x)

    with edits.replace(view, element, 2, counted):
        close(view.logits(ids), plain)
    assert calls


@pytest.mark.parametrize("element", COMMON)
def test_replace_by_a_linear_map(view, ids, generator, element):
    taken = {site: view.maps[2].taps[site] for site in ELEMENTS[element].sites}
    with torch.no_grad(), view.capture(list(taken), [2]) as capture:
        view.run(ids)
    wide_in, wide_out = (capture[site, 2].shape[-1] for site in (ELEMENTS[element].source, ELEMENTS[element].target))
    linear = nn.Linear(wide_in, wide_out, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / wide_in**0.5)
    with edits.replace(view, element, 2, linear):
        changed = view.logits(ids)
    close(changed, by_hand(view, ids, changed={2: {element: linear}}))
    assert (changed - view.logits(ids)).abs().max() > 1e-3


def test_replacement_may_call_captured_modules(view, ids):
    part = part_of(view, 2, "ffn", own=True)
    sites = ("ffn_in", "ffn_hidden", "ffn_out")
    with torch.no_grad(), view.capture(sites, [2]) as plain:
        view.run(ids)
    with torch.no_grad(), edits.replace(view, "ffn", 2, part), view.capture(sites, [2]) as capture:
        view.run(ids)
    for site in sites:
        close(capture[site, 2], plain[site, 2])


def test_replacement_moves_with_its_layer(view, ids):
    with edits.replace(view, "ffn", 1, torch.sin), edits.swap(view, 1, 3):
        expected = by_hand(view, ids, (0, 3, 2, 1, 4), {1: {"ffn": torch.sin}})
        close(view.logits(ids), expected)


ARRIVING = ("ffn", "attn", "attn_norm", "ffn_norm", "layer", "attn_sublayer", "ffn_sublayer")
SEQUENTIAL = ("granite", "olmo2", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "opt")
IN_PARALLEL = ("ffn", "attn", "attn_norm", "layer")  # those without resid_mid


@pytest.mark.parametrize(
    ("name", "element"),
    [(name, element) for name in SEQUENTIAL for element in ARRIVING]
    + [(name, element) for name in ("falcon", "gpt_neox") for element in IN_PARALLEL],
)
def test_replacement_arrives_in_other_layouts(name, element, ids):
    """What follows the target is the sum of the layer's residual algebra with the new tensor in it."""
    view, chosen = view_of(name), ELEMENTS[element]

    def new(x):
        return torch.sin(x).roll(1, dims=-1)

    sites = [site for site in view.maps[1].taps if site not in ("router_logits", "selected")]
    with edits.replace(view, element, 1, new), torch.no_grad(), view.capture(sites, [1]) as seen:
        view.run(ids)
    close(seen[chosen.target, 1], new(seen[chosen.source, 1]))
    if element != "layer" and element != "ffn_sublayer":
        middle = seen["resid", 1] + seen["attn_out", 1]
        close(seen[NEXT, 1], middle + seen["ffn_out", 1])
        if not view.maps[1].parallel:
            close(seen["resid_mid", 1], middle)


# attention weights of gpt_oss do not add up to one, so its heads depend on the position
@pytest.mark.parametrize(
    ("name", "element"),
    [(name, "attn_norm") for name in ("llama", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_neox", "falcon", "phi")]
    + [(name, "ffn_norm") for name in ("llama", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")],
)
def test_replaced_input_reaches_every_reader(name, element, ids):
    """With a constant input for all positions, a sub-layer gives one output for all of them."""
    view = view_of(name)
    target = "attn_out" if element == "attn_norm" else "ffn_out"
    row = torch.linspace(-1, 1, view.width, dtype=torch.float64)
    with (
        edits.replace(view, element, 1, lambda x: row.expand_as(x)),
        torch.no_grad(),
        view.capture((target,), [1]) as capture,
    ):
        view.run(ids)
    # equal values make attention weights irrelevant, rotations of queries and keys too
    torch.testing.assert_close(capture[target, 1], capture[target, 1][:1, :1].expand(2, 11, -1), rtol=0, atol=1e-6)


# restoring


EDITS = {
    "order": lambda view: edits.order(view, (2, 0, 0, 1)),
    "swap": lambda view: edits.swap(view, 0, 2),
    "repeat": lambda view: edits.repeat(view, 1, 3),
    "attn": lambda view: edits.remove(view, "attn", 1),
    "ffn": lambda view: edits.remove(view, "ffn", 1),
    "head": lambda view: edits.remove(view, "head", 1, 3),
    "layer": lambda view: edits.remove(view, "layer", 1),
    "replace": lambda view: edits.replace(view, "ffn", 1, torch.sin),
    "scale": lambda view: edits.scale_residual(view, 1, 0.5),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", [*HAND, "albert", "gemma2", "smollm3", "gpt_neo", "modernbert", "gpt_neox"])
def test_edits_restore_everything(name, edit, ids):
    view = view_of(name)
    before, plain = state(view), view.logits(ids)
    with EDITS[edit](view):
        shared = name == "albert" and edit == "swap"  # one layer in both places
        assert shared or (view.logits(ids) - plain).abs().max() > 1e-6
    assert state(view) == before
    assert torch.equal(view.logits(ids), plain)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["gpt2", "albert", "gemma2"])
def test_edits_restore_after_an_exception(name, edit, ids):
    view = view_of(name)
    before, plain = state(view), view.logits(ids)
    with pytest.raises(ZeroDivisionError), EDITS[edit](view):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), EDITS[edit](view), edits.replace(view, "layer", 0, lambda _: 1 / 0):
        view.logits(ids)
    assert state(view) == before
    assert torch.equal(view.logits(ids), plain)


# families with per-layer settings or shared layers

SLIDING = ("gemma2", "gemma3_text", "qwen2/sliding", "qwen3/sliding", "smollm3", "gpt_oss", "gpt_neo", "modernbert")
MOVES = {"permuted": {3: (1, 0, 2), 5: (0, 3, 1, 2, 4)}, "longer": {3: (2, 1, 1, 0), 5: (0, 3, 3, 2, 4, 1)}}


def moved_model(name: str, order: tuple[int, ...], kinds: tuple[int, ...]) -> nn.Module:
    """A model built with the layers in this order; `kinds` says whose per-layer settings each takes."""
    loaded = tiny_model(name, torch.float64)
    config, chosen, settings = loaded.config, family(name), {}
    if name == "gpt_neo":
        settings["attention_types"] = [[[config.attention_layers[kind]], 1] for kind in kinds]
    else:
        settings["layer_types"] = [config.layer_types[kind] for kind in kinds]
    if name == "smollm3":
        settings["no_rope_layers"] = [config.no_rope_layers[kind] for kind in kinds]
    made = chosen.but(**settings)(len(order))
    made._experts_implementation = "eager"
    model = type(loaded)._from_config(made, dtype=torch.float64, attn_implementation="eager").eval()
    weights, prefix = loaded.state_dict(), f"{loaded.base_model_prefix}.{view_of(name).container}."
    kept = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    for place, layer in enumerate(order):
        start = f"{prefix}{layer}."
        kept |= {f"{prefix}{place}.{key[len(start) :]}": v for key, v in weights.items() if key.startswith(start)}
    model.load_state_dict(kept)
    return model


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", SLIDING)
def test_windows_move_with_their_layers(name, move, ids):
    view = view_of(name)
    order = MOVES[move][view.num_layers]
    assert ids.shape[1] > 2 * WINDOW
    with torch.no_grad():
        expected = View(moved_model(name, order, order)).logits(ids)
        with edits.order(view, order):
            close(view.logits(ids), expected)


@pytest.mark.parametrize("name", SLIDING)
def test_windows_that_stay_would_show(name, ids):
    order = MOVES["permuted"][view_of(name).num_layers]
    with torch.no_grad():
        moved = moved_model(name, order, order)(input_ids=ids).logits
        stayed = moved_model(name, order, tuple(range(len(order))))(input_ids=ids).logits
    assert (moved - stayed).abs().max() > 1e-3


@pytest.mark.parametrize("order", [(0, 1), (0,), (0, 1, 2, 2, 1), (2, 1, 0)], ids=str)
def test_order_of_one_shared_layer(ids, order):
    view = view_of("albert")
    model = tiny_model("albert", torch.float64, layers=len(order))
    with torch.no_grad(), edits.order(view, order):
        close(view.logits(ids), model(input_ids=ids).logits)


def test_removal_in_one_place_of_a_shared_layer(ids):
    view = view_of("albert")
    with torch.no_grad(), edits.remove(view, "ffn", 1), view.capture(("ffn_out",)) as capture:
        view.run(ids)
    assert [bool(capture["ffn_out", layer].any()) for layer in range(3)] == [True, False, True]
    with edits.remove(view, "ffn", 1):
        removed = view.logits(ids)
        with edits.order(view, (0, 1, 2)):
            assert torch.equal(view.logits(ids), removed)
        with edits.order(view, (1, 0, 2)), torch.no_grad(), view.capture(("ffn_out",)) as capture:
            view.run(ids)
    assert [bool(capture["ffn_out", layer].any()) for layer in range(3)] == [False, True, True]


@pytest.mark.parametrize("order", [(2, 0, 1), (0, 2), (2, 2, 0, 1)], ids=str)
def test_order_of_groups_of_layers(ids, order):
    view = view_of("albert/two_groups")
    groups = [0, 0, 1]  # the group of each layer
    config = family("albert").but(num_hidden_groups=len(order))(len(order))
    model = type(view.model)._from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    weights, prefix = view.model.state_dict(), "albert.encoder.albert_layer_groups."
    kept = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    for place, layer in enumerate(order):
        start = f"{prefix}{groups[layer]}."
        kept |= {f"{prefix}{place}.{key[len(start) :]}": v for key, v in weights.items() if key.startswith(start)}
    model.load_state_dict(kept)
    with torch.no_grad(), edits.order(view, order):
        close(view.logits(ids), model(input_ids=ids).logits)


def test_layers_run_in_an_inner_loop_cannot_be_reordered(ids):
    view = view_of("albert/two_inner")
    plain = view.logits(ids)
    with pytest.raises(InputError, match="in a loop"), edits.swap(view, 0, 1):
        pass
    assert torch.equal(view.logits(ids), plain)


# wrong input and tampering


def test_tampering_with_the_order_is_noticed(ids):
    view = View(tiny_model("gpt2", torch.float64))
    with edits.swap(view, 0, 1):
        view.base.h = nn.ModuleList([view.base.h[1], view.base.h[0], view.base.h[2]])
        with pytest.raises(OrderError, match="place 0 is not the one expected"):
            view.logits(ids)
    view.logits(ids)


def test_silently_dropped_layer_is_noticed(ids):
    view = View(tiny_model("llama", torch.float64))
    with edits.repeat(view, 1, 2):
        view.model.config.num_hidden_layers = 3
        with pytest.raises(OrderError, match="3 layers were executed, 4 were expected"):
            view.logits(ids)
    assert view.model.config.num_hidden_layers == 3


WRONG = {
    "empty order": (lambda v: edits.order(v, ()), "an empty order cannot be run"),
    "order beyond": (lambda v: edits.order(v, (0, 5)), "layer 5 cannot be run; .* has layers 0 to 4"),
    "order negative": (lambda v: edits.order(v, (0, -1)), "layer -1 cannot be run"),
    "swap beyond": (lambda v: edits.swap(v, 0, 5), "layer 5 does not exist; .* has layers 0 to 4"),
    "swap negative": (lambda v: edits.swap(v, -1, 0), "layer -1 does not exist"),
    "repeat beyond": (lambda v: edits.repeat(v, 7, 2), "layer 7 does not exist"),
    "repeat negative": (lambda v: edits.repeat(v, 1, -1), "times is -1"),
    "remove beyond": (lambda v: edits.remove(v, "ffn", 5), "layer 5 does not exist"),
    "unknown part": (lambda v: edits.remove(v, "mlp", 0), "unknown part 'mlp'; parts are attn, ffn, head, layer"),
    "head beyond": (lambda v: edits.remove(v, "head", 0, 4), "head is 4; layer 0 has heads 0 to 3"),
    "head negative": (lambda v: edits.remove(v, "head", 0, -1), "head is -1"),
    "no head": (lambda v: edits.remove(v, "head", 0), "head is None"),
    "replace beyond": (lambda v: edits.replace(v, "ffn", 5, torch.sin), "layer 5 does not exist"),
    "unknown element": (lambda v: edits.replace(v, "mlp", 0, torch.sin), "unknown element 'mlp'; elements are ffn,"),
    "scale beyond": (lambda v: edits.scale_residual(v, 5, 0.5), "layer 5 does not exist"),
    "unknown residual": (lambda v: edits.scale_residual(v, 0, 0.5, "mlp"), "unknown residual 'mlp'; allowed are attn"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    view = view_of("gpt2", LAYERS)
    make, message = WRONG[case]
    before = state(view)
    with pytest.raises(InputError, match=message), make(view):
        pass
    assert state(view) == before


def test_element_that_a_layer_lacks(ids):
    with pytest.raises(InputError, match="has no resid_mid: a parallel layer"):
        edits.replace(view_of("gpt_neox"), "ffn_sublayer", 0, torch.sin).__enter__()
    with pytest.raises(InputError, match="has no ffn_hidden: sparse FFN"):
        edits.replace(view_of("mixtral"), "ffn_up", 0, torch.sin).__enter__()


@pytest.mark.parametrize("wrong", [lambda x: x[..., :-1], lambda x: x[:1], lambda x: x.transpose(0, 1)])
def test_replacement_of_another_shape(ids, wrong):
    view = view_of("gpt2", LAYERS)
    with edits.replace(view, "ffn", 1, wrong), pytest.raises(InputError, match="replacement of ffn in layer 1 gives"):
        view.logits(ids)


def test_layer_with_attention_only(ids):
    model = tiny_model("gpt2", torch.float64)
    for block in model.transformer.h:
        block.mlp = Nothing()
        block.forward = functools.partial(attention_only, block)
    view = View(model)
    assert view.layouts == ("pre_norm",) * 3
    assert view.maps[0].sublayers == ("attn",)
    with pytest.raises(InputError, match="has no ffn_out: this layer has no FFN"), edits.remove(view, "ffn", 0):
        pass
    with pytest.raises(InputError, match="has no ffn_out"), edits.scale_residual(view, 0, 0.5, "ffn"):
        pass
    with torch.no_grad(), view.capture(("resid", "attn_out"), [1]) as plain:
        view.run(ids)
    for residual in ("attn", "both"):
        with torch.no_grad(), edits.scale_residual(view, 1, 0.5, residual), view.capture((NEXT,), [1]) as capture:
            view.run(ids)
        close(capture[NEXT, 1], 0.5 * plain["resid", 1] + plain["attn_out", 1])


class Nothing(nn.Module):
    """Stands where the FFN was."""


def attention_only(block, hidden_states, *args, attention_mask=None, **_):
    mask = args[1] if len(args) > 1 else attention_mask
    return hidden_states + block.attn(block.ln_1(hidden_states), attention_mask=mask)[0]
