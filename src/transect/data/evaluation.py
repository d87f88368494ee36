"""Evaluation text: whole documents of one domain, cut so that a model is asked for every token once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transect.data.config import DataConfig
from transect.data.corpus import Corpus
from transect.data.masking import masked, wanted
from transect.data.order import Purpose, draws
from transect.data.samples import sequence_length
from transect.data.special import Special
from transect.errors import InputError
from transect.models.config import ModelConfig
from transect.models.loss import IGNORED


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationBatch:
    """Windows of documents [n, T], padded on the right.

    ids and labels: int64, as the heads want them; predicted: bool, the positions whose loss counts, which in a causal
    model are those before the tokens asked for; document [n] int64: which of the text's documents each is from;
    attention_mask: 1 at real tokens, None where there are no others.
    """

    ids: Tensor
    labels: Tensor
    predicted: Tensor
    document: Tensor
    attention_mask: Tensor | None

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments of a head."""
        named = {"input_ids": self.ids, "labels": self.labels, "attention_mask": self.attention_mask}
        return {name: value.to(device, non_blocking=True) for name, value in named.items() if value is not None}


class EvaluationText:
    """Documents of one domain in an order by hash of their number, as many as `tokens` allows.

    documents: how many; lengths: their tokens; bytes: of their text; keys: a hash of each, all [documents]. tokens: the
    first document that would pass it ends the choice, but there is always one. A causal model reads the end token and
    the text, of which it predicts every token once, and not the end that follows. Of a longer document each window
    begins with the last token of the one before, or with `stride` it goes on by so many tokens and looks back at the
    others. A masked model reads start token, text and end token; a share of each window's tokens is asked for, drawn
    by (seed, document, place), and bytes are the text's times that share.
    Raises InputError where corpus, data settings and model do not fit, and for a domain without text.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        domain: str,
        data: DataConfig,
        model: ModelConfig,
        tokens: int | None = None,
        stride: int | None = None,
        seed: int = 0,
    ) -> None:
        self._special = Special.of(corpus, model)
        self._causal, self._rate, self._seed = model.causal, data.mask_rate, seed
        length = sequence_length(data, model)
        room = length - (1 if model.causal else 2)
        if stride is not None and not 1 <= stride <= room:
            raise InputError(f"stride is {stride}; with sequences of {length} tokens it goes from 1 to {room}")
        self._part = corpus.part(split, domain)
        offsets = np.asarray(self._part.offsets)
        lengths = np.diff(offsets) - 1
        chosen, self.keys = chosen_documents(lengths, tokens)
        if not len(chosen):
            raise InputError(f"domain {domain!r} of split {split!r} of {corpus.path} has no text; leave it out")
        self.documents, self.lengths, self._offsets = len(chosen), lengths[chosen], offsets[chosen]
        self.bytes = np.asarray(self._part.bytes)[chosen].astype(np.float64)
        self._numbers = chosen
        self._windows = cut_windows(self.lengths, room, stride or room)
        if not model.causal:
            document, _, end, new = self._windows
            self.bytes *= np.bincount(document, wanted(end - new, data.mask_rate)) / self.lengths

    def count(self, batch_size: int) -> int:
        """Batches of so many windows."""
        return -(-self._windows.shape[1] // batch_size)

    def batch(self, number: int, batch_size: int) -> EvaluationBatch:
        """Batch number `number`; the longest windows come first, so that little is padded."""
        document, begin, end, new = self._windows[:, number * batch_size : (number + 1) * batch_size]
        place = np.arange(int((end - begin).max()) + (1 if self._causal else 2))
        text = begin[:, None] + place - 1  # the place in the document of what stands at each position
        ids = np.full(text.shape, self._special.pad, dtype=np.int64)
        for row, (offset, first, last) in enumerate(
            zip(self._offsets[document].tolist(), begin.tolist(), end.tolist(), strict=True)
        ):
            leading = int(self._causal and first > 0)  # a token of the text stands before it, as in the text
            ids[row, 0] = self._special.start
            ids[row, 1 - leading : last - first + 1] = self._part.read(offset + first - leading, last - first + leading)
        asked = (text >= new[:, None]) & (text < end[:, None])
        if self._causal:
            labels = np.where(asked, ids, IGNORED)
            predicted = np.pad(asked[:, 1:], ((0, 0), (0, 1)))
            real = text < end[:, None]
        else:
            ids[np.arange(len(ids)), end - begin + 1] = self._special.end
            chance = draws(self._seed, Purpose.EVALUATION, self._numbers[document][:, None], text + 1)
            ids, labels = masked(ids, asked, chance, self._special, self._rate)
            predicted = labels != IGNORED
            real = text <= end[:, None]
        return EvaluationBatch(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(predicted),
            torch.from_numpy(document),
            None if real.all() else torch.from_numpy(real.astype(np.int64)),
        )


def chosen_documents(lengths: np.ndarray, tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to read, in order of a hash of their number, and these hashes; as `tokens` allows."""
    numbers = np.flatnonzero(lengths)
    keys = draws(0, Purpose.EVALUATION, numbers)
    order = np.argsort(keys, kind="stable")
    if tokens is not None:
        order = order[: max(1, int(np.searchsorted(np.cumsum(lengths[numbers[order]]), tokens, side="right")))]
    return numbers[order], keys[order]


def cut_windows(lengths: np.ndarray, room: int, stride: int) -> np.ndarray:
    """[4, windows], the longest first: document, first token, last token + 1, first token that is asked for."""
    counts = 1 + -(-np.maximum(lengths - room, 0) // stride)
    document = np.repeat(np.arange(len(lengths)), counts)
    begin = stride * (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts))
    end = np.minimum(begin + room, lengths[document])
    new = np.where(begin > 0, begin - stride + room, 0)
    return np.stack([document, begin, end, new])[:, np.argsort(begin - end, kind="stable")]
