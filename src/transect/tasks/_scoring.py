"""What a model says of given tokens: the log-probability of each, and whether it is the likeliest one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transect.errors import InputError
from transect.metrics.angles import widened
from transect.tasks.base import Tick, silent
from transect.view.view import View

_LOGIT_BYTES = 1 << 28  # of one forward pass, at most
_ROWS = 512  # of logits that are made probabilities together
_SEQUENCE = 128  # tokens that a batch is counted in


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Token ids [T] of which `first` to `last` - 1 are asked for; a causal model is asked for none but those behind
    the first."""

    ids: np.ndarray
    first: int
    last: int

    @property
    def targets(self) -> np.ndarray:
        """The ids asked for [last - first]."""
        return self.ids[self.first : self.last]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """nats: log-probability of each token asked for [targets] float64; greedy: whether all of them are likeliest."""

    nats: np.ndarray
    greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of all tokens together, in nats."""
        return float(self.nats.sum())


def score_causal(view: View, requests: Sequence[Request], batch_size: int, tick: Tick = silent) -> list[Scored]:
    """log p(token | everything before it) of each token asked for, by request in the order given.

    Requests that differ in their last token alone share a pass. Sequences are padded on the right, which no position
    before sees; the longest come first. Raises InputError where the model gives numbers that are not finite.
    Cost: one forward pass over the distinct inputs; logits of at most 256 MiB at once.
    """
    for request in requests:
        assert 1 <= request.first < request.last <= len(request.ids)
    inputs: dict[bytes, list[int]] = {}
    for number, request in enumerate(requests):
        inputs.setdefault(request.ids[: request.last - 1].astype(np.int64).tobytes(), []).append(number)
    order = sorted(inputs.values(), key=lambda numbers: -requests[numbers[0]].last)
    found: list[Scored | None] = [None] * len(requests)
    done = 0
    for group in _groups(order, lambda numbers: requests[numbers[0]].last - 1, view, batch_size):
        rows = [requests[numbers[0]].ids[: requests[numbers[0]].last - 1] for numbers in group]
        logits = _logits(view, rows)
        asked = [(row, number) for row, numbers in enumerate(group) for number in numbers]
        places = [(row, place - 1) for row, n in asked for place in range(requests[n].first, requests[n].last)]
        targets = np.concatenate([requests[number].targets for _, number in asked])
        _keep(found, requests, [number for _, number in asked], _read(view, logits, places, targets))
        done += len(asked)
        tick(done, len(requests))
    return [one for one in found if one is not None]


def score_masked(
    view: View, requests: Sequence[Request], mask_id: int, batch_size: int, tick: Tick = silent
) -> list[Scored]:
    """log p(token | all others) of each token asked for, each hidden alone: the pseudo-log-likelihood.

    Source: Salazar et al., arXiv 1910.14659, equation 1. `greedy` says that each is likeliest at its place. Raises
    InputError as `score_causal`. Cost: a forward pass over the sequence for each token asked for.
    """
    pairs = [(n, place) for n, request in enumerate(requests) for place in range(request.first, request.last)]
    order = sorted(range(len(pairs)), key=lambda pair: -len(requests[pairs[pair][0]].ids))
    values = np.empty((len(pairs), 2))
    done = 0
    for group in _groups(order, lambda pair: len(requests[pairs[pair][0]].ids), view, batch_size):
        rows = []
        for pair in group:
            number, place = pairs[pair]
            hidden = requests[number].ids.copy()
            hidden[place] = mask_id
            rows.append(hidden)
        places = [(row, pairs[pair][1]) for row, pair in enumerate(group)]
        targets = np.array([requests[pairs[pair][0]].ids[pairs[pair][1]] for pair in group])
        values[group] = _read(view, _logits(view, rows), places, targets)
        done += len(group)
        tick(done, len(pairs))
    found: list[Scored | None] = [None] * len(requests)
    _keep(found, requests, range(len(requests)), values)
    return [one for one in found if one is not None]


def _groups(order: list, length: Callable[[Any], int], view: View, batch_size: int) -> Iterator[list]:
    """Neighbours of the order, of as many tokens as asked for and as memory takes logits of."""
    start = 0
    while start < len(order):
        longest = length(order[start])
        room = _LOGIT_BYTES // (4 * longest * view.vocab_size)
        count = max(1, min(batch_size * _SEQUENCE // longest, room))
        yield order[start : start + count]
        start += count


def right_padded(view: View, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, longest] of sequences padded on the right; raises InputError for ids out of range."""
    ids = torch.full((len(rows), max(len(row) for row in rows)), view.pad_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        mask[number, : len(row)] = True
    view.check_ids(ids)
    return ids, mask


def _logits(view: View, rows: Sequence[np.ndarray]) -> Tensor:
    """Logits [rows, longest, vocabulary]."""
    with torch.inference_mode():
        return view.run(*right_padded(view, rows), head=True)


def _read(view: View, logits: Tensor, places: list[tuple[int, int]], targets: np.ndarray) -> np.ndarray:
    """[targets, 2] float64: log-probability, and 1 where the token is the likeliest at its place."""
    rows, columns = (torch.tensor(side, device=logits.device) for side in zip(*places, strict=True))
    wanted = torch.from_numpy(np.asarray(targets, dtype=np.int64)).to(logits.device)
    parts = []
    for start in range(0, len(places), _ROWS):
        some = slice(start, start + _ROWS)
        chosen = widened(logits[rows[some], columns[some]])
        nats = chosen.log_softmax(-1).gather(1, wanted[some, None])[:, 0]
        parts.append(torch.stack([nats.double(), (chosen.argmax(-1) == wanted[some]).double()], dim=1).cpu())
    values = torch.cat(parts).numpy()
    if not np.isfinite(values).all():
        raise InputError(f"{view.name} gives NaN or infinity on this text; check the weights or use float32")
    return values


def _keep(found: list[Scored | None], requests: Sequence[Request], numbers: Sequence[int], values: np.ndarray) -> None:
    start = 0
    for number in numbers:
        end = start + requests[number].last - requests[number].first
        found[number] = Scored(values[start:end, 0].copy(), bool(values[start:end, 1].all()))
        start = end
