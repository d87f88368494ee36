"""Early exit: what the model would say if it stopped at each layer, by its own final norm and head."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from transect.errors import InputError
from transect.metrics.angles import widened
from transect.metrics.errors import bootstrap
from transect.results import Row
from transect.tasks._documents import CORPUS, Documents, documents
from transect.tasks._scoring import Request, right_padded
from transect.tasks.base import Subject, named
from transect.tasks.language_modelling import LanguageModelling
from transect.view.capture import Seen, stream
from transect.view.lens import Lens
from transect.view.sites import NEXT
from transect.view.view import View

_ROWS = 512  # of logits at once


@dataclass(frozen=True, kw_only=True)
class EarlyExit(LanguageModelling):
    """Loss on text, and agreement with the last layer, at resid[0] to resid[L] read through the final norm and head.

    nats_per_token: mean of -log p(token), as `language_modelling` has it at the last layer, whose windows and tokens
    asked for are the same. agreement: the share of tokens whose likeliest token is that of the last layer, at layer L
    always 1. Options are those of `language_modelling`.
    Range and unit: above 0, nats/token; 0 to 1. Errors are over documents.
    Source: the logit lens, see `view.lens`; papers/ffn_wider_cea for lens loss by layer.
    Raises: InputError where a head reads more than the last state.
    Cost: one forward pass as in `language_modelling`, and L + 1 heads for each token.
    """

    title: ClassVar[str] = "Loss at every layer"
    source: ClassVar[str] = "the logit lens"
    headline: ClassVar[tuple[str, str]] = ("nats_per_token", "nats/token")

    def rows(self, subject: Subject) -> Iterator[Row]:
        """nats_per_token and agreement of each layer, for each domain of the source."""
        reader = self._reader(subject)
        room = self._room(reader)
        lens = Lens(subject.view)
        for text in documents(subject, self.data, self.split, self.limit_bytes, self.document_bytes):
            requests, owners = self._requests(reader, text, room, self.stride or room, subject.seed)
            sums = _sums(subject, lens, requests, owners, len(text.ids), reader.mask)
            domain = text.domain if self.data.startswith(CORPUS) else self.label
            yield from _rows(text, sums, domain)


def _sums(
    subject: Subject, lens: Lens, requests: list[Request], owners: list[int], count: int, mask_id: int | None
) -> np.ndarray:
    """[documents, 2 (L + 1) + 1] float64: nats at each layer, agreeing tokens at each layer, tokens."""
    sums = np.zeros((count, 2 * subject.view.num_layers + 3))
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number].ids))
    for start in range(0, len(order), subject.batch_size):
        numbers = order[start : start + subject.batch_size]
        some = [requests[number] for number in numbers]
        targets = torch.from_numpy(np.concatenate([request.targets for request in some])).to(subject.view.device)
        found = _read(lens, _states(subject.view, some, mask_id), targets)
        rows = np.repeat([owners[number] for number in numbers], [len(request.targets) for request in some])
        np.add.at(sums, rows, np.column_stack([found, np.ones(len(rows))]))
        subject.tick(start + len(numbers), len(order))
    return sums


def _states(view: View, requests: list[Request], mask_id: int | None) -> Tensor:
    """resid[0..L] from which each token asked for is read [L + 1, tokens, width]; with a mask token it is hidden."""
    inputs = [request.ids[: request.last - 1] if mask_id is None else request.ids.copy() for request in requests]
    places: list[tuple[int, int]] = []
    for row, (request, own) in enumerate(zip(requests, inputs, strict=True)):
        if mask_id is not None:
            own[request.first : request.last] = mask_id
        places += [(row, place - (mask_id is None)) for place in range(request.first, request.last)]
    ids, mask = right_padded(view, inputs)
    rows, columns = torch.tensor(places).T
    taken: dict[int, Tensor] = {}

    def consume(layer: int, seen: Seen) -> None:
        for site, tensor in seen.items():
            taken[layer + (site == NEXT)] = tensor[rows.to(tensor.device), columns.to(tensor.device)]

    last = view.num_layers - 1
    wanted = {layer: ("resid", NEXT) if layer == last else ("resid",) for layer in range(view.num_layers)}
    with torch.no_grad(), stream(view, wanted, consume):
        view.run(ids, mask)
    return torch.stack([taken[layer] for layer in range(view.num_layers + 1)])


def _read(lens: Lens, states: Tensor, targets: Tensor) -> np.ndarray:
    """[tokens, 2 (L + 1)] float64: nats at each layer, and whether its likeliest token is that of the last layer."""
    parts = []
    for some, asked in zip(states.split(_ROWS, dim=1), targets.split(_ROWS), strict=True):
        nats, likeliest = [], []
        for one in some:
            logits = widened(lens(one))
            nats.append(torch.nn.functional.cross_entropy(logits, asked, reduction="none").double())
            likeliest.append(logits.argmax(1))
        agree = [(one == likeliest[-1]).double() for one in likeliest]
        parts.append(torch.stack([*nats, *agree], dim=1).cpu())
    values = torch.cat(parts).numpy()
    if not np.isfinite(values).all():
        raise InputError(f"{lens.view.name} gives NaN or infinity on this text; check the weights or use float32")
    return values


def _rows(text: Documents, sums: np.ndarray, domain: str) -> Iterator[Row]:
    values, errors = bootstrap(sums, text.keys, lambda totals: totals[:, :-1] / totals[:, -1:], seed=0)
    layers = len(values) // 2
    blank = Row(
        metric="",
        value=0.0,
        unit="",
        site="resid",
        domain=domain,
        split=text.split,
        n=int(sums[:, -1].sum()),
        documents=len(sums),
        data=named(domain, text.keys),
    )
    for number, (value, error) in enumerate(zip(values, errors, strict=True)):
        metric, unit = ("nats_per_token", "nats/token") if number < layers else ("agreement", "1")
        row = replace(blank, metric=metric, unit=unit, layer=number % layers)
        yield row.measured(float(value), error)
