"""From the sums of one sparse layer to its rows."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from transect.metrics.errors import Error, bootstrap, jackknife
from transect.probes._fits import Group
from transect.probes._routing_sums import TOTALS, LayerSums
from transect.probes.base import Setting
from transect.results import Row

NEVER = "no token chose it"


def spread_rows(setting: Setting, layer: int, sums: LayerSums, unweighted: str | None) -> Iterator[Row]:
    """Load and influence of each expert, and how evenly the layer spreads its choices.

    `unweighted` is the reason why a layer's weights cannot be seen, and with them no influence.
    """
    totals, experts = sums.totals.cpu().numpy(), sums.experts
    seen = totals[:, experts] > 0
    columns = np.concatenate([totals, sums.influence.cpu().numpy()], axis=1)[seen]
    values, errors = bootstrap(columns, setting.unit_keys[seen], lambda t: _spread(t, experts), setting.seed)
    chosen, dropped = totals[:, :experts].sum(0), totals[:, experts + 1].sum()
    documents, kept = int(seen.sum()), int(chosen.sum())
    row = Row(metric="entropy", value=None, unit="1", reason="", layer=layer, n=kept, documents=documents)
    why = "the layer has one expert" if experts == 1 else "every choice was dropped"
    dead = chosen == 0
    if sums.some:
        groups = sums.every.cpu().numpy()
        groups = groups[groups.any(1)]
        whole = groups.sum(0)
        values[0], *left = _evenness(np.stack([whole, *(whole - groups)])[:, :-TOTALS])[:, 0].tolist()
        errors = [jackknife(values[0], left), *errors[1:]]
        dead = whole[:-TOTALS] == 0
    yield _filled(row, values[0], errors[0], why)
    yield _filled(replace(row, metric="dead_fraction"), float(dead.mean()), None, "")
    every = replace(row, metric="drop_fraction", n=kept + int(dropped))
    yield _filled(every, values[1], errors[1], "nothing was chosen")
    for expert, number in enumerate(sums.numbers.tolist()):
        at = 2 + expert
        row = replace(row, metric="load", part=f"expert {number}")
        yield _filled(row, values[at], errors[at], "every choice was dropped")
        at += experts
        own = replace(row, metric="influence", n=int(chosen[expert]), documents=_documents(totals[:, expert]))
        value = values[at] if unweighted is None else np.nan
        yield _filled(own, value, errors[at], unweighted or NEVER)


def _spread(totals: np.ndarray, experts: int) -> np.ndarray:
    """Entropy, share dropped, loads, influences [draws, 2 + 2 experts]; NaN where there is nothing to divide by."""
    chosen = totals[:, :experts]
    kept = chosen.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        dropped = totals[:, [experts + 1]]
        share = dropped / (dropped + kept)
        found = [_evenness(chosen), share, chosen / kept, totals[:, experts + 2 :] / chosen]
        return np.concatenate(found, axis=1)


def _evenness(chosen: np.ndarray) -> np.ndarray:
    """- sum load ln load / ln E [draws, 1] of choices [draws, E]; NaN where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        load = chosen / chosen.sum(1, keepdims=True)
        entropy = -(load * np.log(np.where(load > 0, load, 1))).sum(1, keepdims=True) / np.log(chosen.shape[1])
        return np.clip(entropy, 0, 1)


def pair_rows(layer: int, sums: LayerSums, active: int, most: int, documents: int) -> Iterator[Row]:
    """Correlation of being chosen, of the pairs of experts where it is largest in size."""
    groups, numbers = sums.pairs.cpu().numpy(), sums.numbers.tolist()
    experts = len(numbers)
    if sums.some:  # without the place of all others
        groups = np.delete(np.delete(groups, experts, axis=1), experts, axis=2)
    total = groups.sum(0)
    base = Row(metric="co_selection", value=None, unit="1", reason="", layer=layer, n=int(total[-1, -1]))
    base = replace(base, documents=documents)
    if active == 1 or experts == 1:
        yield base.missing("a token chooses one expert")
        return
    whole = correlations(total)
    left = [correlations(total - group) for group in groups if group[-1, -1] > 0]
    first, second = np.triu_indices(experts, 1)
    sizes = np.abs(np.nan_to_num(whole[first, second]))
    chosen = np.sort(np.argsort(-sizes, kind="stable")[:most])
    for i, j in zip(first[chosen].tolist(), second[chosen].tolist(), strict=True):
        error = jackknife(float(whole[i, j]), [float(one[i, j]) for one in left])
        reason = "one of them is chosen by every token or by none"
        yield _filled(replace(base, part=f"{numbers[i]},{numbers[j]}"), float(whole[i, j]), error, reason)


def correlations(pairs: np.ndarray) -> np.ndarray:
    """(P(ij) - P(i) P(j)) / sqrt(P(i) (1 - P(i)) P(j) (1 - P(j))) [experts, experts]; NaN for a P of 0 or 1.

    `pairs` [experts + 1, experts + 1] counts tokens that chose both, the last one standing for every token.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = pairs / pairs[-1, -1]
        alone = shares[-1, :-1]
        wide = np.sqrt(alone * (1 - alone))
        found = (shares[:-1, :-1] - np.outer(alone, alone)) / np.outer(wide, wide)
    return np.where(np.outer(wide, wide) > 0, np.clip(found, -1, 1), np.nan)


def kind_rows(layer: int, sums: LayerSums, documents: int) -> Iterator[Row]:
    """How much an expert's choices tell of the token's id, for the layer and for each expert."""
    groups = sums.kinds.cpu().numpy()
    tokens = sums.pairs[:, -1, -1].cpu().numpy()
    total = groups.sum(0)
    values = preferences(total, tokens.sum())
    left = [preferences(total - groups[at], tokens.sum() - tokens[at]) for at in np.flatnonzero(tokens)]
    chosen = total.sum(1)
    owners = _documents_of(sums)
    numbers = sums.numbers.tolist()
    for expert in (-1, *range(len(numbers))):  # the layer's own value comes last
        error = jackknife(float(values[expert]), [float(one[expert]) for one in left])
        part = None if expert < 0 else f"expert {numbers[expert]}"
        row = Row(metric="type_preference", value=None, unit="nats", reason="", layer=layer, part=part)
        count, seen = (chosen.sum(), documents) if expert < 0 else (chosen[expert], owners[expert])
        row = replace(row, n=int(count), documents=int(seen))
        if expert < 0 and sums.some:
            yield row.missing(f"{len(numbers)} of the {sums.every.shape[1] - TOTALS} experts are looked at")
            continue
        yield _filled(row, values[expert], error, NEVER)


def preferences(counts: np.ndarray, tokens: float) -> np.ndarray:
    """KL(P(token id | expert) || P(token id)) of each expert, and its mean over choices, the mutual information, last.

    `counts` [experts, ids] of choices, made by `tokens` tokens, in nats, less the first-order bias of counting: for an
    expert (ids seen - 1) / 2 choices - (sum of P(id | expert) / P(id) - 1) / 2 tokens. NaN for an expert without
    choices. In the mean this is Miller and Madow's (pairs seen - k ids - experts + k) / 2 choices for k different
    experts a token, which for k = 1 is the one of `metrics.information`.
    """
    counts = counts[:, counts.sum(0) > 0].astype(np.float64)
    chosen = counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        here = counts / chosen[:, None]
        ratio = here / (counts.sum(0) / chosen.sum())
        plain = (here * np.log(np.where(counts > 0, ratio, 1))).sum(1)
        bias = ((counts > 0).sum(1) - 1) / (2 * chosen) - (ratio.sum(1) - 1) / (2 * tokens)
        found = plain - bias
        mean = (chosen * np.nan_to_num(found)).sum() / chosen.sum()
    return np.append(found, mean)


def linear_rows(setting: Setting, layer: int, sums: LayerSums, least: int) -> Iterator[Row]:
    """Held-out R^2 of a ridge map of each expert's own input, about the mean of the scored outputs."""
    errors, shift = sums.errors.cpu().numpy(), sums.shift.cpu().numpy()
    counts = errors[..., 0]
    total = counts.sum(0)
    offset = np.square(shift).sum(1) / np.maximum(total, 1) ** 2
    spread = errors[..., 2] - counts * offset  # each unit's share of the spread about the score mean
    seen = counts.any(1)
    columns = np.concatenate([errors[..., 1], spread], axis=1)[seen]
    if seen.any():
        values, found = bootstrap(columns, setting.unit_keys[seen], _explained, setting.seed)
    else:
        values, found = np.full(sums.experts, np.nan), [None] * sums.experts
    row = Row(metric="r2_heldout", value=None, unit="1", reason="", layer=layer, element="expert")
    for expert, (number, group) in enumerate(zip(sums.numbers.tolist(), sums.fits, strict=False)):
        reason = _undetermined(group, shift.shape[1], least)
        if reason is None and not total[expert]:
            reason = "no score token chose it"
        row = replace(row, part=f"expert {number}", split=f"heldout/{setting.unit_name}", n=int(total[expert]))
        row = replace(row, documents=_documents(counts[:, expert]))
        value = values[expert] if reason is None else np.nan
        yield _filled(row, value, found[expert], reason or "its output is the same for every score token")


def _explained(totals: np.ndarray) -> np.ndarray:
    """1 - SSE / spread [draws, experts]; a draw without spread has no value."""
    missed, spread = np.split(totals, 2, axis=1)
    return 1 - np.divide(missed, spread, out=np.full_like(missed, np.nan), where=spread > 0)


def _undetermined(group: Group, width: int, least: int) -> str | None:
    """Why an expert's map is not told; None when it is."""
    spread = group.spread
    if spread is None:
        return "no fit token chose it"
    if spread.rank == 0:
        return "its input is the same for every fit token"
    if spread.rows < least:
        return f"{spread.rows} fit tokens chose it; a map of {width} inputs is fitted on {least} or more"
    return None


def _documents_of(sums: LayerSums) -> np.ndarray:
    return (sums.totals[:, : sums.experts] > 0).sum(0).cpu().numpy()


def _documents(counts: np.ndarray) -> int:
    return int((counts > 0).sum())


def _filled(row: Row, value: float, error: Error | None, reason: str) -> Row:
    """The row with its value and error, or with the reason where the value is NaN."""
    return row.measured(float(value), error) if np.isfinite(value) else row.missing(reason)
