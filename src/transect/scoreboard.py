"""Scores of judged models as tables for a terminal of 80 columns: tasks down, models across."""

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from transect.results import Row, Table

_MOST_MODELS = 4
_KEPT = {  # of a task with many conventions, the ends of variants that are shown
    "options": (": option", ": option per character", "chance"),
}
_METRICS = {"options": ("accuracy",), "cloze": ("accuracy", "perplexity"), "early_exit": ("nats_per_token",)}
_LEFT_OUT = ("seed",)  # variants that begin so are parts of a mean
_BY_PART = ("minimal_pairs",)  # whose rows with a part are pieces of the one without
_WIDTH = 46


def print_scores(table: Table, console: Console) -> None:
    """A grid for each task, with ± one standard error; several models side by side, more than four below each other."""
    names = list(dict.fromkeys(_name(row) for row in table))
    for start in range(0, len(names), _MOST_MODELS):
        some = names[start : start + _MOST_MODELS]
        for task in dict.fromkeys(row.task for row in table):
            own = [row for row in table if row.task == task and _name(row) in some and _shown(row)]
            if own:
                _print_task(str(task), own, some, console)


def _print_task(task: str, rows: list[Row], names: list[str], console: Console) -> None:
    grid = Grid(box=box.SIMPLE_HEAD, title=task.replace("_", " "), title_justify="left", padding=(0, 1))
    grid.add_column("", max_width=_WIDTH, overflow="fold")
    for name in names:
        grid.add_column(name, justify="right", overflow="fold")
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(_line(row), {})[_name(row)] = row
    for line, found in cells.items():
        grid.add_row(line, *(_cell(found.get(name)) for name in names))
    console.print(grid)


def _shown(row: Row) -> bool:
    if row.value is None or (row.part is not None and row.task in _BY_PART):
        return False
    variant = row.variant or ""
    if row.metric not in _METRICS.get(str(row.task), (row.metric,)) or variant.startswith(_LEFT_OUT):
        return False
    ends = _KEPT.get(str(row.task))
    return ends is None or variant.endswith(ends) or ": best (" in variant


def _line(row: Row) -> str:
    variant = row.variant
    if row.task == "language_modelling" or (variant and variant.startswith(("window", "seed"))):
        variant = None
    where = None if row.layer is None else f"layer {row.layer}"
    split = row.split if row.task == "language_modelling" else None
    metric = None if row.metric == "accuracy" else row.metric.replace("_", " ")
    return " ".join(word for word in (row.domain, split, where, metric, variant) if word)


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return "-"
    value = f"{row.value:.3f}" if abs(row.value) < 1000 else f"{row.value:,.0f}"
    return value if row.stderr is None else f"{value} ± {row.stderr:.3f}"


def _name(row: Row) -> str:
    """A model's name: the run's where it is from one, with the step where it was judged at several."""
    name = row.run or row.model or "model"
    return name if row.step is None else f"{name} {row.step}"
