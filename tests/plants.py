"""Small models and texts whose measurements are known, and plain recomputation to compare with."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import FIRST_TEXT_ID, VOCAB, Family, enliven, tiny_model
from transect.data import Dataset, from_tokens
from transect.results import Row, Table
from transect.view import edits
from transect.view.view import View


@functools.cache
def view_of(name: str, dtype: torch.dtype = torch.float64, layers: int = 2, seed: int = 0) -> View:
    """A tiny model; edit it only inside `with`."""
    return View(tiny_model(name, dtype, seed, layers))


def built(family: Family, layers: int, dtype: torch.dtype = torch.float64) -> View:
    """A tiny decoder of another size than `families.py` has."""
    model = AutoModelForCausalLM.from_config(family(layers), dtype=dtype, attn_implementation="eager")
    enliven(model, 0)
    return View(model.eval())


def text(documents: int = 61, low: int = 7, high: int = 29, seq_len: int = 13, seed: int = 0) -> Dataset:
    """Random documents of random lengths, cut into sequences."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(FIRST_TEXT_ID, VOCAB, size).tolist() for size in rng.integers(low, high, documents)]
    return from_tokens(rows, seq_len=seq_len)


@contextmanager
def planted(view: View, functions: Mapping[tuple[str, int], Callable[[Tensor], Tensor]]) -> Iterator[View]:
    """The view with elements replaced by functions: {(element, layer): function}."""
    with ExitStack() as stack:
        for (element, layer), function in functions.items():
            stack.enter_context(edits.replace(view, element, layer, function))
        yield view


def noise(seed: int, width: int) -> Callable[[Tensor], Tensor]:
    """An element whose output has nothing to do with its input."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn((*x.shape[:2], width), generator=generator, dtype=x.dtype)


def turn(angle: float, width: int) -> Tensor:
    """A rotation that turns every vector of an even width by one angle."""
    turned = torch.eye(width, dtype=torch.float64) * np.cos(angle)
    for at in range(0, width, 2):
        turned[at, at + 1], turned[at + 1, at] = np.sin(angle), -np.sin(angle)
    return turned


def only(table: Table, **equal: object) -> Row:
    """The one row with these columns."""
    found = table.where(**equal).rows
    assert len(found) == 1, f"{len(found)} rows with {equal}"
    return found[0]


def value(table: Table, **equal: object) -> float:
    row = only(table, **equal)
    assert row.value is not None, row.reason
    return row.value


def values(table: Table) -> list[tuple]:
    """Everything of the rows but the provenance that differs from setting to setting."""
    return [
        (r.metric, r.layer, r.layer_to, r.element, r.split, r.value, r.reason, r.stderr, r.low, r.high, r.n)
        for r in table
    ]


def seen(view: View, data: Dataset, layer: int) -> list[dict[str, np.ndarray]]:
    """Every site of a layer, a sequence at a time in the dataset's order: [{site: [positions, width]}]."""
    found = []
    for start, length in zip(data.starts, data.lengths, strict=True):
        ids = torch.from_numpy(data.ids[start : start + length].astype(np.int64))[None]
        with torch.no_grad(), view.capture(list(view.maps[layer].taps), [layer]) as capture:
            view.run(ids)
        found.append({site: capture[site, at][0].numpy() for site, at in list(capture.keys())})
    return found
