"""Places along the network, what is read at each, and everything that follows from a level at every place."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from transect.metrics.errors import Error
from transect.metrics.shares import shares
from transect.results import Row
from transect.view.sites import NEXT
from transect.view.view import View

BOTH = "both"
"""Owner of a step to which attention and FFN both add."""


@dataclass(frozen=True, slots=True)
class Place:
    """A state of the stream: where it is captured, how rows name it, and which sub-layer wrote last (None: none)."""

    layer: int  # whose capture it is
    captured: str
    site: str
    index: int  # the row's layer
    owner: str | None


def places_of(view: View) -> list[Place]:
    """resid[0], then the stream after each attention and after each FFN, in the order of the network."""
    found = [Place(0, "resid", "resid", 0, None)]
    for layer, known in enumerate(view.maps):
        if "resid_mid" in known.taps:
            found.append(Place(layer, "resid_mid", "resid_mid", layer, known.sublayers[0]))
        owner = known.sublayers[-1] if "resid_mid" in known.taps or len(known.sublayers) == 1 else BOTH
        found.append(Place(layer, NEXT, "resid", layer + 1, owner))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How shares are made of levels: where they start, and whether losses count; `falling` for a loss."""

    start: str = "embeddings"
    negative: str = "keep"
    falling: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """Every number that follows from levels [..., places], side by side in the last axis.

    levels [places], increments [places - 1], cumulative MHA and FFN [places - 1] each, then total, share MHA, share
    FFN; increments before the start of the shares are NaN in the cumulative columns.
    """

    owners: tuple[str, ...]  # of the steps
    rule: Rule

    def __call__(self, levels: np.ndarray) -> np.ndarray:
        """[..., places] -> [..., 4 places]; an owner of both makes shares and cumulative sums NaN."""
        steps = np.diff(levels, axis=-1)
        nothing = np.full_like(steps, np.nan)
        if BOTH in self.owners:
            return np.concatenate([levels, steps, nothing, nothing, np.full((*levels.shape[:-1], 3), np.nan)], axis=-1)
        first = 0 if self.rule.start == "embeddings" else 1
        counted = levels[..., first:]
        if self.rule.negative == "clip":
            gains = np.diff(-counted if self.rule.falling else counted, axis=-1).clip(0)
            gains = -gains if self.rule.falling else gains
            counted = np.concatenate([counted[..., :1], counted[..., :1] + gains.cumsum(-1)], axis=-1)
        found = shares(counted, self.owners[first:])
        before = nothing[..., :first]
        ends = [np.asarray(x)[..., None] for x in (found.total, found.share_mha, found.share_ffn)]
        mha, ffn = found.cumulative_mha, found.cumulative_ffn
        return np.concatenate([levels, steps, before, mha, before, ffn, *ends], axis=-1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimator's numbers: the derived values with their errors, and how its rows are called."""

    metric: str
    unit: str
    variant: str
    share: str  # the variant of share rows
    values: np.ndarray  # [4 places]
    errors: list[Error | None]
    n: int
    documents: int

    @property
    def falling(self) -> bool:
        """Whether less is better."""
        return self.metric == "lens_loss"


def rows_of(estimate: Estimate, places: list[Place]) -> Iterator[Row]:
    """Levels, increments, cumulative sums and shares."""
    count, steps = len(places), len(places) - 1
    base = Row(metric=estimate.metric, value=0.0, unit=estimate.unit, n=estimate.n, documents=estimate.documents)

    def filled(row: Row, at: int) -> Row:
        error = estimate.errors[at]
        row = replace(row, value=float(estimate.values[at]))
        return row if error is None else replace(row, stderr=error.stderr, low=error.low, high=error.high)

    for at, place in enumerate(places):
        yield filled(replace(base, site=place.site, layer=place.index, variant=estimate.variant), at)
    for step, place in enumerate(places[1:]):
        named = replace(base, element=place.owner, layer=place.layer)
        yield filled(replace(named, variant=f"{estimate.variant}/increment"), count + step)
    for number, owner in enumerate(("attn", "ffn")):
        for step, place in enumerate(places[1:]):
            at = count + (1 + number) * steps + step
            last_of_layer = place.captured == NEXT
            if last_of_layer and np.isfinite(estimate.values[at]):
                variant = f"{estimate.variant}/cumulative"
                yield filled(replace(base, element=owner, layer=place.layer, variant=variant), at)
    yield from _share_rows(estimate, base, filled)


def _share_rows(estimate: Estimate, base: Row, filled) -> Iterator[Row]:
    size = len(estimate.values)
    total, error = float(estimate.values[size - 3]), estimate.errors[size - 3]
    reason = share_reason(total, error, estimate.falling)
    for offset, metric in ((2, "share_mha"), (1, "share_ffn")):
        row = replace(base, metric=metric, unit="1", variant=estimate.share)
        if reason is None:
            yield filled(row, size - offset)
        else:
            yield replace(row, value=None, reason=reason)


def share_reason(total: float, error: Error | None, falling: bool = False) -> str | None:
    """Why there are no shares; None when there are. `falling`: a gain is a loss that falls."""
    if not np.isfinite(total):
        return "in a parallel layer attention and FFN add to the stream at once"
    if error is None:
        return "the error of the total gain is unknown, so it cannot be told from zero"
    gain = 0.0 - total if falling else total  # not -total, which would write a gain of nothing as -0
    if abs(gain) <= 2 * error.stderr:
        return f"the total gain {gain:.3g} is within two errors ({error.stderr:.2g}) of zero"
    return f"the last state says less than the first: the total gain is {gain:.3g}" if gain < 0 else None
