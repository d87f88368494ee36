"""The rows of a comparison: values by seed, means, differences, p values, seeds needed, costs, and the curves."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from transect.comparing.alignment import Alignment
from transect.comparing.arms import Arm
from transect.comparing.curves import read_off
from transect.comparing.findings import Finding
from transect.comparing.quantities import OOD, VALID, Quantity, whole
from transect.comparing.reading import Run
from transect.comparing.statistics import MOST_SEEDS, ONE_SEED, Difference, bootstrapped, mean_of, seeds_needed, spread
from transect.results import Row

COSTS = {"steps": "steps", "tokens": "tokens", "seconds": "s", "flops": "FLOPs"}
_NO_SPREAD = "the differences do not vary over seeds"


def of_finding(found: Finding) -> Iterator[Row]:
    """Its values by seed, its mean with two intervals, and what there is to say of its difference to the baseline."""
    blank = _blank(found.quantity, found.alignment, found.arm)
    for seed, run in found.arm.runs.items():
        row = replace(blank, part="seed", **_stamp(run, found.alignment))
        value = found.values.get(seed)
        yield row.missing(found.reasons[seed]) if value is None else row.measured(value)
    means = [replace(blank, part=part, n=len(found.values)) for part in ("mean", "mean_bootstrap")]
    if found.mean is None:
        yield from (row.missing(next(iter(found.reasons.values()))) for row in means)
    else:
        yield means[0].measured(found.mean.value, found.mean.error)
        yield _bootstrap(means[1], [found.values[seed] for seed in sorted(found.values)])
    if found.baseline is not None:
        yield from _of_difference(found, replace(blank, part="difference"))


def _of_difference(found: Finding, row: Row) -> Iterator[Row]:
    one = found.difference
    if one is None:
        yield row.missing(f"{found.arm.name if found.mean is None else found.baseline} has no value")
        return
    row = replace(row, n=one.mean.n)
    yield row.measured(one.mean.value, one.mean.error)
    if one.each:
        yield _bootstrap(replace(row, part="difference_bootstrap"), one.each)
    plain = replace(row, unit="1")
    why = one.mean.reason or _NO_SPREAD
    p = replace(plain, part="p")
    yield p.missing(why) if one.p is None else p.measured(one.p)
    corrected = replace(plain, part="p_holm")
    if found.holm is not None:
        yield corrected.measured(found.holm)
    else:
        yield corrected.missing(
            f"counted once, as {found.repeats.words}" if found.repeats and one.p is not None else why
        )
    if one.each:
        yield from _seeds(replace(row, unit="seeds"), one, found.quantity.worth)


def _seeds(row: Row, one: Difference, worth: float | None) -> Iterator[Row]:
    """How many seeds it takes to see the difference as it is, and one of the size that is worth seeing."""
    effects = {"seeds_needed": one.mean.value} | ({} if worth is None else {f"seeds_needed_for_{worth:g}": worth})
    for part, effect in effects.items():
        own = replace(row, part=part)
        if len(one.each) < 2:
            yield own.missing(ONE_SEED)
        elif not (deviation := spread(one.each)):
            yield own.missing(_NO_SPREAD)
        else:
            needed = seeds_needed(effect, deviation)
            yield own.missing(f"more than {MOST_SEEDS:,}") if needed is None else own.measured(float(needed))


def _bootstrap(row: Row, values: Sequence[float]) -> Row:
    interval = bootstrapped(values)
    if isinstance(interval, str):
        return row.missing(interval)
    return replace(row, value=float(np.mean(values)), low=interval[0], high=interval[1])


def of_match(arms: Sequence[Arm], alignment: Alignment) -> Iterator[Row]:
    """Where each run is at the alignment, and what it took to get there: by run in the columns, by arm as means."""
    metric, unit = f"matched_{alignment.by}", "nats/token" if alignment.by == "loss" else COSTS[alignment.by]
    blank = Row(probe="compare", metric=metric, unit=unit, value=alignment.target, variant=alignment.name)
    if alignment.reason:
        yield blank.missing(alignment.reason)
        return
    for arm in arms:
        places = [_stamp(run, alignment) for run in arm.runs.values()]
        yield from (replace(blank, model=arm.name, part="seed", **place) for place in places)
        for name, of_cost in COSTS.items():
            amounts = [read_off(getattr(run, name), alignment.place(run)) for run in arm.runs.values()]
            row = replace(blank, model=arm.name, part="mean", metric=name, unit=of_cost, n=len(amounts))
            if np.isfinite(amounts).all():
                mean = mean_of(amounts)
                yield row.measured(mean.value, mean.error)
            else:
                yield row.missing("its rows do not say")


def of_curves(arms: Iterable[Arm]) -> Iterator[Row]:
    """Smoothed in- and out-of-distribution loss of every run over its steps."""
    for arm in arms:
        for run in arm.runs.values():
            places = {step: number for number, step in enumerate(run.steps)}
            for quantity in (whole(VALID), whole(OOD)):
                curve = run.curves.get(quantity)
                blank = replace(_columns(quantity), model=arm.name, run=run.name, seed=run.seed, part="curve")
                for step, value in zip(curve.steps, curve.values, strict=True) if curve else ():
                    yield replace(blank, value=float(value), **_place(run, (places[step], 0.0)))


def _columns(quantity: Quantity) -> Row:
    return Row(
        probe="compare",
        metric=quantity.metric,
        unit=quantity.unit,
        value=0.0,
        task=quantity.task,
        split=quantity.split,
        domain=quantity.domain,
        element=quantity.element,
        layer=quantity.layer,
    )


def _blank(quantity: Quantity, alignment: Alignment, arm: Arm) -> Row:
    variant = ", ".join(word for word in (quantity.told, alignment.name) if word)
    return replace(_columns(quantity), model=arm.name, variant=variant)


def _stamp(run: Run, alignment: Alignment) -> dict:
    """The columns of a run where it is at the alignment."""
    return {"run": run.name, "seed": run.seed, **_place(run, alignment.place(run))}


def _place(run: Run, place: tuple[int, float]) -> dict[str, float | int | None]:
    amounts = {name: read_off(getattr(run, name), place) for name in COSTS}
    known = {name: amount if np.isfinite(amount) else None for name, amount in amounts.items()}
    steps, tokens = known["steps"], known["tokens"]
    return {
        "step": None if steps is None else round(steps),
        "tokens": None if tokens is None else round(tokens),
        "seconds": known["seconds"],
        "flops": known["flops"],
    }
