"""Hash routing: the token's id says which blocks it reads."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transect.errors import InputError
from transect.models.memory.backends.tables import wide_type
from transect.models.selectors._balance import counts, statistics
from transect.models.selectors._seeds import generator
from transect.models.selectors._top import best
from transect.models.selectors.base import Selection, Selector, SelectorConfig, Shape

if TYPE_CHECKING:
    from transect.models.memory.memory import Memory


_ROWS = 4096  # ids drawn at a time


class RandHash(Selector):
    """b distinct blocks per token id from a fixed table [vocabulary, b], gate 1; nothing is learned or scored.

    The table is drawn without replacement, uniform over blocks, from (seed, layer); it is a buffer, saved in the
    checkpoint. Raises InputError where token ids are missing, or a balanced table has not been built.
    Source: Roller et al. 2021; Avg-K 3.5 (a draw of its own per layer: ASSUMED 0.6). Cost: one look-up.
    """

    class Config(SelectorConfig):
        """hash_per_layer: each layer has a table of its own. hash_balanced: `balance_by` the training set's token
        counts builds the table before training.
        """

        kind: str = "rand_hash"
        seed: int = 0
        hash_per_layer: bool = True
        hash_balanced: bool = False

    config: Config
    needs_token_ids = True

    def __init__(self, config: Config, shape: Shape) -> None:
        super().__init__(config, shape)
        self.table: Tensor
        self.register_buffer("table", torch.empty(shape.vocab_size, shape.active, dtype=torch.int32))
        self._ready = not config.hash_balanced
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Draw the table; a balanced one is marked as missing until `balance_by` builds it."""
        if self.table.is_meta:
            return
        self._ready = not self.config.hash_balanced
        self.table.copy_(self._drawn() if self._ready else torch.tensor(-1))

    def balance_by(self, token_counts: Tensor) -> None:
        """Build the table so that blocks carry equal shares of the text: token_counts [vocabulary] of the training set.

        From the most frequent id on, each takes the b blocks with the least load so far, in random order where equal;
        ids that never occur keep their random blocks. Raises InputError for counts of another length.
        """
        if token_counts.shape != (self.shape.vocab_size,):
            given, size = list(token_counts.shape), self.shape.vocab_size
            raise InputError(f"token counts have shape {given}; rand_hash needs one count for each of {size} token ids")
        frequency = token_counts.to("cpu", torch.float64)
        table = self._drawn()
        load = 0.5 * torch.rand(self.shape.blocks, generator=self._source("ties"), dtype=torch.float64, device="cpu")
        for token in frequency.argsort(descending=True, stable=True)[: int((frequency > 0).sum())].tolist():
            blocks = load.topk(self.shape.active, largest=False).indices
            table[token] = blocks
            load[blocks] += frequency[token]
        self.table.copy_(table)
        self._ready = True

    def _drawn(self) -> Tensor:
        source = self._source("draw")
        parts = [
            best(torch.rand(rows, self.shape.blocks, generator=source, device="cpu"), self.shape.active).indices
            for rows in _pieces(self.shape.vocab_size)
        ]
        return torch.cat(parts).int()

    def _source(self, purpose: str) -> torch.Generator:
        return generator(f"{self.config.seed}:{purpose}", self.shape.layer if self.config.hash_per_layer else None)

    def forward(
        self, x: Tensor, memory: "Memory", token_ids: Tensor | None = None, real: Tensor | None = None
    ) -> Selection:
        if token_ids is None:
            raise InputError(
                "selector rand_hash chooses by token id, but the model was given embeddings; give token ids (input_ids)"
            )
        if not self._ready:
            self._check_built()
        ids = token_ids if real is None else token_ids.where(real, token_ids.new_zeros(()))
        blocks = self.table[ids].long()
        kept = torch.ones_like(blocks, dtype=torch.bool)
        if real is not None:
            kept = kept & real[:, None]
            blocks = blocks.where(kept, blocks.new_full((), -1))
        weights = kept.to(wide_type(x.dtype))
        stats = statistics(counts(blocks, self.shape.blocks, kept), kept, weights, None, real)
        return Selection(blocks, weights, None, None, {}, stats)

    def _check_built(self) -> None:
        if bool((self.table < 0).any()):
            raise InputError(
                "selector rand_hash with hash_balanced has no table yet; give balance_by the training set's token "
                "counts, or load a checkpoint"
            )
        self._ready = True

    def flops(self) -> float:
        """None: a look-up."""
        return 0.0


def _pieces(total: int) -> list[int]:
    return [min(_ROWS, total - start) for start in range(0, total, _ROWS)]
