"""What edited models make of a batch, against the unedited one: losses, KL, agreement, displacement."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from transect.data import Batch
from transect.data.objective import NONE
from transect.metrics.angles import chord_displacement, unit, widened
from transect.probes.base import Outcome
from transect.view.variants import Ran, Variant, run_all
from transect.view.view import View

_ROWS = 256  # of logits that are looked at together


def outcomes(
    view: View, batch: Batch, units: Tensor, variants: tuple[Variant, ...], tick: Callable[[int], None]
) -> Iterator[tuple[int | None, Outcome]]:
    """Each variant's outcome on one batch, the unedited model (number None) first; `tick` hears of layers run.

    Cost: the layers that variants do not share, one head a variant, and the unedited model's log-probabilities at the
    positions with a target, which are kept for the batch.
    """
    mask = batch.mask.to(view.device)
    owners = units.to(view.device)[:, None].expand(mask.shape)
    asked = None if batch.target is None else batch.target.to(view.device)
    chosen = mask if asked is None else mask & (asked != NONE)
    targets = None if asked is None else asked[chosen]
    intact = None
    for ran in run_all(view, batch.ids, batch.mask, variants):
        if intact is None:
            intact = _Intact(ran, mask, chosen)
        tick(ran.layers_run)
        displacement = chord_displacement(intact.states, unit(ran.hidden[mask].double(), 1e-30))
        scores = (None, None, None)
        if ran.logits is not None and targets is not None:
            scores = _scored(ran.logits[chosen], intact.logprobs, targets)
        yield ran.number, Outcome(*scores, displacement, owners[chosen], owners[mask], ran.layers_run)


class _Intact:
    """What the unedited model made of the batch: unit states of real tokens, log-probabilities at the targets."""

    def __init__(self, ran: Ran, mask: Tensor, chosen: Tensor) -> None:
        self.states = unit(ran.hidden[mask].double(), 1e-30)
        self.logprobs = None if ran.logits is None else widened(ran.logits[chosen]).log_softmax(-1)


def _scored(logits: Tensor, intact: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, KL(intact || edited) and agreement of the most probable token, [targets] float64 each."""
    assert intact is not None
    parts = []
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        logprobs, before = widened(logits[rows]).log_softmax(-1), intact[rows]
        loss = -logprobs.gather(1, targets[rows, None])[:, 0]
        kl = (before.exp() * (before - logprobs)).sum(1, dtype=torch.float64)
        agree = before.argmax(1) == logprobs.argmax(1)
        parts.append(torch.stack([loss.double(), kl, agree.double()]))
    joined = torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.float64)
    return joined[0], joined[1], joined[2]
