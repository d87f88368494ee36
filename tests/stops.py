"""A plan carried out batch by batch as the driver does it, so that it can be stopped and looked at anywhere."""

import io
from collections.abc import Iterator
from typing import Any

import torch

from transect.data import batches
from transect.measure import _edit_batch, _run_batch
from transect.plan import Pass, Plan
from transect.results import Row


def states_of(plan: Plan, item: Pass, stop: bool = False) -> Iterator[Any]:
    """The state of a pass's one probe after every batch and at the end.

    With `stop` the state goes through a file before and after every batch and every phase.
    """
    (probe,), (setting,) = item.probes, item.settings

    def carried_on(state: Any) -> Any:
        if not stop:
            return state
        file = io.BytesIO()
        torch.save(state.pack(), file)
        file.seek(0)
        return probe.start(setting, torch.load(file, weights_only=True))

    state = probe.start(setting, None)
    for stage in item.stages:
        for batch in batches(item.data, stage.sequences, stage.batch_size, 0, item.full_width):
            state = carried_on(state)
            if stage.phase == "edit":
                _edit_batch(plan.view, item, state, batch, lambda layers: None)
            else:
                _run_batch(plan.view, item, stage, [state], batch)
            state = carried_on(state)
            yield state
        probe.turn(state, setting, stage.phase)
        state = carried_on(state)
    yield state


def rows_of(plan: Plan, stop: bool = False) -> list[Row]:
    """The rows of every pass, without provenance."""
    rows: list[Row] = []
    for item in plan.passes:
        (probe,), (setting,) = item.probes, item.settings
        *_, state = states_of(plan, item, stop)
        rows += probe.rows(state, setting)
    return rows


def packed_bytes(packed: object) -> int:
    """Bytes of all tensors of a packed state."""
    if isinstance(packed, torch.Tensor):
        return packed.nbytes
    inner = packed.values() if isinstance(packed, dict) else packed if isinstance(packed, list | tuple) else ()
    return sum(map(packed_bytes, inner))
