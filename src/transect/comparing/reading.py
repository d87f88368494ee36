"""A training run as `compare` reads it: its in-distribution loss, and every quantity that was measured, over steps."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transect.comparing.curves import SHARE_LEFT_OUT, median_of_three
from transect.comparing.quantities import BITS, LANGUAGE, LOSS, OOD, VALID, Quantity, whole
from transect.errors import InputError
from transect.results import Row, Table

Points = dict[int, list[tuple[int, float]]]
"""By step: token counts and values."""
Texts = Mapping[Quantity, set[str]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity at some steps [points], smoothed where there are three or more."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Run:
    """One training run from a tenth of its length on.

    steps, tokens, seconds, flops, loss [evaluations]: where it was evaluated, and the smoothed loss over all tokens of
    `valid` in nats per token. curves: every quantity, that loss too.
    """

    path: Path
    name: str
    data: str
    recipe: dict[str, Any]
    seed: int
    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    curves: dict[Quantity, Curve]
    text: frozenset[tuple[str | None, int]]
    peak_memory: float | None


@dataclass(frozen=True, slots=True)
class _Read:
    """The folder's settings and rows, before they are curves."""

    path: Path
    config: dict[str, Any]
    rows: list[Row]
    points: dict[Quantity, Points]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders.

    Raises InputError for fewer than two, a folder that is not of a training run or is given twice, a run without an
    evaluation on `valid`, and runs that were trained or evaluated on different text.
    """
    if len(paths) < 2:
        raise InputError(f"{len(paths)} run was given; give at least two run folders to compare")
    homes = Counter(path.resolve() for path in paths)
    for path in paths:
        if homes[path.resolve()] > 1:
            raise InputError(f"{path} is given twice; give each run once")
    read = [_read(path) for path in paths]
    texts = _texts(read)
    short = Counter(path.resolve().name for path in paths)
    runs = []
    for one in read:
        home = one.path.resolve()
        name = home.name if short[home.name] == 1 else f"{home.parent.name}/{home.name}"
        runs.append(_run(one, name, texts))
    for run in runs[1:]:
        if run.data != runs[0].data:
            why = f"were trained on other data (fingerprints {run.data} and {runs[0].data})"
            raise InputError(f"{run.path} and {runs[0].path} {why}; compare runs on the same corpus")
        if run.text != runs[0].text:
            why = "were evaluated on other parts of `valid`, so their losses do not compare"
            raise InputError(f"{run.path} and {runs[0].path} {why}; train with the same objective and train.evaluation")
    return runs


def _read(path: Path) -> _Read:
    config = _config(path)
    rows = list(_rows(path))
    points: dict[Quantity, Points] = defaultdict(lambda: defaultdict(list))
    _take(points, rows)
    for folder in sorted({found.parent for found in (path / "evaluations").glob("*/*/rows.*")}):
        _take(points, _rows(folder), evaluated=True)
    return _Read(path, config, rows, points)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or config.get("kind") != "training" or not isinstance(config.get("recipe"), dict):
        raise InputError(f"{path} is not the folder of a training run; give the -o folder of `transect train`")
    return config


def _rows(folder: Path) -> Iterator[Row]:
    """Rows of a folder; of one that is being written all whole lines."""
    if (folder / "rows.parquet").is_file():
        yield from Table.read(folder / "rows.parquet")
        return
    lines = folder / "rows.jsonl"
    if not lines.is_file():
        raise InputError(f"{folder} has no rows yet; compare it when it has been evaluated")
    try:
        for line in lines.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            yield Row(**{"value": None, **json.loads(line)})
    except (TypeError, ValueError) as error:
        raise InputError(f"{lines} is not a table of rows: {str(error).splitlines()[0]}") from error


def _take(points: dict[Quantity, Points], rows: Iterable[Row], evaluated: bool = False) -> None:
    """Add what can be compared; language modelling after the training may read more text than the run itself did."""
    for row in rows:
        if row.step is not None and row.value is not None and _comparable(row):
            quantity = Quantity.of(row, evaluated and row.task == LANGUAGE)
            points[quantity][row.step].append((row.n or 0, row.value))


def _comparable(row: Row) -> bool:
    """Whether it is a number of the model: of a task, but its single seeds, controls and best rule, or of a probe."""
    if row.task is not None:
        variant = row.variant or ""
        own = variant in ("majority", "chance") or variant.startswith("seed ") or ": best (" in variant
        return row.metric != "left_out" and not own
    return row.probe not in (None, "train") and row.layer is None and row.layer_to is None


def _texts(read: Sequence[_Read]) -> Texts:
    """The domains that any run has of a split, by what stands for them as a whole."""
    found: dict[Quantity, set[str]] = defaultdict(set)
    for one in read:
        for quantity in one.points:
            if quantity.domain is not None and (together := _together(quantity)):
                found[together].add(quantity.domain)
    return found


def _together(quantity: Quantity) -> Quantity | None:
    """The quantity of the whole split that a domain's belongs to."""
    if quantity.task != LANGUAGE or quantity.domain is None:
        return None
    if quantity.split == VALID and quantity.metric == LOSS and quantity.variant is None:
        return whole(VALID)
    return whole(OOD, quantity.metric, quantity.variant) if _means(quantity) else None


def _means(quantity: Quantity) -> bool:
    return quantity.split == OOD and quantity.metric in (LOSS, BITS)


def _run(read: _Read, name: str, texts: Texts) -> Run:
    points = {quantity: _settled(own) for quantity, own in read.points.items()}
    wholes = {together: _joined(points, together, domains) for together, domains in texts.items()}
    loss = wholes.get(whole(VALID), {})
    if not loss:
        raise InputError(f"{read.path} has no evaluation on `valid`; train with a corpus that has this split")
    last = max(loss)
    steps = sorted(step for step in loss if step >= SHARE_LEFT_OUT * last)
    series = {quantity: {step: value for step, (_, value) in own.items()} for quantity, own in points.items()}
    series |= wholes
    curves = {quantity: _curve(own, steps) for quantity, own in series.items()}
    places = {row.step: row for row in read.rows if row.task == LANGUAGE and row.split == VALID}
    train = read.config["recipe"].get("train", {})
    memory = [row.value for row in read.rows if row.metric == "peak_memory" and row.value is not None]
    return Run(
        path=read.path,
        name=name,
        data=str(read.config.get("data")),
        recipe=read.config["recipe"],
        seed=int(train.get("seed") or 0),
        steps=np.array(steps, np.float64),
        tokens=_column(places, steps, "tokens"),
        seconds=_column(places, steps, "seconds"),
        flops=_column(places, steps, "flops"),
        loss=curves[whole(VALID)].values,
        curves={quantity: curve for quantity, curve in curves.items() if len(curve.steps)},
        text=frozenset((q.domain, own[max(own)][0]) for q, own in points.items() if _together(q) == whole(VALID)),
        peak_memory=max(memory, default=None),
    )


def _settled(own: Points) -> dict[int, tuple[int, float]]:
    """One count and value for each step: the mean of the rows with most tokens."""
    found = {}
    for step, rows in own.items():
        most = max(n for n, _ in rows)
        values = [value for n, value in rows if n == most]
        found[step] = most, sum(values) / len(values)
    return found


def _joined(
    points: Mapping[Quantity, dict[int, tuple[int, float]]], together: Quantity, domains: set[str]
) -> dict[int, float]:
    """The whole split at the steps that have all its domains: over tokens for `valid`, over domains for `ood`."""
    parts = [points.get(replace(together, domain=domain), {}) for domain in domains]
    found = {}
    for step in set.intersection(*(set(part) for part in parts)):
        counts, values = zip(*(part[step] for part in parts), strict=True)
        weights = counts if together.split == VALID else None
        if weights is None or all(weights):
            found[step] = float(np.average(values, weights=weights))
    return found


def _curve(own: Mapping[int, float], evaluated: Sequence[int]) -> Curve:
    steps = sorted(step for step in own if evaluated[0] <= step <= evaluated[-1])
    return Curve(np.array(steps, np.float64), median_of_three(np.array([own[step] for step in steps], np.float64)))


def _column(places: Mapping[int | None, Row], steps: Sequence[int], name: str) -> np.ndarray:
    """A count at each evaluation; NaN where the rows do not say."""
    return np.array([getattr(places[step], name) for step in steps], np.float64)
