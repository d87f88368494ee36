"""What `transect show RECIPE` prints: the settings that differ from the defaults, the budget by part, and notes."""

from collections.abc import Sequence
from textwrap import fill, indent
from typing import Any

import yaml
from pydantic_core import PydanticUndefined
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from transect.config import Config
from transect.models.budget import Budget, budget
from transect.models.build import skeleton
from transect.models.plug import PlugConfig
from transect.recipes.notes import notes
from transect.recipes.recipe import load

WIDTH = 80


def print_recipe(source: str, changes: Sequence[str], context: int | None, dtype: str) -> None:
    """Print a recipe at 80 columns; raises InputError as `load` and `budget` do."""
    recipe = load(source, changes)
    model = skeleton(recipe.model)
    counted = budget(model, context, dtype)
    console = Console(width=WIDTH)
    for text in (recipe.name, recipe.description, f"Source: {recipe.source}"):
        _say(console, text)
    for section in ("model", "data", "train", "parallel"):
        if settings := differing(getattr(recipe, section)):
            _say(console, f"\n{section}, where it differs from the defaults")
            said = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=WIDTH - 16)
            console.print(indent(said, "  "), highlight=False, markup=False, soft_wrap=True)
    _say(console, f"budget, forward pass, among {counted.context:,} positions")
    console.print(_grid(counted))
    for line in lines(counted):
        _say(console, line)
    for note in notes(recipe.model, model, counted):
        _say(console, f"note: {note}")


def _say(console: Console, text: str) -> None:
    console.print(fill(text, WIDTH, replace_whitespace=False), highlight=False, markup=False, soft_wrap=True)


def differing(config: Config) -> dict[str, Any]:
    """The settings that are not the defaults, as nested mappings; a plug-in keeps its kind."""
    plain, found = config.plain(), {}
    for name, field in type(config).model_fields.items():
        value, default = getattr(config, name), field.get_default(call_default_factory=True)
        if isinstance(value, PlugConfig):
            inner = {"kind": value.kind} | differing(value)
            if inner != {"kind": default}:
                found[name] = inner if len(inner) > 1 else value.kind
        elif isinstance(value, Config):
            if inner := differing(value):
                found[name] = inner
        elif isinstance(value, list) and any(isinstance(one, PlugConfig) for one in value):
            found[name] = [{"kind": one.kind} | differing(one) for one in value]
        elif default is PydanticUndefined or (
            value != default and not (name == "kind" and isinstance(config, PlugConfig))
        ):
            found[name] = plain[name]
    return found


def lines(counted: Budget) -> list[str]:
    """The totals that the table has no room for."""
    said = [
        f"training: {short(counted.training_flops)}FLOPs per token, three times the forward pass; "
        f"{short(counted.step_bytes)}B of weights and AdamW state moved per step"
    ]
    if counted.cache_bytes is None or counted.cache_bytes_full is None:
        return [*said, "no decoding and no cache: every position sees later ones"]
    each, full = short(counted.cache_bytes), short(counted.cache_bytes_full)
    return [
        *said,
        f"decoding in {counted.dtype}: {short(counted.weight_bytes)}B of weights read per token",
        f"key-value cache: {each}B per position, {full}B at {counted.context:,} positions",
    ]


def short(number: float) -> str:
    """Three digits and the unit's first letter: 1.23 M."""
    letters = ["", "k", "M", "G", "T", "P"]
    while abs(number) >= 999.5 and len(letters) > 1:
        number, letters = number / 1000, letters[1:]
    return f"{number:.3g} {letters[0]}"


def _grid(counted: Budget) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1), show_footer=True)
    grid.add_column("part", "total")
    grid.add_column("parameters", f"{counted.parameters:,}", justify="right")
    grid.add_column("active", f"{counted.active_parameters:,}", justify="right")
    grid.add_column("FLOPs per token", f"{counted.flops:,.0f}", justify="right")
    grid.add_column("share", "100.0 %", justify="right")
    for part in counted.parts:
        share = f"{100 * part.flops / counted.flops:.1f} %"
        grid.add_row(part.name, f"{part.parameters:,}", f"{part.active:,}", f"{part.flops:,.0f}", share)
    return grid
