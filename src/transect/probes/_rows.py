"""One layer's tokens as the rows that fits are made of."""

import torch
from torch import Tensor

from transect.probes._fits import GROUPS, Owners
from transect.probes.base import Setting, Sight
from transect.view.capture import Seen


class ChosenRows:
    """The chosen tokens of one layer of one batch: sites and targets as [tokens, width], each taken out once.

    `width` None keeps every site's own; else wider sites go through a seeded random projection to that width.
    """

    def __init__(self, setting: Setting, seen: Seen, sight: Sight, chosen: Tensor, width: int | None) -> None:
        self._setting, self._seen, self._sight, self._chosen, self._width = setting, seen, sight, chosen, width
        self._sites: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}

    def site(self, name: str) -> Tensor:
        """A site's chosen tokens, projected where the probe projects."""
        if name not in self._sites:
            rows = self._sight.rows(self._seen[name], self._chosen)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._sites[name] = self._projected(name, rows)
        return self._sites[name]

    def target(self, key: str) -> Tensor:
        """An element's output: its target site, plus the stream added to it."""
        if key not in self._targets:
            target, _, added = key.partition("+")
            if added:
                add, _, weight = added.partition("*")
                stream = self._seen[add] * float(weight) if weight else self._seen[add]
                rows = self._sight.rows(self._seen[target] + stream, self._chosen)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                self._targets[key] = self._projected(target, rows)
            else:
                self._targets[key] = self.site(target)
        return self._targets[key]

    @property
    def owners(self) -> Owners:
        """Whose tokens they are."""
        key = ("owners", id(self._chosen))
        if key not in self._sight.scratch:
            keys = torch.from_numpy((self._setting.unit_keys % GROUPS).astype("int64")).to(self._sight.unit.device)
            rows = self._sight.owners(self._chosen)
            self._sight.scratch[key] = Owners(rows, self._sight.unit, keys[self._sight.unit])
        return self._sight.scratch[key]

    def _projected(self, site: str, rows: Tensor) -> Tensor:
        width = self._width
        if width is None or rows.shape[1] <= width:
            return rows
        key = ("projection", site, rows.shape[1])
        if key not in self._sight.scratch:
            seed = (self._setting.seed * 1_000_003 + _number(site)) % 2**31
            generator = torch.Generator().manual_seed(seed)
            matrix = torch.randn(rows.shape[1], width, generator=generator, dtype=torch.float64) / width**0.5
            self._sight.scratch[key] = matrix.to(rows)
        return rows @ self._sight.scratch[key]


def _number(text: str) -> int:
    """A number for a name that is the same in every process."""
    return int.from_bytes(text.encode(), "big") % 1_000_003
