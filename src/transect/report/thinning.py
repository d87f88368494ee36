"""Rows that a training run logs, thinned to what a curve can show."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from transect.results import Row

MOST_POINTS = 500
_MOST_ROWS = 2000
_LEAST_POINTS = 40
_FEW_CURVES = 6
_CURVE = ("part", "layer", "layer_to", "site", "element", "domain", "split", "variant", "edit")


def thinned(rows: Sequence[Row]) -> Iterator[tuple[Row, str | None]]:
    """The rows in their order, those of training without what no figure has room for, each with a sentence on that.

    Of a few curves of one metric each keeps 500 points: the first, the last, and the lowest and highest of each stretch
    between, so that no peak is lost (min-max aggregation, as in Jugel et al., VLDB 2014, section 3). Many curves, such
    as those of layers, keep the same steps, evenly spaced, so that they can stand above each other in a map.
    """
    dropped: set[int] = set()
    said: dict[int, str] = {}
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row.step is not None and (row.probe == "train" or (row.probe is None and row.task is not None)):
            groups[row.run, row.model, row.probe, row.task, row.metric, row.part is None].append(number)
    for numbers in groups.values():
        kept, sentence = _kept(rows, numbers)
        if sentence:
            dropped.update(set(numbers) - kept)
            said |= dict.fromkeys(kept, sentence)
    for number, row in enumerate(rows):
        if number not in dropped:
            yield row, said.get(number)


def _kept(rows: Sequence[Row], numbers: list[int]) -> tuple[set[int], str]:
    """The rows of a metric that stay, and what is said of them; nothing where all of them do."""
    curves: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number in numbers:
        curves[tuple(getattr(rows[number], name) for name in _CURVE)].append(number)
    steps = sorted({_step(rows[number]) for number in numbers})
    most = min(MOST_POINTS, max(_LEAST_POINTS, _MOST_ROWS // len(curves)))
    if len(steps) <= most:
        return set(numbers), ""
    if len(curves) > _FEW_CURVES:
        chosen = set(_evenly(steps, most))
        kept = {number for number in numbers if rows[number].step in chosen}
        return kept, f"{len(chosen):,} of {len(steps):,} logged steps, evenly spaced."
    kept = {number for own in curves.values() for number in _extremes(rows, own, most)}
    return kept, f"At most {most:,} of {len(steps):,} logged steps: the lowest and highest of each stretch."


def _extremes(rows: Sequence[Row], numbers: list[int], most: int) -> Iterable[int]:
    ordered = sorted(numbers, key=lambda number: _step(rows[number]))
    known = [(value, number) for number in ordered if (value := rows[number].value) is not None]
    absent = [number for number in ordered if rows[number].value is None]
    kept = set(_evenly(absent, most))
    if len(known) <= most:
        return kept | {number for _, number in known}
    inner, count = known[1:-1], most // 2 - 1
    for stretch in range(count):
        part = inner[stretch * len(inner) // count : (stretch + 1) * len(inner) // count]
        kept |= {min(part)[1], max(part)[1]}
    return kept | {known[0][1], known[-1][1]}


def _evenly(items: list[int], most: int) -> list[int]:
    """At most so many of the items, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _step(row: Row) -> int:
    return -1 if row.step is None else row.step
