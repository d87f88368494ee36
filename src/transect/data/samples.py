"""The training sequences of a run: sample number n is the same whoever asks for it, and whenever."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transect.data.config import DataConfig
from transect.data.corpus import Corpus
from transect.data.masking import masked
from transect.data.next_sentence import SPECIAL_TOKENS, Pairs, laid_out
from transect.data.order import Purpose, below, draws, shuffled
from transect.data.packing import Stream, document_ids
from transect.data.special import Special
from transect.errors import InputError
from transect.models.config import ModelConfig

TRAIN = "train"
_SHORTEST_PAIR = SPECIAL_TOKENS + 3  # with less room a document could have a piece of one token


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """Sequences [n, T] int64 as the heads want them.

    labels: the ids themselves for a causal model, which moves them; for a masked one the original ids at masked
    positions, -100 elsewhere. document_ids number the documents that do not see each other, from 0 in each sequence.
    next_sentence_label [n]: 1 where B is from another document, 0 where it follows A. attention_mask: 1 at real tokens.
    predicted: positions that the main loss counts.
    """

    ids: Tensor
    labels: Tensor
    predicted: int
    document_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    next_sentence_label: Tensor | None = None
    attention_mask: Tensor | None = None


class Samples:
    """The train split of a corpus as samples 0, 1, 2, ... without end; epoch e is samples e * per_epoch and on.

    All domains are one ring of tokens, so each is met in proportion to its tokens. An epoch cuts the ring into windows
    from a place of its own, so that cuts move, and takes them in an order of its own: each token once, but fewer than
    one window's worth that differ from epoch to epoch. A causal sample is a window; a masked one is a window between
    start and end token, with masks of its own; with `next_sentence` it is a pair of texts (see `Pairs`).
    Where attention stops at documents, each document in the ring is led by the token that begins an evaluation text, so
    that its first token is predicted from that, and not from another document.
    Raises InputError where corpus, data settings and model do not fit each other. Cost: reads only what is asked for.
    """

    def __init__(self, corpus: Corpus, data: DataConfig, model: ModelConfig, seed: int) -> None:
        self.seq_len = sequence_length(data, model)
        if TRAIN not in corpus.splits:
            raise InputError(f"{corpus.path} has no split 'train'; it has {', '.join(corpus.splits)}; prepare it again")
        self._special = special = Special.of(corpus, model)
        self._data, self._model, self._seed = data, model, seed
        self._where = f"split 'train' of {corpus.path}"
        parts = [corpus.part(TRAIN, domain) for domain in corpus.domains(TRAIN)]
        self._pairs = self._stream = None
        if data.next_sentence:
            self._pairs = Pairs(parts, self.seq_len - SPECIAL_TOKENS, seed, self._where)
            self.per_epoch = self._pairs.count
            return
        self._width = self.seq_len if model.causal else self.seq_len - 2
        self._stream = Stream(parts, None if data.across_documents else special.start)
        self.per_epoch = self._stream.tokens // self._width
        if not self.per_epoch:
            raise InputError(
                f"{self._where} has {self._stream.tokens} tokens, one sequence needs {self._width}; "
                "set data.seq_len lower or prepare more text"
            )

    def check(self, batch_size: int) -> None:
        """Raise InputError where an epoch has fewer samples than a step of the run takes."""
        if self.per_epoch < batch_size:
            raise InputError(
                f"{self._where} has {self.per_epoch} sequences of {self.seq_len} tokens, a step takes {batch_size}; "
                "set train.batch_size or data.seq_len lower or prepare more text"
            )

    def batch(self, first: int, count: int) -> TrainBatch:
        """Samples number first to first + count - 1 of the run."""
        numbers = np.arange(first, first + count)
        epochs, places = np.divmod(numbers, self.per_epoch)
        places = shuffled(places, self.per_epoch, draws(self._seed, Purpose.ORDER, epochs))
        if self._pairs is not None:
            return self._paired(numbers, epochs, places, self._pairs)
        assert self._stream is not None
        phases = below(draws(self._seed, Purpose.PHASE, epochs), self._stream.tokens)
        starts = (phases + places * self._width) % self._stream.tokens
        ids, firsts = self._stream.windows(starts, self._width)
        return self._causal(ids, firsts) if self._model.causal else self._masked(numbers, ids, firsts)

    def _causal(self, ids: np.ndarray, firsts: np.ndarray) -> TrainBatch:
        tokens, predicted = torch.from_numpy(ids), ids.size - len(ids)
        if self._data.across_documents:
            return TrainBatch(tokens, tokens, predicted)
        predicted -= int(np.count_nonzero(firsts[:, 1:]))
        return TrainBatch(tokens, tokens, predicted, document_ids=torch.from_numpy(document_ids(firsts)))

    def _masked(self, numbers: np.ndarray, ids: np.ndarray, firsts: np.ndarray) -> TrainBatch:
        ids = np.pad(ids, ((0, 0), (1, 1)))
        ids[:, 0], ids[:, -1] = self._special.start, self._special.end
        inputs, labels, predicted = self._hidden(numbers, ids)
        apart = None if self._data.across_documents else document_ids(np.pad(firsts, ((0, 0), (1, 1))))
        return TrainBatch(inputs, labels, predicted, document_ids=None if apart is None else torch.from_numpy(apart))

    def _paired(self, numbers: np.ndarray, epochs: np.ndarray, pieces: np.ndarray, pairs: Pairs) -> TrainBatch:
        made = pairs.make(pieces, epochs, numbers)
        special = self._special
        ids, types, real = laid_out(made, self.seq_len, special.start, special.end, special.pad)
        inputs, labels, predicted = self._hidden(numbers, ids)
        return TrainBatch(
            inputs,
            labels,
            predicted,
            token_type_ids=torch.from_numpy(types) if self._model.embedding.types > 1 else None,
            next_sentence_label=torch.tensor([int(pair.other) for pair in made]),
            attention_mask=torch.from_numpy(real),
        )

    def _hidden(self, numbers: np.ndarray, ids: np.ndarray) -> tuple[Tensor, Tensor, int]:
        """Inputs, labels and how many of these count."""
        chance = draws(self._seed, Purpose.MASK, numbers[:, None], np.arange(ids.shape[1]))
        asked = ~self._special.among(ids)
        inputs, labels = masked(ids, asked, chance, self._special, self._data.mask_rate)
        return torch.from_numpy(inputs), torch.from_numpy(labels), int(np.count_nonzero(labels >= 0))


def sequence_length(data: DataConfig, model: ModelConfig) -> int:
    """Tokens in a sequence; raises InputError where data settings and model do not fit each other."""
    length = data.seq_len or model.max_positions
    if model.positions == "learned" and length > model.max_positions:
        raise InputError(
            f"data.seq_len is {length}, but the model has {model.max_positions} learned positions; set "
            "data.seq_len lower or model.max_positions higher"
        )
    if data.next_sentence != model.head.next_sentence:
        given, other = ("data", "model.head") if data.next_sentence else ("model.head", "data")
        raise InputError(
            f"{given}.next_sentence is true, but {other}.next_sentence is false; set both or neither (the model has "
            "a head for the question, the data ask it)"
        )
    shortest = _SHORTEST_PAIR if data.next_sentence else 2 if model.causal else 3
    if length < shortest:
        raise InputError(f"data.seq_len is {length}; with these settings it must be at least {shortest}")
    return length
