"""Which positions a query sees: one rule, read as a dense mask or, one index at a time, by a fused kernel."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) indices -> whether the query sees the key; the form that FlexAttention takes."""


@dataclass(frozen=True, slots=True, eq=False)
class Visible:
    """What each of `queries` positions sees; queries follow `offset` cached keys.

    causal: keys up to the query's own. real [batch, keys] is False at padding, which only sees and is seen by itself;
    documents [batch, keys] numbers the documents of a packed sequence, which do not see each other. None: all one.
    """

    queries: int
    offset: int
    causal: bool
    device: torch.device
    real: Tensor | None = None
    documents: Tensor | None = None
    _dense: dict[tuple, Tensor] = field(default_factory=dict)
    _blocks: dict[tuple, "BlockMask"] = field(default_factory=dict)

    def copied(self) -> "Visible":
        """The same rule with the masks made so far, to which nothing is added by others."""
        return replace(self, _dense=dict(self._dense), _blocks=dict(self._blocks))

    def plain(self, keys: int, window: int | None) -> bool:
        """Whether the rule says nothing beyond `causal`, over as many keys as queries, or one query that sees all."""
        bare = self.real is None and self.documents is None and (window is None or window >= keys)
        if not self.causal:
            return bare
        return bare and self.offset + self.queries == keys and (self.offset == 0 or self.queries == 1)

    def rule(self, window: int | None, own: bool = True) -> Rule:
        """The rule; window: keys at a distance below it. Without `own`, a position does not see itself."""
        causal, offset, real, documents = self.causal, self.offset, self.real, self.documents

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            place = query + offset
            same = place == key
            seen = key <= place if causal else key >= 0
            if window is not None:
                seen = seen & ((place - key).abs() < window)
            if real is not None:
                seen = seen & ((real[batch, key] & real[batch, place]) | same)
            if documents is not None:
                seen = seen & (documents[batch, key] == documents[batch, place])
            return seen if own else seen & ~same

        return sees

    def dense(self, keys: int, window: int | None = None, own: bool = True) -> Tensor:
        """The rule as booleans [batch or 1, 1, queries, keys]; made once for each kind of layer of a pass."""
        key = (keys, window, own)
        if key not in self._dense:
            batch = torch.arange(self.rows or 1, device=self.device)[:, None, None, None]
            query = torch.arange(self.queries, device=self.device)[None, None, :, None]
            cached = torch.arange(keys, device=self.device)[None, None, None, :]
            self._dense[key] = self.rule(window, own)(batch, torch.zeros_like(batch), query, cached)
        return self._dense[key]

    def lonely(self, keys: int, window: int | None) -> Tensor:
        """[batch or 1, 1, queries, 1]: queries that see no position but themselves."""
        key = (keys, window, "lonely")
        if key not in self._dense and self.plain(keys, window):
            place = torch.arange(self.queries, device=self.device)[None, None, :, None] + self.offset
            self._dense[key] = place < 1 if self.causal else (place < 1) & (keys == 1)
        elif key not in self._dense:
            self._dense[key] = ~self.dense(keys, window, own=False).any(-1, keepdim=True)
        return self._dense[key]

    def blocks(self, keys: int, window: int | None, own: bool = True) -> "BlockMask":
        """The rule as FlexAttention wants it, with the blocks of keys that need no look; made once a pass too."""
        from torch.nn.attention.flex_attention import create_block_mask

        key = (keys, window, own)
        if key not in self._blocks:
            rule = self.rule(window, own)
            self._blocks[key] = create_block_mask(rule, self.rows, None, self.queries, keys, device=str(self.device))
        return self._blocks[key]

    @property
    def rows(self) -> int | None:
        """Rows of the batch where they differ in what is seen; None where one rule holds for all."""
        per_row = self.real if self.real is not None else self.documents
        return None if per_row is None else len(per_row)
