"""Places along the network, what is read at each, and everything that follows from a level at every place."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from transect.metrics.errors import Error, bootstrap
from transect.metrics.shares import increments, shares
from transect.probes.base import Setting
from transect.results import Row
from transect.view.sites import NEXT
from transect.view.view import View

BOTH = "both"
"""Owner of a step to which attention and FFN both add."""

TOTAL, SHARE_MHA, SHARE_FFN = -3, -2, -1
"""Where these stand in the numbers that `Derived` gives."""

_SHARES = ((SHARE_MHA, "share_mha"), (SHARE_FFN, "share_ffn"))


@dataclass(frozen=True, slots=True)
class Place:
    """A state of the stream: where it is captured, how rows name it, and which sub-layer wrote last (None: none)."""

    layer: int  # whose capture it is
    captured: str
    site: str
    index: int  # the row's layer
    owner: str | None
    part: str | None = None  # which FFN wrote, in a layer with two, or that only a norm did


def places_of(view: View) -> list[Place]:
    """resid[0], then the stream after each attention and after each FFN, in the order of the network.

    An FFN inside attention is a part of attention; a second FFN is one more FFN; a norm that the stream passes by
    itself belongs to what wrote before it.
    """
    found = [Place(0, "resid", "resid", 0, None)]
    for layer, known in enumerate(view.maps):
        for addition in known.additions:
            owners = {"attn" if name == "attn" else "ffn" for name in addition.adds}
            owner = BOTH if len(owners) > 1 else next(iter(owners), found[-1].owner)
            part = None if addition.adds else "norm"
            if "ffn2" in known.sublayers and owner == "ffn":
                part = "+".join(addition.adds)
            last = addition.target == NEXT
            site, index = ("resid", layer + 1) if last else (addition.target, layer)
            found.append(Place(layer, addition.target, site, index, owner, part))
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
        steps = increments(levels)
        nothing = np.full_like(steps, np.nan)
        if BOTH in self.owners:
            return np.concatenate([levels, steps, nothing, nothing, np.full((*levels.shape[:-1], 3), np.nan)], axis=-1)
        first = 0 if self.rule.start == "embeddings" else 1
        counted = levels[..., first:]
        if self.rule.negative == "clip":
            gains = increments(-counted if self.rule.falling else counted).clip(0)
            gains = -gains if self.rule.falling else gains
            counted = np.concatenate([counted[..., :1], counted[..., :1] + gains.cumsum(-1)], axis=-1)
        found = shares(counted, self.owners[first:])
        before = nothing[..., :first]
        ends = [np.asarray(x)[..., None] for x in (found.total, found.share_mha, found.share_ffn)]
        mha, ffn = found.cumulative_mha, found.cumulative_ffn
        return np.concatenate([levels, steps, before, mha, before, ffn, *ends], axis=-1)


@dataclass(frozen=True, slots=True)
class Names:
    """How an estimator's rows are called."""

    metric: str
    unit: str
    variant: str
    share: str  # the variant of share rows


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """One estimator's numbers: the derived values with their errors."""

    names: Names
    values: np.ndarray  # [4 places]
    errors: list[Error | None]
    n: int
    documents: int

    @property
    def share_reason(self) -> str | None:
        """Why there are no shares; None when there are."""
        return share_reason(float(self.values[TOTAL]), self.errors[TOTAL], self.names.metric == "lens_loss")


def ratios(names: Names, sums: np.ndarray, counts: np.ndarray, setting: Setting, derive: Derived) -> Estimate:
    """The estimate from levels that are sums over counts [places, units], with errors over units."""
    came = counts.sum(0) > 0
    columns = np.concatenate([sums[:, came], counts[:, came]]).T

    def statistic(totals: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return derive(totals[:, : len(sums)] / totals[:, len(sums) :])

    values, errors = bootstrap(columns, setting.unit_keys[came], statistic, setting.seed)
    return Estimate(names, values, errors, int(counts[0].sum()), int(came.sum()))


def rows_of(estimate: Estimate, places: list[Place]) -> Iterator[Row]:
    """Levels, increments, cumulative sums and shares."""
    count, steps, names = len(places), len(places) - 1, estimate.names
    base = Row(metric=names.metric, value=0.0, unit=names.unit, n=estimate.n, documents=estimate.documents)

    def filled(row: Row, at: int) -> Row:
        return row.measured(float(estimate.values[at]), estimate.errors[at])

    for at, place in enumerate(places):
        yield filled(replace(base, site=place.site, layer=place.index, variant=names.variant), at)
    for step, place in enumerate(places[1:]):
        named = replace(base, element=place.owner, part=place.part, layer=place.layer)
        yield filled(replace(named, variant=f"{names.variant}/increment"), count + step)
    for number, owner in enumerate(("attn", "ffn")):
        for step, place in enumerate(places[1:]):
            at = count + (1 + number) * steps + step
            last_of_layer = place.captured == NEXT
            if last_of_layer and np.isfinite(estimate.values[at]):
                variant = f"{names.variant}/cumulative"
                yield filled(replace(base, element=owner, layer=place.layer, variant=variant), at)
    reason = estimate.share_reason
    for at, metric in _SHARES:
        row = replace(base, metric=metric, unit="1", variant=names.share)
        yield filled(row, at) if reason is None else row.missing(reason)


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


def with_seeds(error: Error | None, values: np.ndarray) -> Error | None:
    """An error over documents with that over k-means seeds [seeds] added to it, root of the sum of squares."""
    if error is None or len(values) < 2 or not np.isfinite(values).all():
        return error
    stderr = float(np.hypot(error.stderr, values.std(ddof=1) / len(values) ** 0.5))
    return replace(error, stderr=stderr)


def over_seeds(derived: np.ndarray, estimate: Estimate) -> Iterator[Row]:
    """Shares averaged over k-means seeds, with the error over them, from each seed's numbers [seeds, 4 places]."""
    seeds, reason = len(derived), estimate.share_reason
    for at, metric in _SHARES:
        row = Row(metric=metric, value=None, unit="1", reason="", variant="MI/over_seeds", n=seeds)
        row = replace(row, documents=estimate.documents)
        own = derived[:, at]
        if reason is None and seeds < 2:
            reason = "one k-means seed only"
        if reason is None and not np.isfinite(own).all():
            reason = "one k-means seed finds no total gain at all"
        if reason is not None:
            yield row.missing(reason)
            continue
        value, stderr = float(own.mean()), float(own.std(ddof=1) / seeds**0.5)
        yield row.measured(value, Error(stderr, value - 1.96 * stderr, value + 1.96 * stderr))
