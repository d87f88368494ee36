"""A comparison in a terminal of 80 columns, and as Markdown."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from transect.comparing.alignment import Alignment
from transect.comparing.findings import Finding
from transect.comparing.quantities import LANGUAGE, Quantity
from transect.comparing.rows import COSTS
from transect.comparing.sentences import p_word, short, unmeasured
from transect.comparing.statistics import Mean
from transect.recipes.page import short as rounded
from transect.results import Table
from transect.summaries import number
from transect.train.display import span

HEADS = ("", "value", "difference [95 %]", "p", "Holm", "seeds")
_SIZES = {"parameters": "parameters", "active_parameters": "active", "peak_memory": "memory"}


def print_comparison(table: Table, alignments: Sequence[Alignment], found: Sequence[Finding], console: Console) -> None:
    """For each alignment a grid of every quantity's values and differences, and one of what it took to get there."""
    for alignment in alignments:
        own = [one for one in found if one.alignment == alignment and _shown(one)]
        if not alignment.main or not own:
            continue
        baseline = next((one.baseline for one in own if one.baseline), None)
        against = f"; differences to {baseline}" if baseline else ""
        console.print(f"at equal {alignment.words}{against}", style="bold", highlight=False, markup=False)
        for quantity in dict.fromkeys(one.quantity for one in own):
            grid = _grid(_titled(quantity), HEADS)
            for one in own:
                if one.quantity == quantity:
                    grid.add_row(*cells_of(one))
            console.print(grid)
        _print_costs(table, alignment, console)


def _shown(one: Finding) -> bool:
    """Whether there is room for it: a number to read first, or a loss by domain, that says something of its own."""
    language = one.quantity.task == LANGUAGE and not unmeasured(one)
    return one.repeats is None and (language or (one.quantity.headline and not unmeasured(one)))


def cells_of(one: Finding) -> tuple[str, ...]:
    """Arm, value, difference to the baseline with its interval, p, Holm's p, seeds."""
    mean = "-" if one.mean is None else _plus_minus(one.mean)
    seeds = str(len(one.values))
    if one.difference is None:
        return one.arm.name, mean, "", "", "", seeds
    p, corrected = (_p(value) for value in (one.difference.p, one.holm))
    return one.arm.name, mean, _interval(one.difference.mean), p, corrected, seeds


def markdown(sentences: Sequence[str], notes: Sequence[str], found: Sequence[Finding]) -> str:
    """Sentences, notes, and a table for each alignment."""
    lines = ["# Comparison", "", *(f"- {sentence}" for sentence in sentences)]
    if notes:
        lines += ["", "## To know first", "", *(f"- {note}" for note in notes)]
    for alignment in dict.fromkeys(one.alignment for one in found):
        lines += ["", f"## At equal {alignment.words}", ""]
        lines += [f"| quantity | arm | {' | '.join(HEADS[1:])} |", f"|{'---|' * (len(HEADS) + 1)}"]
        for one in found:
            if one.alignment == alignment and one.repeats is None:
                lines.append(f"| {_titled(one.quantity)} | {' | '.join(cells_of(one))} |")
    return "\n".join(lines) + "\n"


def _print_costs(table: Table, alignment: Alignment, console: Console) -> None:
    grid = _grid(
        "what it took to get there, means over seeds", ("", "steps", "tokens", "time", "FLOPs", *_SIZES.values())
    )
    matched = table.where(variant=alignment.name, part="mean", task=None, probe="compare")
    for arm in dict.fromkeys(row.model for row in matched.where(metric="steps")):
        amounts = {row.metric: row.value for row in matched.where(model=arm) if row.metric in COSTS}
        sizes = {row.metric: row.value for row in table.where(model=arm, part="arm")}
        cells = [
            *(_rounded(amounts[name]) for name in ("steps", "tokens")),
            "-" if amounts["seconds"] is None else span(amounts["seconds"]),
            _rounded(amounts["flops"]),
            *(_rounded(sizes[name], "B" if name == "peak_memory" else "") for name in _SIZES),
        ]
        grid.add_row(str(arm), *cells)
    console.print(grid)


def _grid(title: str, heads: Sequence[str]) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 0, 0, 1))
    for place, head in enumerate(heads):
        grid.add_column(head, justify="left" if place == 0 else "right", overflow="fold", no_wrap=place > 0)
    return grid


def _rounded(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{rounded(value)}{unit}".strip()


def _titled(quantity: Quantity) -> str:
    return quantity.words + (f",{quantity.ending}" if quantity.ending else "")


def _plus_minus(mean: Mean) -> str:
    if mean.error is None:
        return number(mean.value)
    return f"{number(mean.value)} ±{(mean.error.high - mean.error.low) / 2:.2g}"


def _interval(mean: Mean) -> str:
    sign = "+" if mean.value > 0 else ""
    interval = "" if mean.error is None else f" [{_two(mean.error.low)}, {_two(mean.error.high)}]"
    return f"{sign}{short(mean.value)}{interval}"


def _two(value: float) -> str:
    return f"{value:.2g}" if 1e-3 <= abs(value) < 100 else short(value)


def _p(value: float | None) -> str:
    return "-" if value is None else p_word(value).removeprefix("p ").removeprefix("= ")
