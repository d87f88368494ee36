"""Language modelling: how well a model predicts text of one domain, in bits per byte and nats per token."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from transect.data.evaluation import cut_windows
from transect.data.order import Purpose, draws
from transect.errors import InputError
from transect.results import Row
from transect.tasks._documents import CORPUS, Documents, check_documents, documents
from transect.tasks._encoding import Reader
from transect.tasks._scoring import Request
from transect.tasks.base import Subject, Task, named
from transect.train.evaluate import domain_rows


@dataclass(frozen=True, kw_only=True)
class LanguageModelling(Task):
    """Mean loss of every token of a text, given what stands before it in its document.

    nats_per_token = sum of -log p / tokens; bits_per_byte = the same sum / (bytes ln 2). Documents are judged apart;
    each begins behind the start token (bos, else eos). A longer document is cut into windows of `length` tokens, each
    with the last token of the one before as its only context; with `stride` s each window goes on by s tokens and looks
    back at the others. Every token is asked for once. A masked model is asked for a share of the tokens, drawn by
    (seed, document, place), each hidden alone (pseudo-likelihood); bytes are the text's times that share.

    Options: data, a source of text (`transect show language_modelling` lists them); split, what rows call it; of a
    run's corpus the split that is read; domain, what rows call other text; length, by default the model's, at most
    1,024, and for a run's corpus that of its training; limit_bytes and document_bytes cut the text, the same for every
    model; masked_share.
    Range and unit: above 0; nats/token, bits/byte. Errors are over documents.
    Source: bits per byte as in arXiv 2101.00027, section 3.1; windows as in lm-evaluation-harness 0.4, whose
    `bits_per_byte` it equals; pseudo-likelihood arXiv 1910.14659.
    Raises: InputError for text or options that do not fit; NotAtHand for a source that is not there.
    Cost: one forward pass over the text, or with a stride length / stride of them; of a masked model one for each token
    asked for.
    """

    title: ClassVar[str] = "Loss on text, by domain"
    source: ClassVar[str] = "arXiv 2403.02436, out-of-distribution language modelling"
    headline: ClassVar[tuple[str, str]] = ("bits_per_byte", "bits/byte")

    data: str = CORPUS
    split: str = "ood"
    domain: str | None = None
    length: int | None = None
    stride: int | None = None
    limit_bytes: int | None = 65_536
    document_bytes: int | None = 16_384
    masked_share: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.masked_share <= 1:
            raise InputError(f"language_modelling.masked_share is {self.masked_share}; it is above 0 and at most 1")
        for name in ("limit_bytes", "document_bytes", "length", "stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"language_modelling.{name} is {value}; it is at least 1")

    @property
    def label(self) -> str:
        """The domain that rows are of."""
        return self.domain or super().label

    def check(self, subject: Subject) -> None:
        """The source is there, and the windows fit the model."""
        check_documents(subject, self.data, self.split)
        self._room(self._reader(subject))

    def rows(self, subject: Subject) -> Iterator[Row]:
        """nats_per_token and bits_per_byte of each domain of the source."""
        reader = self._reader(subject)
        room = self._room(reader)
        stride = self.stride or room
        for one in documents(subject, self.data, self.split, self.limit_bytes, self.document_bytes):
            requests, owners = self._requests(reader, one, room, stride, subject.seed)
            scored = reader.score(requests, subject.tick)
            sums = np.zeros((len(one.ids), 3))
            for owner, found in zip(owners, scored, strict=True):
                sums[owner, 0] -= found.nats.sum()
                sums[owner, 1] += len(found.nats)
            sizes = np.array([len(row) for row in one.ids])
            sums[:, 2] = one.bytes * sums[:, 1] / sizes
            how = f"window {room}, stride {stride}" if reader.causal else f"{self.masked_share:.0%} hidden one by one"
            domain = one.domain if self.data.startswith(CORPUS) else self.label
            data = named(domain, one.keys)
            yield from (replace(row, data=data) for row in domain_rows(one.split, domain, sums, one.keys, how))

    def _reader(self, subject: Subject) -> Reader:
        length = self.length
        if length is None and self.data.startswith(CORPUS) and subject.recipe is not None:
            trained = subject.recipe.data.seq_len or subject.recipe.model.max_positions
            length = trained - 1 if subject.view.causal else trained  # as many predictions a window as in training
        return Reader.of(subject, length)

    def _room(self, reader: Reader) -> int:
        """Tokens of a document in a window."""
        room = reader.length if reader.causal else reader.length - len(reader.prefix) - len(reader.suffix)
        if self.stride is not None and self.stride > room:
            raise InputError(
                f"language_modelling.stride is {self.stride}; with windows of {room} it goes from 1 to {room}"
            )
        return room

    def _requests(
        self, reader: Reader, text: Documents, room: int, stride: int, seed: int
    ) -> tuple[list[Request], list[int]]:
        requests, owners = [], []
        sizes = np.array([len(row) for row in text.ids])
        for document, begin, end, new in cut_windows(sizes, room, stride).T.tolist():
            row = text.ids[document]
            if reader.causal:
                before = row[begin - 1 : new].tolist() if begin else row[:new].tolist()
                requests.append(reader.request(before, row[new:end].tolist()))
                owners.append(document)
                continue
            key = np.full(end - new, text.keys[document] >> np.uint64(1))
            share = draws(seed, Purpose.MASK, key, np.arange(new, end)) / 2.0**64 < self.masked_share
            for place in (np.flatnonzero(share) + new).tolist():
                ids = np.array([*reader.prefix, *row[begin:end], *reader.suffix], dtype=np.int64)
                at = len(reader.prefix) + place - begin
                requests.append(Request(ids, at, at + 1))
                owners.append(document)
        if not requests:
            raise InputError(
                f"{text.domain} has too little text to ask a share of {self.masked_share} of its tokens for"
            )
        return requests, owners
