"""Mutual information of two labellings from sparse counts."""

from dataclasses import dataclass

import numpy as np

DEBIASES = ("off", "shuffle", "miller_madow")


def mutual_information(labels: np.ndarray, targets: np.ndarray, debias: str = "off", seed: int = 0) -> float:
    """Plug-in I = sum_xy P(x,y) ln( P(x,y) / (P(x) P(y)) ) of labels [n] and targets [n], in nats, float64.

    Labels and targets are integers from 0. 0 to the smaller entropy without `debias`; too large by about
    (X - 1)(Y - 1) / (2 n) for independent ones. `debias`: "off"; "shuffle" takes off the value with the targets
    permuted by `seed`, so put the positions in an order of their own first; "miller_madow" takes off
    (cells - X - Y + 1) / (2 n), with the numbers of pairs, labels and targets that occur. Both can go below 0. Raises
    ValueError for unequal lengths, negative numbers or nothing to count. Source: arXiv 2403.02436, section 3.6 of our
    notes; the paper mentions no correction. Cost: a sort of n numbers, twice for "shuffle".
    """
    return float(_debiased(labels, targets, None, debias, seed)[0])


def mutual_information_without(
    labels: np.ndarray, targets: np.ndarray, groups: np.ndarray, debias: str = "off", seed: int = 0
) -> np.ndarray:
    """`mutual_information` of all positions, then without each group [n] from 0 -> [largest group + 2] values.

    For a delete-group jackknife. A number that is no position's group leaves nothing out; a group of all positions
    gives NaN, of which no error can be made. "shuffle" permutes once, then leaves out. Cost: one sort of n numbers for
    all groups, twice for "shuffle".
    """
    return _debiased(labels, targets, groups, debias, seed)


def permuted(targets: np.ndarray, seed: int) -> np.ndarray:
    """The targets in a random order, the same for equal seeds."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(targets)


@dataclass(frozen=True, slots=True)
class _Counts:
    """Sum of c ln c and number of the cells that occur: of all positions first, then without each group."""

    xlogx: np.ndarray
    cells: np.ndarray


def _debiased(labels: np.ndarray, targets: np.ndarray, groups: np.ndarray | None, debias: str, seed: int) -> np.ndarray:
    """Value of all positions, then without each group."""
    if debias not in DEBIASES:
        raise ValueError(f"unknown debias {debias!r}; allowed are {', '.join(DEBIASES)}")
    labels, targets = _integers("labels", labels), _integers("targets", targets)
    groups = np.zeros(len(labels), np.int64) if groups is None else _integers("groups", groups)
    if not len(labels) == len(targets) == len(groups) or not len(labels):
        raise ValueError(f"mutual information: {len(labels)} labels, {len(targets)} targets, {len(groups)} groups")
    values = _information(labels, targets, groups, debias == "miller_madow")
    if debias == "shuffle":
        values = values - _information(labels, permuted(targets, seed), groups, False)
    return values


def _information(labels: np.ndarray, targets: np.ndarray, groups: np.ndarray, miller_madow: bool) -> np.ndarray:
    """I = ln n + (sum c_xy ln c_xy - sum c_x ln c_x - sum c_y ln c_y) / n, for all positions and without each group."""
    wide, parts = int(targets.max()) + 1, int(groups.max()) + 1
    if (int(labels.max()) + 1) * wide * parts >= 2**63:
        raise ValueError("mutual information: labels, targets or groups are too large; number them from 0")
    # Sorted, the positions of a pair stand together, and within a pair those of a group.
    keys = np.sort((labels * wide + targets) * parts + groups)
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    counts = np.diff(first, append=len(keys))
    pairs, group = np.divmod(keys[first], parts)
    held = np.bincount(group, weights=counts, minlength=parts)
    n = np.concatenate([[len(keys)], len(keys) - held])
    joint = _left_out(pairs, group, counts, parts)
    rows = _side_left_out(pairs // wide, group, counts, parts)
    columns = _side_left_out(pairs % wide, group, counts, parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.maximum(np.log(n) + (joint.xlogx - rows.xlogx - columns.xlogx) / n, 0.0)
        if miller_madow:
            values = values - (joint.cells - rows.cells - columns.cells + 1) / (2 * n)
    return np.where(n > 0, values, np.nan)


def _side_left_out(side: np.ndarray, group: np.ndarray, counts: np.ndarray, parts: int) -> _Counts:
    """`_left_out` of the labels or the targets of the pairs."""
    total = np.bincount(side * parts + group, weights=counts)
    cells = np.flatnonzero(total)
    return _left_out(cells // parts, cells % parts, total[cells], parts)


def _left_out(cells: np.ndarray, group: np.ndarray, counts: np.ndarray, parts: int) -> _Counts:
    """Sums over all cells, and what is left of them without each group, from the sorted cells' counts in the groups."""
    first = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
    totals = np.add.reduceat(counts, first)
    total = np.repeat(totals, np.diff(first, append=len(cells)))
    lost = np.bincount(group, weights=_xlogx(total) - _xlogx(total - counts), minlength=parts)
    gone = np.bincount(group, weights=total == counts, minlength=parts)
    whole = _xlogx(totals).sum()
    return _Counts(np.concatenate([[whole], whole - lost]), np.concatenate([[len(totals)], len(totals) - gone]))


def _xlogx(counts: np.ndarray) -> np.ndarray:
    return counts * np.log(np.maximum(counts, 1))


def _integers(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iu" or (len(values) and values.min() < 0):
        raise ValueError(f"{name}: give a list of integers from 0")
    return values.astype(np.int64, copy=False)
