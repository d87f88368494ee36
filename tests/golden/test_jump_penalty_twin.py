"""The penalty's fast path equals autograd; attached to Hugging Face models it equals a hand loop and the jump probe."""

import gc
import shutil
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import transect as tx
from families import VOCAB, enliven, random_ids, tiny_model
from plants import value, view_of
from transect.errors import InputError
from transect.metrics.angles import displacement
from transect.models.config import ModelConfig
from transect.models.heads import TransectForCausalLM, TransectForMaskedLM
from transect.models.penalties._chord import plain_turns, turns
from transect.models.penalties.base import loss_positions
from transect.models.penalties.jump import Jump
from transect.view import edits
from transect.view.view import View

WIDTH = 37
EPS = 1e-6
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
FAMILIES = ["gpt2", "llama", "bert", "albert"]
LAYERS = 3


def pairs(generator: torch.Generator, dtype: torch.dtype, move: float) -> tuple[Tensor, Tensor]:
    """States [2, 11, width] of many lengths, and where a layer moved them to."""
    before = torch.randn(2, 11, WIDTH, generator=generator, dtype=torch.float64)
    before = before * torch.logspace(-3, 3, 11, dtype=torch.float64)[:, None]
    after = before + move * before.norm(dim=-1, keepdim=True) * torch.randn(before.shape, generator=generator) / 6
    return before.to(dtype).requires_grad_(), after.to(dtype).requires_grad_()


def pulled(function, before: Tensor, after: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    psi, size_before, size_after = function(before, after, EPS)
    return (psi.detach(), size_before, size_after, *torch.autograd.grad((weight * psi).sum(), (before, after)))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("move", [0.03, 1.0, 30.0])
def test_fast_path_is_its_twin(dtype: torch.dtype, move: float, generator: torch.Generator):
    before, after = pairs(generator, dtype, move)
    weight = torch.randn(2, 11, generator=generator, dtype=torch.float64).to(dtype)
    fast, plain = pulled(turns, before, after, weight), pulled(plain_turns, before, after, weight)
    for own, twin in zip(fast[:3], plain[:3], strict=True):
        assert torch.equal(own, twin) and not own.requires_grad
    for own, twin, state in zip(fast[3:], plain[3:], (before, after), strict=True):
        size = 1 / state.detach().norm(dim=-1, keepdim=True)  # what gradients are measured in
        torch.testing.assert_close(own / size, twin / size, rtol=0, atol=BOUNDS[dtype])
        along = (own * state).sum(-1)
        assert float(along.detach().abs().max()) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fast_path_is_its_twin_in_half_precision(dtype: torch.dtype, generator: torch.Generator):
    before, after = (state.detach().to(dtype).requires_grad_() for state in pairs(generator, torch.float64, 0.3))
    weight = torch.rand(2, 11, generator=generator)
    fast, plain = pulled(turns, before, after, weight), pulled(plain_turns, before, after, weight)
    assert [found.dtype for found in fast] == [torch.float32] * 3 + [dtype] * 2
    for own, twin in zip(fast[:3], plain[:3], strict=True):
        assert torch.equal(own, twin)
    for own, twin in zip(fast[3:], plain[3:], strict=True):
        torch.testing.assert_close(own, twin, rtol=2 * torch.finfo(dtype).eps, atol=float(twin.abs().max()) * 1e-4)


def test_mixed_dtypes(generator: torch.Generator):
    before, after = pairs(generator, torch.float32, 0.3)
    half = after.detach().bfloat16().requires_grad_()
    weight = torch.rand(2, 11, generator=generator)
    for own, twin in zip(pulled(turns, before, half, weight), pulled(plain_turns, before, half, weight), strict=True):
        assert own.dtype == twin.dtype
        torch.testing.assert_close(own, twin, rtol=2e-5 if own.dtype == torch.float32 else 2e-2, atol=2e-5)


def test_near_zero_and_opposite_states(generator: torch.Generator):
    """Where a length is held at eps, and where rounding lifts Psi above 1."""
    base = torch.randn(1, 5, WIDTH, generator=generator)
    states = [base, -base, 1e-8 * base, base * torch.tensor([1e-7, 1e-6, 1e-9, 1.0, 0.0])[:, None], 0 * base]
    for first in states:
        for second in states:
            given = [state.clone().requires_grad_() for state in (first, second)]
            weight = torch.ones(1, 5)
            fast, plain = pulled(turns, *given, weight), pulled(plain_turns, *given, weight)
            assert all(torch.equal(own, twin) for own, twin in zip(fast[:3], plain[:3], strict=True))
            for own, twin, size in zip(fast[3:], plain[3:], fast[1:3], strict=True):
                scale = size.clamp_min(EPS)[..., None]  # what gradients are measured in
                torch.testing.assert_close(own * scale, twin * scale, rtol=0, atol=1e-5)


def test_gradcheck(generator: torch.Generator):
    before, after = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: turns(a, b, EPS)[0], (before, after))
    assert torch.autograd.gradcheck(lambda a, b: turns(a, b, 1.7)[0], (before, after))  # some lengths below eps
    assert torch.autograd.gradgradcheck(lambda a, b: turns(a, b, EPS)[0], (before, after))


def test_saves_the_states_themselves(generator: torch.Generator):
    before, after = pairs(generator, torch.bfloat16, 0.3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        turns(before, after, EPS)
    wide = [tensor for tensor in saved if tensor.numel() >= before.numel()]
    assert sorted(t.data_ptr() for t in wide) == sorted(t.data_ptr() for t in (before, after))
    assert sum(tensor.numel() for tensor in saved) == 2 * before.numel() + 3 * 22


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype: torch.dtype, generator: torch.Generator):
    before, after = (state.detach().to(dtype).requires_grad_() for state in pairs(generator, torch.float32, 0.3))
    weight = torch.rand(2, 11, generator=generator)
    outside = pulled(turns, before, after, weight)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pulled(turns, before, after, weight)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, generator: torch.Generator):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no compiler")
    before, after = pairs(generator, torch.float32, 0.3)
    counted = torch.rand(2, 11, generator=generator) < 0.7
    penalty = Jump(Jump.Config(), 1)

    def loss(before: Tensor, after: Tensor) -> Tensor:
        return penalty.total([penalty.layer(0, before, after, counted)]).loss

    torch.compiler.reset()
    plain, fast = (run(before, after) for run in (loss, torch.compile(loss, backend=backend, fullgraph=True)))
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=0)
    for own, twin in zip(*(torch.autograd.grad(x, (before, after)) for x in (fast, plain)), strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-4, atol=1e-6 * float(twin.abs().max()))


def by_hand(model: torch.nn.Module, ids: Tensor, norm: torch.nn.Module | None, mask: Tensor) -> list[Tensor]:
    """Psi of each layer from the model's own hidden states and plain cosines, with autograd's gradient.

    The last of a decoder's hidden states stands after its final norm, so the norm's input is taken by a hook.
    """
    last: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0])) if norm is not None else None
    hidden = list(model(ids, output_hidden_states=True).hidden_states)
    if handle is not None:
        handle.remove()
        assert not torch.allclose(hidden[-1], last[0])  # T12
        assert torch.allclose(hidden[-1], norm(last[0]))
        hidden[-1] = last[0]
    psi = [(1 - torch.cosine_similarity(a, b, dim=-1)) / 2 for a, b in pairwise(hidden)]
    return [values[mask].mean() for values in psi]


def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return random_ids((5, 13), generator), torch.rand(5, 13, generator=generator) < 0.8


def grads_of(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_attached_equals_a_hand_loop(name: str, dtype: torch.dtype, generator: torch.Generator):
    view, (ids, mask) = view_of(name, dtype, LAYERS), inputs(generator)
    assert view.num_layers == LAYERS
    with tx.penalties.Jump.attach(view, {"alpha": 1.0}, strength=0.25) as jump:
        assert view.model(ids).logits.shape == (5, 13, VOCAB)
        loss, stats, weighted = jump.loss(mask), jump.stats(mask), jump.value(mask)
        own = grads_of(view.model, loss)
    psi = by_hand(view.model, ids, view.final_norm, mask)
    weights = torch.softmax(torch.arange(LAYERS, dtype=dtype), 0)
    expected = sum(w * p for w, p in zip(weights, psi, strict=True))
    bound = BOUNDS[dtype]
    torch.testing.assert_close(stats["displacement"], torch.stack(psi).detach(), rtol=0, atol=bound)
    torch.testing.assert_close(weighted, expected.detach(), rtol=0, atol=bound)
    torch.testing.assert_close(loss, 0.25 * expected, rtol=0, atol=bound)
    assert not weighted.requires_grad
    twins = grads_of(view.model, 0.25 * expected)
    scale = max(float(grad.abs().max()) for grad in twins)
    assert scale > 1e-4
    for mine, theirs in zip(own, twins, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * scale)


def test_a_mask_of_numbers_as_tokenizers_give_it(generator: torch.Generator):
    view, (ids, mask) = view_of("gpt2", torch.float32, LAYERS), inputs(generator)
    with tx.penalties.Jump.attach(view, strength=0.25) as jump:
        view.model(ids)
        assert torch.equal(jump.loss(mask.long()), jump.loss(mask))
        assert not torch.equal(jump.loss(mask), jump.loss())


@pytest.mark.parametrize("name", [*FAMILIES, "gptj", "mixtral", "gemma2"])
@pytest.mark.parametrize("final_state", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("shape", ["half_one_minus_cos", "one_minus_cos", "arccos_over_pi"])
def test_attached_equals_the_probe(name: str, final_state: str, shape: str, generator: torch.Generator):
    view, ids = view_of(name, torch.float64, LAYERS), random_ids((5, 13), generator)
    settings = {"final_state": final_state, "displacement": shape}
    if final_state == "post_norm" and view.final_norm is None:
        with pytest.raises(InputError, match="no final norm; use pre_norm"):
            Jump.attach(view, settings)
        return
    with Jump.attach(view, settings) as jump, torch.no_grad():
        view.run(ids)
        stats = jump.stats()
    probe = tx.probes.Jump(displacement=shape, windows=False)
    table = tx.measure(view, [probe], tx.data.from_tokens(ids.numpy())).where(variant=f"{final_state}/all")
    for metric in ("displacement", "update_ratio", "stream_norm"):
        expected = [value(table, metric=metric, layer=layer) for layer in range(len(stats[metric]))]
        assert stats[metric].tolist() == pytest.approx(expected, abs=1e-12, rel=1e-12)
    assert float(stats["jump_rate"]) == pytest.approx(value(table, metric="jump_rate", layer=LAYERS - 1), abs=1e-10)


def test_same_bits_as_the_metric(generator: torch.Generator):
    before, after = pairs(generator, torch.float32, 0.3)
    rows = Jump(Jump.Config(), 1).rows(0, before, after)
    assert torch.equal(rows[0], displacement(before, after))


@pytest.mark.parametrize("name", FAMILIES)
def test_attached_in_training_mode(name: str, generator: torch.Generator):
    """Dropout and all: the penalty is that of the pass that the loss comes from, and the pass is not changed."""
    model = tiny_model(name, torch.float32, layers=LAYERS)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    view, (ids, mask) = View(model), inputs(generator)
    model.train()
    dropped = any(isinstance(module, torch.nn.Dropout) for module in model.modules())
    penalties, losses = [], []
    for seed, attached in ((1, False), (1, True), (2, True)):
        torch.manual_seed(seed)
        if not attached:
            losses.append(model(ids, labels=ids).loss)
            continue
        with Jump.attach(view) as jump:
            losses.append(model(ids, labels=ids).loss)
            penalties.append(jump.loss(mask))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(penalties[0], penalties[1]) != dropped
    (losses[1] + penalties[0]).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_ten_steps_with_strength_zero_are_those_without(strength: float, generator: torch.Generator):
    ids, mask = inputs(generator)
    ends = []
    for attached in (False, True):
        model = tiny_model("gpt2", torch.float32, layers=2)
        view = View(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with Jump.attach(view, strength=strength if attached else 0.0) as jump:
            for step in range(10):
                loss = model(ids, labels=ids).loss
                if attached:
                    loss = loss + jump.loss(mask, step)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        ends.append([loss.detach(), *(parameter.detach() for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True)) == (strength == 0)


def test_strength_zero_hooks_nothing():
    view = view_of("gpt2", torch.float32)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules())
    with Jump.attach(view, strength=0.0) as jump:
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules()) == hooks
        assert jump.loss() == 0
        with pytest.raises(InputError, match="strength is 0, so nothing is measured"):
            jump.value()
    with Jump.attach(view, {"final_state": "post_norm"}):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules()) > hooks
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules()) == hooks


def test_states_are_let_go_in_the_backward_pass(generator: torch.Generator):
    """While the handle stays, with its values."""
    view, ids = view_of("llama", torch.float32, LAYERS), random_ids((5, 13), generator)
    states: list[weakref.ref] = []
    hook = view.layers[1].register_forward_hook(
        lambda _, __, out: states.append(weakref.ref(out if isinstance(out, Tensor) else out[0]))
    )
    with Jump.attach(view) as jump:
        loss = view.model(ids, labels=ids).loss + jump.loss()
        gc.collect()
        assert states[0]() is not None
        loss.backward()
        del loss
        gc.collect()
        assert states[0]() is None
        assert jump.value() > 0
    hook.remove()
    view.model.zero_grad()


def test_each_pass_takes_the_place_of_the_last(generator: torch.Generator):
    view = view_of("gpt2", torch.float64)
    first, second = random_ids((2, 7), generator), random_ids((3, 5), generator)
    with Jump.attach(view) as jump, torch.no_grad():
        with pytest.raises(InputError, match="no pass was seen"):
            jump.loss()
        view.run(first)
        alone = jump.value()
        view.run(second)
        assert jump.value() != alone
        with pytest.raises(InputError, match=r"mask is \(2, 7\); the last pass had \(3, 5\)"):
            jump.loss(torch.ones(2, 7, dtype=torch.bool))
        view.run(first)
        assert torch.equal(jump.value(), alone)
    with pytest.raises(InputError, match="no pass was seen"):
        jump.loss()


def test_a_repeated_layer_counts_each_time(generator: torch.Generator):
    view, ids = view_of("gpt2", torch.float64), random_ids((3, 7), generator)
    with edits.repeat(view, 1, 3), Jump.attach(view, {"weights": "uniform"}) as jump, torch.no_grad():
        view.run(ids)
        assert len(jump.stats()["displacement"]) == view.num_layers == 4
        with view.capture(["resid", "resid_next"]) as seen:
            view.run(ids)
        psi = [displacement(seen["resid", place], seen["resid_next", place]).mean() for place in range(4)]
        torch.testing.assert_close(jump.stats()["displacement"], torch.stack(psi), rtol=0, atol=1e-15)


def test_an_edit_of_the_order_comes_first(generator: torch.Generator):
    view, ids = view_of("gpt2", torch.float64), random_ids((3, 7), generator)
    said = pytest.raises(InputError, match="runs 4 layers, it was attached to 2; attach it inside the edit")
    with Jump.attach(view), edits.repeat(view, 1, 3), said:
        view.run(ids)


def test_gradient_checkpointing_is_refused(generator: torch.Generator):
    model, ids = tiny_model("llama", layers=2), random_ids((2, 5), generator)
    view = View(model)
    model.activation_checkpointing_enable()
    with Jump.attach(view) as jump:
        model.eval()
        model(ids)
        assert jump.value() > 0
        model.train()
        with pytest.raises(InputError, match="turn gradient checkpointing off"):
            model(ids)
        model.activation_checkpointing_disable()
        (model(ids, labels=ids).loss + jump.loss()).backward()


def test_raw_embeddings_are_refused_where_a_norm_hides_them():
    assert Jump.attach(view_of("gpt2"), {"first_state": "embedding"}).penalty.reads_raw_embedding
    for name in ("bert", "albert", "bloom"):
        with pytest.raises(InputError, match="use after_embedding_norm"):
            Jump.attach(view_of(name), {"first_state": "embedding"})


def test_attached_it_takes_the_state_that_every_view_sees():
    assert Jump.Config().first_state == "embedding"
    for name, given in (("bert", None), ("bert", {"strength": 0.3}), ("llama", {})):
        assert Jump.attach(view_of(name), given).penalty.config.first_state == "after_embedding_norm"
    with pytest.raises(InputError, match="use after_embedding_norm"):
        Jump.attach(view_of("bert"), Jump.Config())


@pytest.mark.parametrize("saved", [False, True])
def test_an_embedding_norm_stands_between_the_two_first_states(saved: bool, generator: torch.Generator):
    """After the norm the penalty is the probe's displacement; before it, that of the sum of the tables' rows."""
    shape = {"vocab_size": VOCAB, "width": 20, "layers": LAYERS, "attention": {"heads": 2}, "objective": "masked"}
    shape |= {"embedding": {"norm": True}, "norm": {"layout": "post"}}
    ids, found = random_ids((3, 7), generator), {}
    for state in ("embedding", "after_embedding_norm"):
        torch.manual_seed(0)
        penalty = {"kind": "jump", "first_state": state}
        model = TransectForMaskedLM.make(ModelConfig.parse(shape | {"penalties": [penalty]})).double().train()
        enliven(model, 0)
        if saved:
            model.activation_checkpointing_enable()
        output = model(ids, labels=ids)
        found[state] = output.stats["jump.displacement"]
        assert any(bool(gradient.any()) for gradient in grads_of(model, output.losses["jump"]))
    model.eval()
    probe = tx.measure(View(model), [tx.probes.Jump(windows=False)], tx.data.from_tokens(ids.numpy()))
    probe = probe.where(variant="pre_norm/all", metric="displacement")
    expected = [value(probe, layer=layer) for layer in range(LAYERS)]
    assert found["after_embedding_norm"].tolist() == pytest.approx(expected, abs=1e-12)
    with torch.no_grad():
        raw = model.model.embeddings.tokens(ids)
        after = model(ids, output_hidden_states=True).hidden_states[1]
        first = displacement(raw, after).mean()
    torch.testing.assert_close(found["embedding"][0], first, rtol=0, atol=1e-12)
    assert abs(first - expected[0]) > 1e-4
    assert found["embedding"].tolist()[1:] == pytest.approx(expected[1:], abs=1e-12)


def test_settings_of_another_number_of_layers_are_refused():
    with pytest.raises(InputError, match="give one number for each of 2 layers"):
        Jump.attach(view_of("gpt2"), {"weights": [1.0, 2.0, 3.0]})


@pytest.mark.parametrize(
    ("settings", "penalty"),
    [
        ({}, {}),
        ({"share": [0]}, {"weights": "uniform"}),
        ({"norm": {"layout": "post"}, "objective": "masked"}, {"stop_grad": "prev"}),
        ({"norm": {"type": "rms"}}, {"final_state": "post_norm"}),
        ({"residual": {"ffn": 0.3}}, {"hinge": True, "weights": "uniform"}),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_our_own_model_pays_what_is_attached(settings: dict, penalty: dict, saved: bool, generator: torch.Generator):
    """The penalty inside the model, also in checkpointed regions, is that of its view: loss and gradients."""
    shape = {"vocab_size": VOCAB, "width": 20, "layers": LAYERS, "attention": {"heads": 2}} | settings
    kind = TransectForMaskedLM if settings.get("objective") else TransectForCausalLM
    ids = random_ids((3, 7), generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.7, ids, -100)
    torch.manual_seed(0)
    plain = kind.make(ModelConfig.parse(shape))
    within = kind.make(ModelConfig.parse(shape | {"penalties": [{"kind": "jump", "lambda": 0.25, **penalty}]}))
    enliven(plain, 0)
    within.load_state_dict(plain.state_dict())
    with Jump.attach(View(plain), penalty, strength=0.25) as jump:
        attached = plain(ids, labels=labels).loss + jump.loss(loss_positions(labels, kind is TransectForCausalLM))
    within.train()
    if saved:
        within.activation_checkpointing_enable()
    output = within(ids, labels=labels)
    torch.testing.assert_close(output.loss, attached, rtol=1e-6, atol=0)
    assert output.losses["jump"] > 0
    own, twins = grads_of(within, output.loss), grads_of(plain, attached)
    scale = max(float(grad.abs().max()) for grad in twins)
    for mine, theirs in zip(own, twins, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * scale)
