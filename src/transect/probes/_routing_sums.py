"""What one sparse layer adds up over a text: who chose what, how large each expert's output is, one fit an expert."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transect.metrics.angles import widened
from transect.metrics.moments import Moments
from transect.probes._fits import GROUPS, Group

TOTALS = 2
"""Columns of `totals` beside one for each expert."""

_PACKED = ("totals", "pairs", "kinds", "influence", "errors", "shift", "every")


def spaced(count: int, most: int) -> list[int]:
    """The numbers of all experts, or of `most` evenly spaced ones of more."""
    return list(range(count)) if count <= most else [place * count // most for place in range(most)]


def places(count: int, most: int) -> int:
    """Places for experts: one for each, or one for each of `most` and one for the others together."""
    return count if count <= most else most + 1


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens of one batch as a layer routes them; -1 stands for a dropped choice."""

    index: Tensor  # [tokens, active] chosen experts, by their places in `LayerSums`
    unit: Tensor  # [tokens] error unit
    group: Tensor  # [tokens] hash group of the error unit
    kind: Tensor  # [tokens] place of the token's id among those of the text
    every: Tensor | None = None  # [tokens, active] chosen experts by number, where not all have a place of their own

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens and slots at which an expert was chosen, [choices] each."""
        rows, slots = torch.where(self.index == expert)
        return rows, slots


@dataclass(slots=True, eq=False)
class LayerSums:
    """Sums of a layer of E experts; float64 where nothing else is said.

    `numbers` are the experts that have rows. Where those are not all, the last of the E places stands for the others
    together, and `every` [groups, all + 2] holds choices of each expert, tokens and dropped choices; else it is empty.
    `totals` [units, E + 2]: choices of each expert, tokens, dropped choices. `pairs` [groups, E + 1, E + 1]: tokens
    that chose both, where the last one stands for every token. `kinds` [groups, E, token ids of the text] int32:
    choices. `influence` [units, E]: sums over choices. `errors` [units, E, 3]: scored choices, squared errors, squared
    distances from the fit's mean; `shift` [E, width]: sums of those distances as vectors.
    """

    totals: Tensor
    pairs: Tensor
    kinds: Tensor
    influence: Tensor
    errors: Tensor
    shift: Tensor
    fits: list[Group]
    numbers: Tensor
    every: Tensor

    @classmethod
    def empty(
        cls, count: int, units: int, kinds: int, width: int, device: torch.device, most: int | None = None
    ) -> "LayerSums":
        """Nothing seen yet of a layer with `count` experts, of which `most` (all) have rows; `width` 0: no fits."""
        most = count if most is None else most
        wide = {"dtype": torch.float64, "device": device}
        numbers, experts = spaced(count, most), places(count, most)
        return cls(
            torch.zeros(units, experts + TOTALS, **wide),
            torch.zeros(GROUPS, experts + 1, experts + 1, **wide),
            torch.zeros(GROUPS, experts, kinds, dtype=torch.int32, device=device),
            torch.zeros(units, experts, **wide),
            torch.zeros(units if width else 0, experts, 3, **wide),
            torch.zeros(experts, width, **wide),
            [Group("ffn_in", ("expert",), weighted=False) for _ in range(experts if width else 0)],
            torch.tensor(numbers, device=device),
            torch.zeros(GROUPS if count > most else 0, count + TOTALS, **wide),
        )

    @staticmethod
    def nbytes(experts: int, units: int, kinds: int, width: int) -> int:
        """Bytes of the sums, of the fits, and of what rows are computed from."""
        rows = 8 * (units + 1100) * (6 * experts + 2 * TOTALS) + 16 * GROUPS * (experts + 1) ** 2
        fitted = 2 * Moments.nbytes(width, [width]) + 8 * width * (width + 3)
        return rows + (4 * GROUPS + 32) * experts * kinds + experts * fitted

    @property
    def experts(self) -> int:
        """How many places for experts there are."""
        return self.totals.shape[1] - TOTALS

    @property
    def some(self) -> bool:
        """Whether only some experts have rows."""
        return len(self.every) > 0

    def placed(self, index: Tensor) -> Tensor:
        """The places of experts [tokens, active] given by number, -1 for a dropped choice."""
        if not self.some:
            return index
        at = torch.searchsorted(self.numbers, index.clamp_min(0)).clamp_max(len(self.numbers) - 1)
        own = torch.where(self.numbers[at] == index, at, len(self.numbers))
        return own.masked_fill(index < 0, -1)

    def add(self, tokens: Tokens) -> None:
        """Count choices, pairs of choices, token ids and dropped choices."""
        experts, kept = self.experts, tokens.index >= 0
        hot = torch.zeros(len(tokens.index), experts + 1, dtype=torch.float64, device=tokens.index.device)
        hot.scatter_add_(1, tokens.index.clamp_min(0), kept.double())
        hot[:, experts] = 1
        dropped = (~kept).sum(1, keepdim=True).double()
        self.totals.index_add_(0, tokens.unit, torch.cat([hot, dropped], dim=1))
        for group in tokens.group.unique().tolist():
            mine = hot[tokens.group == group]
            self.pairs[group] += mine.T @ mine
        at = (tokens.group[:, None] * experts + tokens.index) * self.kinds.shape[2] + tokens.kind[:, None]
        self.kinds.view(-1).index_add_(0, at[kept], torch.ones_like(at[kept], dtype=torch.int32))
        if tokens.every is not None:
            count = self.every.shape[1] - TOTALS
            chosen = tokens.every.masked_fill(~kept, count + 1)
            chosen = torch.cat([chosen, torch.full_like(chosen[:, :1], count)], dim=1)  # and the token itself
            chosen = tokens.group[:, None] * self.every.shape[1] + chosen
            ones = torch.ones(chosen.numel(), dtype=torch.float64, device=chosen.device)
            self.every.view(-1).index_add_(0, chosen.flatten(), ones)

    def add_influence(self, expert: int, ratio: Tensor, unit: Tensor) -> None:
        """Add what one expert adds to the stream, relative to it, [choices]."""
        self.influence[:, expert].index_add_(0, unit, ratio.double())

    def add_linearity(self, expert: int, phase: str, x: Tensor, y: Tensor, unit: Tensor) -> None:
        """Fit or tune the expert's map on its own choices [choices, width], or score it."""
        group, x, y = self.fits[expert], widened(x), widened(y)
        if phase != "score":
            group.add(phase, x, [y])
        elif group.fits:
            fit = group.fits[0]
            centred, missed = y - fit.mean_y, y - fit(x)
            self.shift[expert] += centred.sum(0).double()
            squares = [torch.linalg.vector_norm(part, dim=1).double().square() for part in (missed, centred)]
            found = torch.stack([torch.ones_like(squares[0]), *squares], dim=1)
            self.errors[:, expert].index_add_(0, unit, found)

    def solvable(self) -> Iterator[Group]:
        """The fits that any row has come to."""
        return (group for group in self.fits if group.filled)

    def pack(self) -> dict:
        """Plain tensors and numbers."""
        return {name: getattr(self, name) for name in _PACKED} | {"fits": [group.pack() for group in self.fits]}

    def unpack(self, packed: dict) -> None:
        """Take up what `pack` gave."""
        for name in _PACKED:
            setattr(self, name, packed[name].to(getattr(self, name).device))
        for group, parts in zip(self.fits, packed["fits"], strict=True):
            group.unpack(parts)
