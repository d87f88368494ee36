"""What a run says of itself, as rows: losses, rates, norms, speed, how evenly memory blocks are used."""

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transect.data.corpus import Corpus
from transect.recipes.recipe import Recipe
from transect.results import Row
from transect.train.meters import Meters
from transect.train.progress import Progress
from transect.train.step import Done


@dataclass(frozen=True, slots=True)
class Stamp:
    """The provenance of every row of a run."""

    run: str
    recipe: str
    data: str
    seed: int
    dtype: str
    code: str
    config: str

    def on(self, row: Row, progress: Progress) -> Row:
        """The row with its provenance and the place in the run."""
        return replace(
            row,
            run=self.run,
            model=self.recipe,
            revision=row.revision or f"step-{progress.step:08d}",
            step=progress.step,
            tokens=progress.tokens if row.tokens is None else row.tokens,
            seconds=round(progress.seconds, 3),
            flops=progress.flops,
            data=row.data or self.data,
            seed=self.seed,
            dtype=row.dtype or self.dtype,
            code=self.code,
            config=row.config or self.config,
        )


def stamp(recipe: Recipe, path: Path, corpus: Corpus) -> Stamp:
    """The provenance of the rows of a run in this folder."""
    return Stamp(
        run=path.resolve().name,
        recipe=recipe.name,
        data=f"{corpus.card.name} [{corpus.fingerprint}]",
        seed=recipe.train.seed,
        dtype=recipe.train.precision,
        code=f"transect {importlib.metadata.version('transect')}",
        config=recipe.fingerprint(),
    )


def of_step(done: Done, rates: Mapping[str, float], skipped: int) -> list[Row]:
    """Rows of one step: each part of the loss and their sum, the gradient's norm, learning rates, block use."""
    rows = []
    for part, value in {**done.losses, "total": done.total}.items():
        rows.append(_number("loss", value, "nats", part=part, why="the loss of this step is not finite"))
    rows.append(_number("gradient_norm", done.norm, "1", why="the gradient of this step is not finite"))
    rows.append(_number("skipped_steps", float(skipped), "steps"))
    rows += [_number("learning_rate", rate, "1", part=part) for part, rate in rates.items()]
    rows += [
        _number("gradient_norm", norm, "1", part=part, why="it is not finite") for part, norm in done.norms.items()
    ]
    for name, numbers in done.loads.statistics().items():
        layer, element = _place(name)
        for metric, value in numbers.items():
            rows.append(replace(_number(metric, value, "1"), layer=layer, element=element))
    return rows


def of_meters(meters: Meters) -> list[Row]:
    """Rows of what the meters read, and of the stream's mean norm at resid[0..L]."""
    norms = [_number("stream_norm", norm, "1", why="the stream is not finite") for norm in meters.stream_norms or ()]
    rows = [replace(row, layer=layer, site="resid") for layer, row in enumerate(norms)]
    blank = Row(probe="train", split="train", metric="", value=0.0, unit="")
    return rows + [
        replace(blank, metric=name, value=value, unit=unit, reason=why if value is None else None)
        for name, (value, unit, why) in meters.read().items()
    ]


def _number(metric: str, value: float, unit: str, part: str | None = None, why: str = "it is not finite") -> Row:
    finite = value == value and abs(value) != float("inf")
    return Row(
        probe="train",
        split="train",
        metric=metric,
        value=value if finite else None,
        reason=None if finite else why,
        unit=unit,
        part=part,
    )


def _place(name: str) -> tuple[int, str]:
    """Layer and element of a name such as `layers.3.inner.`."""
    found = re.fullmatch(r"layers\.(\d+)\.(?:(\w+)\.)?", name)
    assert found is not None
    element = {None: "ffn", "inner": "inner_ffn"}.get(found[2], found[2])
    return int(found[1]), str(element)
