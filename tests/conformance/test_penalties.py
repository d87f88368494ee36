"""Every registered penalty keeps the contract that the model and the training loop rely on."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import transect as tx
from transect import registry
from transect.models.penalties._pass import PenaltyPass
from transect.models.penalties.base import LayerSums, Penalty, PenaltyConfig, combined

PACKAGE = "transect.models.penalties"
NAMES = registry.available(PACKAGE)
BATCH, POSITIONS, WIDTH, LAYERS = 5, 7, 23, 3


def penalty_of(name: str, **settings) -> Penalty:
    kind = registry.load(PACKAGE, name, Penalty)
    return kind(kind.Config.parse(settings), LAYERS)


def streams(generator: torch.Generator, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shape = (LAYERS + 1, BATCH, POSITIONS, WIDTH)
    return [state.requires_grad_() for state in torch.randn(shape, generator=generator).to(dtype)]


def seen(penalty: Penalty, states: list[Tensor], counted: Tensor | None) -> list[LayerSums]:
    return [penalty.layer(place, states[place], states[place + 1], counted) for place in range(LAYERS)]


@pytest.fixture
def counted(generator: torch.Generator) -> Tensor:
    return torch.rand(BATCH, POSITIONS, generator=generator) < 0.7


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str):
    kind = registry.load(PACKAGE, name, Penalty)
    assert issubclass(kind.Config, PenaltyConfig) and kind.Config().kind == name
    assert getattr(tx.penalties, kind.__name__) is kind
    doc = kind.__doc__ or ""
    assert [part for part in ("Range", "Raises", "Source", "Cost") if part not in doc] == []
    config = kind.Config(strength=0.3)
    assert kind.Config.parse(config.plain()) == config
    assert not isinstance(penalty_of(name), torch.nn.Module)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_and_total(name: str, dtype: torch.dtype, counted: Tensor, generator: torch.Generator):
    penalty, states = penalty_of(name, strength=0.3), streams(generator, dtype)
    sums = seen(penalty, states, counted)
    for layer in sums:
        assert layer.values.ndim == 1 and layer.values.dtype == torch.promote_types(dtype, torch.float32)
        assert layer.count == counted.sum() and not layer.count.is_floating_point()
    output = penalty.total(sums)
    assert output.loss.ndim == 0 and output.loss.requires_grad
    assert output.stats and not any(number.requires_grad for number in output.stats.values())
    grads = torch.autograd.grad(output.loss, states)
    for state, grad in zip(states, grads, strict=True):
        assert grad.dtype == state.dtype and torch.isfinite(grad).all()
        assert (grad[~counted] == 0).all() and grad[counted].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_strength_is_a_factor_and_zero_is_no_penalty(name: str, generator: torch.Generator):
    states = streams(generator)
    weak, strong = (penalty_of(name, strength=strength) for strength in (0.25, 1.0))
    losses = [penalty.total(seen(penalty, states, None)).loss for penalty in (weak, strong)]
    assert torch.equal(4 * losses[0], losses[1])
    assert weak.active() and not penalty_of(name, strength=0).active()


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up(name: str, counted: Tensor, generator: torch.Generator):
    penalty, states = penalty_of(name), streams(generator)
    counted[1] = False
    whole = penalty.total(seen(penalty, states, counted))
    cuts = [slice(0, 1), slice(1, 2), slice(2, 5)]
    parts = [seen(penalty, [state[cut] for state in states], counted[cut]) for cut in cuts]
    losses = [penalty.total(part, tokens=counted.sum()).loss for part in parts]
    torch.testing.assert_close(sum(losses), whole.loss, rtol=1e-13, atol=0)
    assert losses[1] == 0
    whole_grads, part_grads = (torch.autograd.grad(loss, states) for loss in (whole.loss, sum(losses)))
    for own, cut in zip(whole_grads, part_grads, strict=True):
        torch.testing.assert_close(cut, own, rtol=1e-12, atol=1e-16)
    stats = penalty.stats(combined(parts))
    for key, number in penalty.stats(seen(penalty, states, counted)).items():
        torch.testing.assert_close(stats[key], number, rtol=1e-12, atol=1e-12)
        assert not stats[key].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_counted_does_not_matter(name: str, counted: Tensor, generator: torch.Generator):
    penalty, states = penalty_of(name), streams(generator)
    expected = penalty.total(seen(penalty, states, counted))
    noise = 1e5 * torch.randn(states[0].shape, generator=generator, dtype=torch.float64)
    elsewhere = [torch.where(counted[..., None], state, noise) for state in states]
    found = penalty.total(seen(penalty, elsewhere, counted))
    assert torch.equal(found.loss, expected.loss)
    alone = penalty.total(seen(penalty, [state[counted][None] for state in states], None))
    torch.testing.assert_close(alone.loss, expected.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_regions_change_no_bit(name: str, counted: Tensor, generator: torch.Generator):
    penalty, states = penalty_of(name), streams(generator)
    losses = []
    for saved in (False, True):
        sums = [
            checkpoint(penalty.layer, *given, use_reentrant=False) if saved else penalty.layer(*given)
            for given in ((place, states[place], states[place + 1], counted) for place in range(LAYERS))
        ]
        losses.append(penalty.total(sums).loss)
    assert torch.equal(losses[0], losses[1])
    plain, again = (torch.autograd.grad(loss, states) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("saved", [False, True])
def test_a_pass_makes_the_shared_states_once(saved: bool, counted: Tensor, generator: torch.Generator):
    """Two penalties read both: the final norm and the raw embedding are computed once, the norm handed out."""
    normed, raw, states = torch.nn.LayerNorm(WIDTH).double(), [], streams(generator)
    seen_by_norm: list[Tensor] = []
    normed.register_forward_hook(lambda _, given, out: seen_by_norm.append(out))

    def embedded() -> Tensor:
        raw.append(states[0] * 2 + 1)
        return raw[-1]

    wanted = [penalty_of("jump", final_state="post_norm", first_state="embedding", alpha=alpha) for alpha in (0.1, 1)]
    watch = PenaltyPass(wanted, [counted] * 2, None, normed, embedded)
    sums = []
    for place in range(LAYERS):
        assert watch.final() is None
        given = (place, states[place], states[place + 1])
        sums.append(checkpoint(watch.layer, *given, use_reentrant=False) if saved else watch.layer(*given))
    assert len(seen_by_norm) == len(raw) == 1
    final = watch.final()
    assert final is seen_by_norm[0] and torch.equal(final, normed(states[-1]))
    apart = [
        wanted[0].layer(place, raw[0] if place == 0 else states[place], after, counted)
        for place, after in enumerate([*states[1:-1], normed(states[-1])])
    ]
    for found, expected in zip(sums, apart, strict=True):
        assert torch.equal(found[0].values, expected.values)
    gradients = torch.autograd.grad(watch.totals(sums)[0]["jump"] + final.sum(), [states[0], normed.weight])
    assert all(bool(gradient.any()) for gradient in gradients)
    assert watch.final() is final


def test_a_pass_without_such_penalties_makes_neither(counted: Tensor, generator: torch.Generator):
    def never(*_: Tensor) -> Tensor:
        raise AssertionError("nobody reads it")

    states = streams(generator)
    watch = PenaltyPass([penalty_of("jump", first_state="after_embedding_norm")], [counted], None, never, never)
    for place in range(LAYERS):
        watch.layer(place, states[place], states[place + 1])
    assert watch.final() is None
    alone = PenaltyPass([penalty_of("jump")], [counted], None, None, None)
    assert torch.equal(alone.layer(0, *states[:2])[0].values, watch.layer(0, *states[:2])[0].values)
