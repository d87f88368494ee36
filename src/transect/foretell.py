"""How long a plan will take: its operations at the speed that this machine shows on one batch."""

import time
from collections.abc import Callable

import torch

from transect.data import batches
from transect.interventions import outcomes
from transect.plan import Pass, Plan
from transect.view.variants import Variant

_ROWS, _COLUMNS = 1024, 2000


def foretold_seconds(plan: Plan) -> float:
    """Seconds the plan will take, from the time of one batch and one matrix product; meant to be right within 2.

    Runs the model on one batch of each pass. Cost: a few forward passes.
    """
    return sum(_pass_seconds(plan, item) for item in plan.passes)


def readable_time(seconds: float) -> str:
    """Seconds, minutes or hours for people."""
    for size, word in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {word}"
    return f"{seconds:.0f} seconds"


def _pass_seconds(plan: Plan, item: Pass) -> float:
    view = plan.view
    batch = next(batches(item.data, item.stages[0].sequences, plan.batch_size, 0, item.full_width))
    tokens = int(batch.mask.sum())
    with torch.no_grad():
        forward = _timed(lambda: view.run(batch.ids, batch.mask))
    seconds = sum(
        forward * int(item.data.lengths[stage.sequences].sum()) / tokens
        for stage in item.stages
        if stage.phase != "edit"
    )
    speed = _speed(view.width, view.device)
    for probe, setting in zip(item.probes, item.settings, strict=True):
        seconds += probe.work(setting) / speed
        if len(setting.edit_sequences):
            units = torch.from_numpy(setting.unit_of)[batch.sequence]
            intact = Variant(tuple(range(view.num_layers)))
            alone, twice = (
                _timed(lambda given=given, units=units: list(outcomes(view, batch, units, given, _unheard)))
                for given in ((), (intact,))
            )
            heads = max(alone - forward, 0.0) + item.edits * max(twice - alone, 0.0)
            own = item.layers_run() * forward / view.num_layers + heads
            seconds += own * int(item.data.lengths[setting.edit_sequences].sum()) / tokens
    return seconds


def _unheard(layers: int) -> None:
    """Nobody follows a batch that is only timed."""


def _speed(width: int, device: torch.device) -> float:
    """Floating-point operations a second of a float32 product in the shapes of measuring."""
    left, right = torch.ones(_ROWS, width, device=device), torch.ones(width, _COLUMNS, device=device)
    return 2.0 * _ROWS * width * _COLUMNS / _timed(lambda: left @ right)


def _timed(run: Callable[[], object]) -> float:
    """Seconds of the faster of two calls."""
    found = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found)
