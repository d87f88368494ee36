"""Made-up training runs with planted curves, for comparisons."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from training_rows import stamp
from transect import recipes
from transect.results import Row, Table, to_line

STEPS = (10, 20, 30)
T13 = {"valid": (3.6, 3.4, 3.2), "ood": (4.5, 4.35, 4.25)}
TEXTS = {"valid": (("wiki", 1009),), "ood": (("code", 503), ("mail", 211))}


def language_rows(
    step: int,
    losses: dict[str, float],
    texts: dict[str, tuple[tuple[str, int], ...]] = TEXTS,
    **others: Any,
) -> list[Row]:
    """Every domain of a split with its loss, the n-th of several off by n - (number - 1) / 2 times 0.2."""
    rows = []
    for split, loss in losses.items():
        for number, (domain, n) in enumerate(texts[split]):
            value = loss + 0.2 * (number - (len(texts[split]) - 1) / 2)
            place = {"task": "language_modelling", "split": split, "domain": domain, "n": n, **stamp(step, **others)}
            rows.append(Row(metric="nats_per_token", value=value, unit="nats/token", **place))
            rows.append(Row(metric="bits_per_byte", value=value / 3, unit="bits/byte", **place))
    return rows


def recipe_of(name: str, seed: int = 0, settings: Sequence[str] = ()) -> dict[str, Any]:
    """A tiny recipe of this name, at a constant learning rate."""
    given = ["train.schedule.kind=constant", "train.steps=30", f"train.seed={seed}", *settings]
    return recipes.load("tiny-demo-vanilla", given).plain() | {"name": name}


def planted_run(
    path: Path,
    rows: Sequence[Row],
    name: str = "plain",
    seed: int = 0,
    settings: Sequence[str] = (),
    data: str = "0123",
    done: bool = True,
) -> Path:
    """The folder of a run with these rows."""
    path.mkdir(parents=True)
    recipe = recipe_of(name, seed, settings)
    (path / "config.json").write_text(json.dumps({"kind": "training", "data": data, "recipe": recipe}))
    (path / "rows.jsonl").write_text("".join(map(to_line, rows)))
    if done:
        Table(rows).write(path)
    return path


def curve_rows(curves: dict[str, Sequence[float]], steps: Sequence[int] = STEPS, **others: Any) -> list[Row]:
    """Rows of evaluations at these steps, and what a run logs of its memory."""
    rows = []
    for number, step in enumerate(steps):
        rows += language_rows(step, {split: losses[number] for split, losses in curves.items()}, **others)
        place = {"probe": "train", "split": "train", **stamp(step, **others)}
        rows.append(Row(metric="peak_memory", value=2.0**30, unit="bytes", **place))
    return rows


def study(
    folder: Path, effects: dict[str, Callable[[int], float]], seeds: Sequence[int] = (0, 1, 2), steps: int = 20
) -> list[Path]:
    """Runs of several arms and seeds: ID falls alike, OOD is ID + 1 + what the arm's effect gives for the seed."""
    made = []
    for arm, effect in effects.items():
        for seed in seeds:
            rows = []
            for number in range(1, steps + 1):
                loss = 2.5 + 4 / number**0.7 + 0.013 * seed
                run = f"{arm}-{seed}"
                rows += language_rows(
                    7 * number, {"valid": loss, "ood": loss + 1 + effect(seed)}, run=run, seed=seed, model=arm
                )
            made.append(planted_run(folder / f"{arm}-{seed}", rows, arm, seed))
    return made
