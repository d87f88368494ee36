"""Measure this machine's back ends at typical shapes, for `choice` to choose from."""

import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from transect.errors import InputError
from transect.models.memory.backends import MIXES, READS
from transect.models.memory.backends.tables import Tables
from transect.models.memory.choice import Case, Measured, kind_of, read_table, table_text, user_path
from transect.results import write_whole

TOKENS = (1, 64, 2048)
TRAINED_FROM = 64
"""From so many tokens on forward and backward are timed, below it forward only, as in generation."""
WIDTHS = (128, 768)
SIZES = (128, 32, 8, 1)
FEW_CELLS = 32
EXPANSIONS = (2, 4, 16)
REPEATS = 5
HOPELESS = 3.0
ROOM = 1 << 31
"""Bytes that a back end may fill with intermediate results to be tried."""
LARGEST = 4e10
"""Largest product tokens x cells x width among the typical cases, so that they take minutes."""

Progress = Callable[[int, int, str], None]


def tune(
    output: Path | None = None,
    cases: Sequence[Case] | None = None,
    progress: Progress | None = None,
    repeats: int = REPEATS,
) -> Path:
    """Time every back end at every case and write the table, whole; returns its path.

    Rows that the file has of other devices and dtypes stay in it; a file that is no table is replaced.
    output: by default where models look for it (`choice.user_path`). cases: by default those of `typical_cases`.
    progress is told how many cases are done, of how many, and what came out. A back end three times slower than the
    best after one run is left out. Raises InputError when the file cannot be written. Cost: some minutes for the
    default cases; threads and other work on the machine count, so tune as you train.
    """
    asked = list(typical_cases() if cases is None else cases)
    rows = []
    for case in asked:
        rows.append(Measured(case, _seconds(case, repeats)))
        if progress is not None:
            told = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in rows[-1].seconds.items())
            progress(len(rows), len(asked), f"{case}: {told}")
    about = {
        "measured": f"least of {repeats} runs; forward and backward from {TRAINED_FROM} tokens on, below it forward",
        "machine": f"{torch.get_num_threads()} threads, {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }
    path = user_path() if output is None else output
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _merged(path, rows, about).encode())
    return path


def _merged(path: Path, rows: list[Measured], about: dict[str, Any]) -> str:
    """The new rows, and those that the file has of devices and dtypes that were not measured now, with their story."""
    kinds = dict.fromkeys(kind_of(row.case) for row in rows)
    try:
        old = [row for row in read_table(path) if kind_of(row.case) not in kinds]
        told = json.loads(path.read_text(encoding="utf-8"))
    except (InputError, OSError):
        old, told = [], {}
    stories = {_words(kind): told.get(_words(kind)) for kind in dict.fromkeys(kind_of(row.case) for row in old)}
    stories |= {_words(kind): about for kind in kinds}
    return table_text([*old, *rows], {words: story for words, story in stories.items() if story is not None})


def _words(kind: tuple[str, str]) -> str:
    return f"{kind[1]} on {kind[0]}"


def typical_cases(device: str = "cpu", dtype: str = "float32") -> Iterator[Case]:
    """Block sizes 4d to 1 with 4d active cells; block size 1 with few, too; keys and values, or only values."""
    for tokens, width, expansion in itertools.product(TOKENS, WIDTHS, EXPANSIONS):
        active = 4 * width
        total = expansion * active
        if tokens * total * width > LARGEST:
            continue
        for size in dict.fromkeys((active, width, *SIZES)):
            yield Case("mix", device, dtype, size, total // size, active // size, width, tokens)
        yield Case("mix", device, dtype, 1, total, FEW_CELLS, width, tokens)
        for cells in (FEW_CELLS, active):
            yield Case("read", device, dtype, 1, total, cells, width, tokens)


def _seconds(case: Case, repeats: int = REPEATS) -> dict[str, float]:
    """Least seconds of each back end worth trying, by name: other work on the machine only ever adds."""
    runs = _runs(case)
    first = {name: _timed(run, case) for name, run in runs.items()}
    first = {name: min(value, _timed(runs[name], case)) for name, value in first.items()}
    best = min(first.values())
    hopeful = {name: run for name, run in runs.items() if first[name] <= HOPELESS * best}
    least = {name: first[name] for name in hopeful}
    for _ in range(repeats):
        for name, run in hopeful.items():
            least[name] = min(least[name], _timed(run, case))
    return {name: float(f"{value:.3g}") for name, value in least.items()}


def _runs(case: Case) -> dict[str, Callable[[], None]]:
    """What is timed, by back end: those that differ and whose intermediate results fit."""
    source = torch.Generator(case.device).manual_seed(0)
    dtype, train = getattr(torch, case.dtype), case.tokens >= TRAINED_FROM

    def draw(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=source, device=case.device, dtype=dtype)
        return made.mul_(0.1).requires_grad_(train)

    x, values = draw(case.tokens, case.width), draw(case.blocks, case.block_size, case.width)
    scores = torch.rand(case.tokens, case.blocks, generator=source, device=case.device)
    blocks, weights = scores.topk(case.active, dim=1).indices, draw(case.tokens, case.active)
    above = draw(case.tokens, case.width).detach()
    if case.kind == "read":
        calls = {name: _call(READS[name], (blocks, weights, values), above) for name in ("reference", "gather")}
    else:
        tables = Tables(draw(*values.shape), None, values, None, None, "gelu")
        calls = {name: _call(mix, (x, blocks, weights, tables), above) for name, mix in MIXES.items()}
    fetched = 4 * case.tokens * case.active * case.block_size * case.width
    spread = 12 * case.tokens * case.blocks * case.block_size
    needs = {"gather": fetched, "reference": 4 * spread, "masked": spread}
    return {name: call for name, call in calls.items() if needs.get(name, 0) <= ROOM}


def _call(way: Callable, given: tuple, above: torch.Tensor) -> Callable[[], None]:
    flat = [part for one in given for part in (one if isinstance(one, Tables) else (one,))]
    trained = [one for one in flat if isinstance(one, torch.Tensor) and one.requires_grad]

    def run() -> None:
        made = way(*given)
        if trained:
            torch.autograd.grad(made, trained, above)

    return run


def _timed(run: Callable[[], None], case: Case) -> float:
    _wait(case)
    started = time.perf_counter()
    run()
    _wait(case)
    return time.perf_counter() - started


def _wait(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()
