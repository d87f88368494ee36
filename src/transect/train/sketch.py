"""Curves as text: braille characters, each two dots wide and four high."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_EMPTY = 0x2800
_LABEL = 8
_SETTLED = 0.1
_MANY = 20


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in the order of x. `mark` is a letter that stands at the right of the last one, or nothing."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    mark: str = ""


def chart(
    curves: Sequence[Curve], width: int, height: int, write: Callable[[float], str], cut: bool = False
) -> list[Text]:
    """Lines of `width` characters: `height` of curves with the highest and lowest value, then the ends of x.

    `write` words a value in at most 8 characters. With `cut` the axis ends at the highest value after the first tenth
    of x, so that a steep beginning of many points does not flatten the rest; what is above is not drawn.
    """
    every = [point for curve in curves for point in curve.points]
    if not every:
        return [Text("nothing yet", style="dim"), *[Text()] * height]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    cut = cut and max(len(curve.points) for curve in curves) >= _MANY
    shown = [y for x, y in every if not cut or x >= left + _SETTLED * (right - left)]
    low, high = min(y for _, y in every), max(shown)
    marks = _marks(curves, low, high, height)
    plot = _Plot(width - _LABEL - 1 - max(map(len, marks)), height)
    for curve in curves:
        plot.draw([(_part(x, left, right), _part(y, low, high)) for x, y in curve.points], curve.colour)
    labels = {0: write(high), height - 1: write(low)} if high > low else {height // 2: write(high)}
    lines = []
    for row, (drawn, letters) in enumerate(zip(plot.lines(), marks, strict=True)):
        line = Text(no_wrap=True).append(f"{labels.get(row, ''):>{_LABEL}} ", style="dim").append_text(drawn)
        for mark, colour in letters:
            line.append(mark, style=colour)
        lines.append(line)
    first, last = f"{left:,.0f}", f"{right:,.0f}"
    ends = first if right == left else f"{first}{last:>{max(0, plot.columns - len(first))}}"
    return [*lines, Text(f"{'':{_LABEL}} {ends}", style="dim", no_wrap=True)]


def _part(value: float, low: float, high: float) -> float:
    """0 at `low`, 1 at `high`."""
    return (value - low) / (high - low) if high > low else 0.5


def _marks(curves: Sequence[Curve], low: float, high: float, height: int) -> list[list[tuple[str, str]]]:
    """By line the marks of the curves that end there."""
    lines: list[list[tuple[str, str]]] = [[] for _ in range(height)]
    for curve in curves:
        if curve.mark and curve.points:
            at = min(1.0, _part(curve.points[-1][1], low, high))
            lines[min(height - 1, int((1 - at) * height))].append((curve.mark, curve.colour))
    return lines


class _Plot:
    """A grid of dots."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._cells = [[0] * columns for _ in range(rows)]
        self._colours = [[""] * columns for _ in range(rows)]

    def draw(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Join points, given as parts of the width and height; what is higher than 1 is left out."""
        wide, high = 2 * self.columns - 1, 4 * self.rows - 1
        dots = [(round(x * wide), round((1 - y) * high)) for x, y in points]
        for (x0, y0), (x1, y1) in zip(dots[:1] + dots, dots, strict=False):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for step in range(steps + 1):
                self._dot(round(x0 + (x1 - x0) * step / steps), round(y0 + (y1 - y0) * step / steps), colour)

    def _dot(self, x: int, y: int, colour: str) -> None:
        if y >= 0:
            self._cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            self._colours[y // 4][x // 2] = colour

    def lines(self) -> list[Text]:
        """The grid as characters."""
        found = []
        for cells, colours in zip(self._cells, self._colours, strict=True):
            line = Text(no_wrap=True)
            for cell, colour in zip(cells, colours, strict=True):
                line.append(chr(_EMPTY + cell) if cell else " ", style=colour)
            found.append(line)
        return found
