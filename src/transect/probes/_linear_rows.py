"""From the sums of one element to its rows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from transect.metrics.errors import Error, bootstrap, jackknife
from transect.metrics.linearity import NORMALIZATIONS, insample_floor, normalized
from transect.metrics.spectrum import pair_cosine
from transect.probes._fits import COLUMNS, Scores
from transect.probes.base import Setting
from transect.results import Row
from transect.view.sites import Element

if TYPE_CHECKING:
    from transect.probes.nonlinearity import LayerState, Nonlinearity

AT = {name: index for index, name in enumerate(COLUMNS)}


def element_rows(
    probe: "Nonlinearity", setting: Setting, layer: int, name: str, state: "LayerState", insample: dict
) -> Iterator[Row]:
    """Held-out and in-sample R^2, floor, ridge, ranks; for a cosine element also the cosines and the cone."""
    element = state.elements[name]
    assert isinstance(element, Element)
    key = element.output
    group = next(
        group
        for group in state.groups
        if key in group.elements and not group.weighted and group.source == element.source
    )
    base = Row(metric="r2_heldout", value=0.0, unit="1", layer=layer, element=name)
    if probe.project is not None:
        base = replace(base, variant=f"projected/{probe.project}")
    heldout = replace(base, split=f"heldout/{_unit(probe, setting)}")
    scores = state.scores.get(f"{element.source}>{key}")
    spread = group.spread
    reason = None
    inputs = probe.width(setting.view, layer, element.source)
    if spread is None:
        reason = "no fit tokens"
    elif spread.rank == 0:
        reason = f"{element.source} is the same for every fit token"
    elif not element.elementwise and (spread.rows <= inputs or spread.rank >= spread.rows - 1):
        reason = f"{spread.rows} fit tokens cannot determine a map of {inputs} inputs"
    elif scores is None:
        reason = "no score tokens"
    if reason is not None:
        yield heldout.missing(reason)
    else:
        assert spread is not None and scores is not None
        yield from _r2(probe, setting, heldout, scores)
        fit = group.fits[group.elements.index(key)]
        chosen = "tune" if probe.ridge is None else "given"
        yield replace(base, metric="ridge", value=fit.ridge, split=chosen, n=spread.rows, documents=setting.fit_units)
    if spread is not None and spread.rank:
        ranks = (
            ("rank", float(spread.rank)),
            ("effective_rank", spread.effective),
            ("participation_ratio", spread.participation),
        )
        fitted = replace(base, unit="directions", split="fit", n=spread.rows, documents=setting.fit_units)
        for metric, value in ranks:
            yield replace(fitted, metric=metric, value=value)
    if id(group) in insample:
        yield from _insample(group, key, base, insample[id(group)])
    if name in probe.cosine and reason is None and scores is not None:
        yield from _cosines(probe, setting, base, heldout, scores, state)
        if probe.trained is not None and element.elementwise:
            reason = "no approximator is trained for an element-wise function"
            yield replace(heldout, metric="linearity", variant=probe.trained).missing(reason)


def _unit(probe: "Nonlinearity", setting: Setting) -> str:
    return setting.unit_name if probe.split == "hash" else "ordered"


def _insample(group, key: str, base: Row, found: tuple) -> Iterator[Row]:
    rank, values = found
    count = group.counts[0] if hasattr(group, "counts") else group.fit.rows
    value = values[group.elements.index(key)]
    base = replace(base, split="insample", n=count)
    if value is None:
        yield replace(base, metric="r2_insample").missing("the output is the same for every token")
        return
    yield replace(base, metric="r2_insample", value=value)
    floor = insample_floor(rank, count)
    if floor is not None:
        yield replace(base, metric="r2_floor", value=floor)


def _r2(probe: "Nonlinearity", setting: Setting, row: Row, scores: Scores) -> Iterator[Row]:
    sums = scores.sums.cpu().numpy()
    counted = sums[:, AT["n"]] > 0
    total = float(sums[:, AT["n"]].sum())
    shift = float(scores.shift.square().sum()) / total**2 if probe.r2_baseline == "score_mean" else 0.0
    spread = sums[:, AT["syy"]] - sums[:, AT["n"]] * shift  # each unit's share of the spread about the score mean
    if spread.sum() <= 0:
        yield row.missing("the output is the same for every score token")
        return
    pairs = np.stack([sums[:, AT["sse"]], spread], axis=1)[counted]
    value, (error,) = bootstrap(pairs, setting.unit_keys[counted], _explained, setting.seed)
    variant = row.variant if probe.r2_baseline == "score_mean" else "/".join(filter(None, (row.variant, "fit_mean")))
    row = replace(row, n=int(total), documents=int(counted.sum()), variant=variant)
    yield row.measured(float(value[0]), error)


def _explained(totals: np.ndarray) -> np.ndarray:
    """1 - SSE / spread [draws, 1]; a draw without spread has no value, and then the row has no error."""
    errors, spread = totals[:, :1], totals[:, 1:]
    return 1 - np.divide(errors, spread, out=np.full_like(errors, np.nan), where=spread > 0)


def _cosines(
    probe: "Nonlinearity", setting: Setting, base: Row, heldout: Row, scores: Scores, state: "LayerState"
) -> Iterator[Row]:
    sums = scores.sums.cpu().numpy()
    tokens = int(sums[:, AT["cos_n"]].sum())
    if tokens == 0:
        yield replace(heldout, metric="cosine_closed_form").missing("every score output is zero")
        return
    counted = sums[:, AT["cos_n"]] > 0
    common = replace(heldout, n=tokens, documents=int(counted.sum()))
    keys = setting.unit_keys[counted]

    def mean(column: str) -> tuple[float, Error | None]:
        name, count = (f"seq_{column}", "seqs") if probe.average == "token_then_example" else (column, "cos_n")
        pairs = sums[counted][:, [AT[name], AT[count]]]
        value, (error,) = bootstrap(pairs, keys, lambda t: t[:, :1] / t[:, 1:], setting.seed)
        return float(value[0]), error

    cone = _cone(scores)
    size = 1.0 if cone is None else cone[0]
    constant, error = mean("const")
    yield replace(common, metric="constant_baseline").measured(constant, error)
    directions = state.fit_directions[str(base.element)].cpu()
    if float(directions[-1]) > 0:
        insample = float(directions[:-1].norm() / directions[-1])
        yield replace(
            base,
            metric="constant_baseline",
            value=insample,
            split="insample",
            n=int(directions[-1]),
            variant="insample",
        )
    if cone is None:
        yield replace(common, metric="cone_size").missing("fewer than two score outputs have a direction")
    else:
        variant = None if probe.cone_vectors == "outputs" else probe.cone_vectors
        yield replace(common, metric="cone_size", variant=variant).measured(*cone)
    names = [("cosine_closed_form", "cos", "closed_form")]
    if probe.trained is not None and base.element in state.trained:
        names.append(("linearity", "trained", probe.trained))
    for metric, column, label in names:
        score, error = mean(column)
        variant = label if metric == "linearity" else None
        yield replace(common, metric=metric, variant=variant).measured(score, error)
        for how in () if cone is None else NORMALIZATIONS:
            value = normalized(score, size, how)
            row = replace(common, metric="linearity_normalized", variant=f"{how}/{label}")
            reason = "all outputs point the same way" if value is None else None
            yield replace(row, value=value, reason=reason)


def _cone(scores: Scores) -> tuple[float, Error | None] | None:
    sums, counts = scores.cone.cpu(), scores.cone_n.cpu()
    total, number = sums.sum(0), float(counts.sum())
    if number < 2:
        return None
    value = float(pair_cosine(total, number))
    groups = [g for g in range(len(counts)) if counts[g] > 0 and number - float(counts[g]) >= 2]
    left = [float(pair_cosine(total - sums[g], number - float(counts[g]))) for g in groups]
    return value, jackknife(value, left)
