"""However a step is cut into micro-batches, the parts of its losses and gradients add up to those of the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from own_models import _BASE, OWN
from transect.models.config import ModelConfig, merged
from transect.models.heads import TransectForCausalLM, TransectForMaskedLM
from transect.models.loss import LossRule

SAMPLES, LENGTH = 8, 13
CUTS = [[8], [4, 4], [2, 2, 2, 2], [1, 5, 2]]
JUMPS = {
    "loss_mask": {"kind": "jump", "strength": 0.7},
    "all": {"kind": "jump", "strength": 0.7, "penalty_positions": "all"},
    "post_norm": {"kind": "jump", "strength": 0.7, "final_state": "post_norm", "displacement": "arccos_over_pi"},
}


def trained(name: str, penalty: dict[str, Any] | None = None):
    penalties = [] if penalty is None else [penalty]
    chosen = ModelConfig.parse(merged(merged(_BASE, OWN[name]), {"penalties": penalties}))
    torch.manual_seed(5)
    model = (TransectForCausalLM if chosen.causal else TransectForMaskedLM).make(chosen)
    return model.double().train()


def batch(generator: torch.Generator, causal: bool, padded: bool) -> dict[str, Tensor]:
    """Unevenly many predicted and real tokens in each sample; the last sample predicts nothing."""
    ids = torch.randint(5, 40, (SAMPLES, LENGTH), generator=generator)
    real = torch.ones_like(ids)
    if padded:
        lengths = torch.randint(3, LENGTH + 1, (SAMPLES, 1), generator=generator)
        real = (torch.arange(LENGTH) < lengths).long()
    share = torch.linspace(0.2, 1.0, SAMPLES)[:, None]
    ignored = (torch.rand(ids.shape, generator=generator) < share) | (real == 0)
    ignored[-1] = True
    made = {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}
    if padded:
        made["attention_mask"] = real
    elif causal:
        made["document_ids"] = (torch.arange(LENGTH) >= torch.arange(SAMPLES)[:, None]).long()
    return made


def predicted(model, made: dict[str, Tensor]) -> int:
    """By hand: a causal model predicts the next token, in its own document."""
    counted = made["labels"] != -100
    if model.settings.causal:
        counted = counted[:, 1:]
        if "document_ids" in made:
            counted = counted & (made["document_ids"][:, 1:] == made["document_ids"][:, :-1])
    return int(counted.sum())


def real_tokens(made: dict[str, Tensor]) -> int:
    return int(made.get("attention_mask", torch.ones_like(made["input_ids"])).sum())


def taken(model, made: dict[str, Tensor], cut: list[int], z_loss: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The summed losses and gradients of a step in micro-batches of these sizes."""
    model.zero_grad()
    tokens, total, losses, start = predicted(model, made), real_tokens(made), {}, 0
    for size in cut:
        piece = {name: one[start : start + size] for name, one in made.items()}
        start += size
        rule = LossRule(tokens=tokens, share=real_tokens(piece) / total, chunk=5, z_loss=z_loss)
        out = model(**piece, rule=rule)
        out.loss.backward()
        for name, loss in out.losses.items():
            losses[name] = losses.get(name, 0) + loss.detach()
    return losses, [one.grad.clone() for one in model.parameters() if one.grad is not None]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        *(("standard", penalty) for penalty in (None, *JUMPS)),
        *(("standard/masked", penalty) for penalty in (None, "loss_mask", "all")),
    ],
)
def test_parts_add_up(name: str, penalty: str | None, padded: bool, generator: torch.Generator):
    model = trained(name, JUMPS.get(penalty))
    made = batch(generator, model.settings.causal, padded)
    whole, gradients = taken(model, made, CUTS[0], z_loss=0.3)
    assert set(whole) == {"main", "z_loss"} | ({"jump"} if penalty else set())
    model.zero_grad()
    plain = model(**made)
    for loss in ("main", "jump") if penalty else ("main",):
        torch.testing.assert_close(whole[loss], plain.losses[loss].detach(), rtol=1e-12, atol=0)
    for cut in CUTS[1:]:
        losses, parts = taken(model, made, cut, z_loss=0.3)
        for key, loss in whole.items():
            torch.testing.assert_close(losses[key], loss, rtol=1e-12, atol=0)
        largest = max(float(own.abs().max()) for own in gradients)  # that of a key's bias is rounding alone
        for own, part in zip(gradients, parts, strict=True):
            torch.testing.assert_close(part, own, rtol=1e-12, atol=1e-13 * largest)


def test_balance_is_the_mean_of_the_parts(generator: torch.Generator):
    """Each pass' own loss, weighted by its share of the real tokens."""
    model = trained("sparse/top_k")
    made = batch(generator, True, padded=True)
    pieces = [{name: one[part] for name, one in made.items()} for part in (slice(0, 3), slice(3, 8))]
    shares = [real_tokens(piece) / real_tokens(made) for piece in pieces]
    expected = sum(s * model(**p).losses["balance"].detach() for s, p in zip(shares, pieces, strict=True))
    losses, _ = taken(model, made, [3, 5], z_loss=0.0)
    torch.testing.assert_close(losses["balance"], expected, rtol=1e-12, atol=0)
    assert set(losses) == {"main", "balance"}


def test_equal_names_are_kept_apart(generator: torch.Generator):
    """The router's squared log-partition beside that of the vocabulary."""
    name = "sparse/top_k"
    changed = merged(merged(_BASE, OWN[name]), {"ffn": {"selector": {"kind": "top_k", "z_loss": 0.2}}})
    torch.manual_seed(5)
    model = TransectForCausalLM.make(ModelConfig.parse(changed)).double().train()
    ids = torch.randint(5, 40, (2, LENGTH), generator=generator)
    plain = model(input_ids=ids, labels=ids)
    out = model(input_ids=ids, labels=ids, rule=LossRule(z_loss=0.1))
    assert set(out.losses) == {"main", "z_loss", "trunk.z_loss", "balance"}
    assert torch.equal(out.losses["trunk.z_loss"], plain.losses["z_loss"])
    expected = plain.loss + 0.1 * plain.logits[:, :-1].logsumexp(-1).square().mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
