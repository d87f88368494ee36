"""Curves over a run: smoothed, and read off where another curve first falls to a value."""

import numpy as np

SHARE_LEFT_OUT = 0.1
Place = tuple[int, float]
"""A point's index and how far, 0 .. 1, one is on the way from it to the next."""


def median_of_three(values: np.ndarray) -> np.ndarray:
    """The running median of three neighbours; both ends, and curves of fewer than three points, stay as they are.

    values [points], any unit. Source: FFN-Wider 3.8 (its form ours).
    """
    if len(values) < 3:
        return values
    inner = np.median([values[:-2], values[1:-1], values[2:]], axis=0)
    return np.concatenate([values[:1], inner, values[-1:]])


def crossing(falling: np.ndarray, target: float) -> Place | None:
    """Where values [points] are first no higher than the target, in a line between the points around it.

    None where they never are, or already were at the first point.
    """
    reached = np.flatnonzero(falling <= target)
    if not len(reached):
        return None
    first = int(reached[0])
    if first == 0:
        return (0, 0.0) if falling[0] == target else None
    before, after = falling[first - 1], falling[first]
    return first - 1, float((before - target) / (before - after))


def read_off(values: np.ndarray, place: Place) -> float:
    """The value at a place, in a line between two points."""
    index, share = place
    return float(values[index] if share == 0 else values[index] + share * (values[index + 1] - values[index]))
