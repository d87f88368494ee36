"""The one driver of every probe: each batch goes through the model once, and every probe sees it layer by layer."""

import importlib.metadata
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from transect import memory, runs
from transect.data import Batch, Dataset, batches
from transect.errors import InputError
from transect.interventions import outcomes
from transect.plan import Pass, Plan, Stage, make
from transect.probes.base import Probe, Setting, Sight
from transect.results import Row, Table
from transect.stopping import stoppable
from transect.view.capture import Seen, stream
from transect.view.checkpoints import step_of
from transect.view.view import View

SAVE_SECONDS = 60.0
Progress = Callable[[int, str], None]
"""Called with the tokens done since the last call and what is being done."""


def measure(
    view: View,
    probes: Iterable[str | Probe],
    data: Dataset,
    *,
    batch_size: int = 8,
    seed: int = 0,
    output: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Table:
    """Measure a model on a text with the named probes and return the rows.

    All probes share one forward pass per batch. Rows do not depend on batch size, padding or the order of documents.
    With `output` a run folder is written, and a run that was stopped goes on with `resume`. Raises InputError for
    whatever the user can mend. Memory does not grow with the text.
    """
    return run(make(view, probes, data, batch_size, seed), output, resume, progress)


def run(plan: Plan, output: str | None = None, resume: bool = False, progress: Progress | None = None) -> Table:
    """Carry out a plan."""
    folder = None if output is None else runs.RunFolder.open(output, config_of(plan), resume)
    if folder is not None and folder.finished():
        return Table.read(folder.path)
    try:
        return _carry_out(plan, folder, progress)
    except InputError:
        if folder is not None:
            folder.withdraw()
        raise


def _carry_out(plan: Plan, folder: runs.RunFolder | None, progress: Progress | None) -> Table:
    started = time.monotonic()
    saved = None if folder is None else folder.load_state()
    if saved is not None:
        plan = _as_before(plan, saved["free"])
    keeper = _Keeper(plan, folder, saved)
    with stoppable() as stopped:
        for number in range(keeper.number, len(plan.passes)):
            keeper.number = number
            _run_pass(plan, plan.passes[number], keeper, progress, stopped)
    table = Table(keeper.rows)
    if folder is not None:
        seconds = keeper.seconds + time.monotonic() - started
        folder.finish(table, runs.environment(plan.view.device, notes_of(plan), seconds))
    return table


def _as_before(plan: Plan, free: int) -> Plan:
    """The plan with the passes of the run that was stopped: they follow from the memory that was free then."""
    before = make(plan.view, plan.probes, plan.data, plan.batch_size, plan.seed, free)
    if before.bytes > plan.free:
        need, now = memory.readable(before.bytes), memory.readable(plan.free)
        raise InputError(f"not enough memory to go on: the stopped run held {need} of sums, {now} are free now")
    return before


class _Keeper:
    """Where the run stands: pass, stage, batch and states; saves them every minute between two batches."""

    def __init__(self, plan: Plan, folder: runs.RunFolder | None, saved: dict | None) -> None:
        self.plan, self.folder = plan, folder
        self.number = saved["pass"] if saved else 0
        self.stage = saved["stage"] if saved else 0
        self.batch = saved["batch"] if saved else 0
        self.seconds = saved["seconds"] if saved else 0.0
        self.rows = [Row(**row) for row in saved["rows"]] if saved else []
        self.packed = saved["states"] if saved else None
        self._started = self._last = time.monotonic()

    def states(self, item: Pass) -> list[Any]:
        """Fresh states for a pass, or those the file held."""
        packed, self.packed = self.packed, None
        return [
            probe.start(setting, None if packed is None else packed[index])
            for index, (probe, setting) in enumerate(zip(item.probes, item.settings, strict=True))
        ]

    def between(self, states: list[Any], stopped: Callable[[], bool]) -> None:
        """Save when a minute has passed or the run is being stopped; raises KeyboardInterrupt in the latter case."""
        if self.folder is not None and (stopped() or time.monotonic() - self._last >= SAVE_SECONDS):
            self.save(states)
        if stopped():
            raise KeyboardInterrupt

    def done(self, states: list[Any]) -> None:
        """Save behind a training, which is long."""
        self.batch += 1
        if self.folder is not None:
            self.save(states)

    def save(self, states: list[Any]) -> None:
        """Write everything needed to go on."""
        assert self.folder is not None
        self.folder.save_state(
            {
                "free": self.plan.free,
                "pass": self.number,
                "stage": self.stage,
                "batch": self.batch,
                "seconds": self.seconds + time.monotonic() - self._started,
                "rows": [asdict(row) for row in self.rows],
                "states": [state.pack() for state in states],
            }
        )
        self._last = time.monotonic()

    def finish_pass(self, rows: list[Row]) -> None:
        """Keep the rows of a pass and stand at the start of the next."""
        self.rows += rows
        self.stage = self.batch = 0
        if self.folder is not None:
            self.folder.write_rows(self.rows)


def _run_pass(plan: Plan, item: Pass, keeper: _Keeper, progress: Progress | None, stopped: Callable[[], bool]) -> None:
    states = keeper.states(item)
    for index in range(keeper.stage, len(item.stages)):
        stage = item.stages[index]
        done = keeper.batch
        sequences = stage.sequences[done * stage.batch_size :]
        for batch in batches(item.data, sequences, stage.batch_size, plan.view.pad_id, item.full_width):
            if stage.phase == "edit":
                _edit_batch(plan.view, item, states[0], batch, _ticker(plan, batch, progress, keeper, states, stopped))
            else:
                _run_batch(plan.view, item, stage, states, batch)
                if progress is not None:
                    progress(int(batch.mask.sum()), stage.phase)
            keeper.batch += 1
            keeper.between(states, stopped)
        for probe, setting, state in zip(item.probes, item.settings, states, strict=True):
            if item.watches(probe, stage):
                probe.turn(state, setting, stage.phase)
        keeper.stage, keeper.batch = index + 1, 0
    _train_edited(item, keeper, states, progress, stopped)
    rows = []
    for probe, setting, state in zip(item.probes, item.settings, states, strict=True):
        rows += stamped(probe.rows(state, setting), plan, probe)
    keeper.finish_pass(rows)


def _run_batch(view: View, item: Pass, stage: Stage, states: list[Any], batch: Batch) -> None:
    """One forward pass, with every probe looking on."""
    device = view.device
    unit_of = torch.from_numpy(item.settings[0].unit_of)
    watchers: list[tuple[Probe, Setting, Any, Sight]] = []
    for probe, setting, state in zip(item.probes, item.settings, states, strict=True):
        if not item.watches(probe, stage):
            continue
        sight = Sight(
            stage.phase,
            batch.ids.to(device),
            batch.mask.to(device),
            batch.special.to(device),
            batch.sequence.to(device),
            unit_of[batch.sequence].to(device),
            batch.token,
            None if batch.target is None else batch.target.to(device),
        )
        watchers.append((probe, setting, state, sight))
    wanted: dict[int, tuple[str, ...]] = {}
    for layer in range(view.num_layers):
        sites = [
            site for probe, setting, _, _ in watchers if layer in setting.layers for site in probe.sites(view, layer)
        ]
        if sites:
            wanted[layer] = tuple(dict.fromkeys(sites))

    def consume(layer: int, seen: Seen) -> None:
        for probe, setting, state, sight in watchers:
            if layer in setting.layers:
                probe.see(state, setting, layer, seen, sight)

    with torch.no_grad(), stream(view, wanted, consume):
        hidden = view.run(batch.ids, batch.mask)
    _refuse_nan(view, hidden, batch)
    for probe, setting, state, sight in watchers:
        probe.end(state, setting, sight)


def _ticker(
    plan: Plan,
    batch: Batch,
    progress: Progress | None,
    keeper: _Keeper,
    states: list[Any],
    stopped: Callable[[], bool],
) -> Callable[[int], None]:
    """Tells of layers run as the tokens that would take as long, and stops a batch whose variants take minutes."""
    tokens = int(batch.mask.sum())
    owed = 0.0

    def tick(layers: int) -> None:
        nonlocal owed
        owed += tokens * layers / plan.view.num_layers
        if progress is not None:
            progress(int(owed), "edit")
            owed -= int(owed)
        if stopped():
            keeper.between(states, stopped)

    return tick


def _edit_batch(view: View, item: Pass, state: Any, batch: Batch, tick: Callable[[int], None]) -> None:
    """Run the variants of the pass's one probe on a batch; it sees them when all are done, or none."""
    (probe,), (setting,) = item.probes, item.settings
    units = torch.from_numpy(setting.unit_of)[batch.sequence]
    found = list(outcomes(view, batch, units, probe.variants(state, setting), tick))
    for number, outcome in found:
        if number is None and not bool(torch.isfinite(outcome.displacement).all()):
            raise InputError(_not_finite(view))
        probe.see_edit(state, setting, number, outcome)


def _train_edited(
    item: Pass, keeper: _Keeper, states: list[Any], progress: Progress | None, stopped: Callable[[], bool]
) -> None:
    """Each training of the pass's one probe that is not done yet; a stop loses the one it comes in."""

    def tick(tokens: int) -> None:
        if progress is not None:
            progress(tokens, "train")
        if stopped():
            keeper.between(states, stopped)

    for number in range(keeper.batch, len(item.trainings)):
        (probe,), (setting,) = item.probes, item.settings
        probe.train(states[0], setting, number, tick)
        keeper.done(states)


def _refuse_nan(view: View, hidden: Tensor, batch: Batch) -> None:
    if not bool(torch.isfinite(hidden[batch.mask.to(hidden.device)]).all()):
        raise InputError(_not_finite(view))


def _not_finite(view: View) -> str:
    dtype = str(view.dtype).removeprefix("torch.")
    return f"{view.name} gives NaN or infinity on this text in {dtype}; check the weights or use float32"


def stamped(rows: Iterable[Row], plan: Plan, probe: Probe) -> list[Row]:
    """The rows with their provenance."""
    view, data = plan.view, plan.data
    provenance = {
        "model": view.name,
        "revision": view.revision,
        "step": step_of(view.revision),
        "tokens": data.num_tokens,
        "probe": probe.name,
        "dtype": str(view.dtype).removeprefix("torch."),
        "seed": plan.seed,
        "data": f"{data.name} [{data.fingerprint}]",
        "config": runs.fingerprint({"probe": probe.name, **asdict(probe)}),
        "code": _code(),
    }
    documents = data.num_documents
    return [replace(r, **provenance, documents=documents if r.documents is None else r.documents) for r in rows]


def config_of(plan: Plan) -> dict:
    """The settings of a run, as its folder keeps them."""
    data = plan.data
    return {
        "model": plan.view.name,
        "revision": plan.view.revision,
        "dtype": str(plan.view.dtype).removeprefix("torch."),
        "layers": plan.view.num_layers,
        "text": data.name,
        "text_fingerprint": data.fingerprint,
        "tokens": data.num_tokens,
        "documents": data.num_documents,
        "seq_len": data.seq_len,
        "batch_size": plan.batch_size,
        "seed": plan.seed,
        "probes": [
            {"probe": probe.name} | {name: _plain(value) for name, value in asdict(probe).items()}
            for probe in plan.probes
        ],
        "notes": notes_of(plan),
        "code": _code(),
    }


def notes_of(plan: Plan) -> list[str]:
    """What a reader of the numbers must know."""
    notes = list(plan.view.notes)
    if plan.data.builtin:
        notes.append(f"measured on the small built-in text ({plan.data.name}); give --text for your own")
    return notes


def _code() -> str:
    return f"transect {importlib.metadata.version('transect')}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


__all__ = ["Dataset", "measure", "run"]
