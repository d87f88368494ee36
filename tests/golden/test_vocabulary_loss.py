"""The loss over the vocabulary in chunks equals its plain twin, in values and gradients, and never has all logits."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from own_models import own_model
from transect.errors import InputError
from transect.models.loss import LossRule, mapped_loss, plain_mapped_loss, vocabulary_loss

ROWS, WIDTH, VOCAB = 23, 29, 53


def operands(generator: torch.Generator, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, W and b."""
    shapes = [(ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [one.requires_grad_() if bias or one.ndim == 2 else None for one in made]


def labels_of(generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCAB, (ROWS,), generator=generator)


def pulled(function, given: list[Tensor | None], labels: Tensor, rule: LossRule, above: float = 1.0) -> list[Tensor]:
    main, z_loss, each = function(*given, labels, rule)
    wanted = [one for one in given if one is not None and one.requires_grad]
    return [main.detach(), z_loss.detach(), each, *torch.autograd.grad(above * (main + z_loss), wanted)]


@pytest.mark.parametrize("chunk", [1, 7, 22, ROWS, 0, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [None, 101])
def test_chunks_are_the_plain_loss(chunk, z_loss: float, bias: bool, tokens, generator: torch.Generator):
    given, labels = operands(generator, bias), labels_of(generator)
    rule = LossRule(tokens=tokens, chunk=chunk, z_loss=z_loss)
    for above in (1.0, -1.7):
        found, expected = (pulled(way, given, labels, rule, above) for way in (mapped_loss, plain_mapped_loss))
        assert bool(z_loss) == bool(found[1])
        for own, twin in zip(found, expected, strict=True):
            assert own.dtype == torch.float64
            torch.testing.assert_close(own, twin, rtol=1e-10, atol=1e-12)


def test_large_logits_do_not_overflow(generator: torch.Generator):
    given, labels = operands(generator, dtype=torch.float32), labels_of(generator)
    with torch.no_grad():  # whole numbers, so that the logits, up to some thousands, have no rounding to differ by
        for one, size in zip(given, (100, 10, 10), strict=True):
            one.mul_(size).round_()
    rule = LossRule(chunk=5, z_loss=1e-4)
    for own, twin in zip(*(pulled(way, given, labels, rule) for way in (mapped_loss, plain_mapped_loss)), strict=True):
        assert own.isfinite().all()
        torch.testing.assert_close(own, twin, rtol=1e-5, atol=1e-5 * float(twin.abs().max()))


@pytest.mark.parametrize("chunk", [7, 0])
def test_products_are_in_half_precision_and_sums_are_not(chunk: int, generator: torch.Generator):
    """Under autocast both differ from float32 by the rounding of the same logits."""
    given, labels = operands(generator, dtype=torch.float32), labels_of(generator)
    exact = pulled(plain_mapped_loss, given, labels, LossRule(z_loss=0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pulled(mapped_loss, given, labels, LossRule(chunk=chunk, z_loss=0.1))
        twin = pulled(plain_mapped_loss, given, labels, LossRule(z_loss=0.1))
    assert not torch.equal(found[0], exact[0])
    assert all(one.dtype == torch.float32 for one in found)
    torch.testing.assert_close(found[0], twin[0], rtol=1e-3, atol=0)
    for own, other in zip(found[2:], exact[2:], strict=True):
        assert float((own - other).norm() / other.norm()) < 0.02


def test_half_precision_operands_have_gradients_of_their_type(generator: torch.Generator):
    given, labels = operands(generator, dtype=torch.bfloat16), labels_of(generator)
    found = pulled(mapped_loss, given, labels, LossRule(chunk=7))
    assert [one.dtype for one in found] == [torch.float32] * 3 + [torch.bfloat16] * 3


def test_what_needs_no_gradient_gets_none(generator: torch.Generator):
    given, labels = operands(generator), labels_of(generator)
    given[1].requires_grad_(False)
    expected = pulled(plain_mapped_loss, given, labels, LossRule())
    found = pulled(mapped_loss, given, labels, LossRule(chunk=7))
    assert len(found) == len(expected) == 5
    for own, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not mapped_loss(*given, labels, LossRule()).main.requires_grad


def test_gradients_are_there_as_often_as_they_are_asked_for(generator: torch.Generator):
    given, labels = operands(generator), labels_of(generator)
    main = mapped_loss(*given, labels, LossRule(chunk=7)).main
    expected = torch.autograd.grad(plain_mapped_loss(*given, labels, LossRule()).main, given)
    for factor in (1, 2, 1):
        found = torch.autograd.grad(factor * main, given, retain_graph=True)
        for own, twin in zip(found, expected, strict=True):
            torch.testing.assert_close(own, factor * twin, rtol=1e-10, atol=1e-12)


class Rows(TorchDispatchMode):
    """The most rows of the vocabulary's width that any result had, but for the table, turned over."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == VOCAB and len(out) != WIDTH:
            self.most = max(self.most, len(out))
        return out


@pytest.mark.parametrize("chunk", [1, 7])
def test_only_a_chunk_of_logits_exists(chunk: int, generator: torch.Generator):
    given, labels = operands(generator), labels_of(generator)
    for way, most in ((mapped_loss, chunk), (plain_mapped_loss, ROWS)):
        with Rows() as seen:
            pulled(way, given, labels, LossRule(chunk=chunk, z_loss=0.1))
        assert seen.most == most


@pytest.mark.parametrize("name", ["standard", "standard/gated", "standard/masked"])
def test_a_head_by_a_rule_is_the_head(name: str, generator: torch.Generator):
    """Tied and untied, with and without a transform: loss and gradients of the whole model; -100 reaches no map."""
    model = own_model(name, torch.float64).train()
    ids = torch.randint(5, 40, (3, 13), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.6, -100)
    causal = model.settings.causal
    counted = int(((labels[:, 1:] if causal else labels) != -100).sum())
    rows: list[int] = []
    hook = model.head.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
    found = []
    for rule in (None, LossRule(chunk=5), LossRule(tokens=counted)):
        model.zero_grad()
        out = model(input_ids=ids, labels=labels, rule=rule)
        assert (out.logits is None) == (rule is not None)
        out.loss.backward()
        found.append([out.loss.detach(), *(one.grad for one in model.parameters())])
    hook.remove()
    assert rows == [ids.numel(), counted, counted]
    for own in found[1:]:
        for one, twin in zip(own, found[0], strict=True):
            torch.testing.assert_close(one, twin, rtol=1e-10, atol=1e-13)


def test_the_squared_log_partition_is_for_training_only(generator: torch.Generator):
    model, ids = own_model("standard", torch.float64), torch.randint(5, 40, (3, 13), generator=generator)
    rule = LossRule(z_loss=0.2)
    plain, judged = model(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids, rule=rule)
    assert set(judged.losses) == {"main"}
    torch.testing.assert_close(judged.loss, plain.loss, rtol=1e-12, atol=0)
    trained = model.train()(input_ids=ids, labels=ids, rule=rule)
    expected = 0.2 * plain.logits[:, :-1].logsumexp(-1).square().mean()
    torch.testing.assert_close(trained.losses["z_loss"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(trained.loss, trained.losses["main"] + expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(trained.losses["main"], plain.loss, rtol=1e-12, atol=0)


def test_nothing_to_predict(generator: torch.Generator):
    """A part without predicted tokens adds exact zeros; alone it has no mean."""
    model = own_model("standard/masked", torch.float64)
    hidden = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
    nowhere = torch.full((2, 5), -100)
    assert vocabulary_loss(hidden, model.head, nowhere, LossRule()).main.isnan()
    main, z_loss, _ = vocabulary_loss(hidden, model.head.train(), nowhere, LossRule(tokens=11, z_loss=1.0))
    assert main == z_loss == 0
    main.backward()
    assert not any(bool(one.grad.any()) for one in model.head.parameters())


def test_a_rule_goes_with_labels(generator: torch.Generator):
    model, ids = own_model("standard"), torch.randint(5, 40, (2, 7), generator=generator)
    with pytest.raises(InputError, match="goes with labels"):
        model(input_ids=ids, rule=LossRule())
