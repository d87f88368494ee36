"""Every registered probe keeps the contract of a probe: its words, its rows, and a state that survives a stop."""

import io
import os
import signal

import pytest
import torch

import transect as tx
from plants import text, view_of
from transect import registry
from transect.data import batches
from transect.measure import _run_batch
from transect.probes.base import Probe
from transect.results import Row

NAMES = registry.available("transect.probes")
FAMILIES = ("bert", "gpt2", "gptj", "olmo2", "mixtral")
PARTS = ("Range and unit", "Reads", "Source", "Raises", "Cost")
METRICS = {
    "jump": "displacement jump_rate angular_distance block_influence update_ratio stream_norm",
    "nonlinearity": "r2_heldout r2_insample r2_floor linearity cosine_closed_form linearity_normalized cone_size "
    "constant_baseline rank effective_rank participation_ratio ridge",
    "similarity": "cka effective_rank participation_ratio anisotropy",
    "contribution": "mutual_information token_prediction lens_loss share_mha share_ffn",
    "commutativity": "loss loss_change kl agreement accuracy",
    "ablation": "loss loss_change kl agreement accuracy",
    "routing": "load entropy dead_fraction drop_fraction co_selection type_preference influence removal_cost",
}
OPTIONS: dict[str, list[dict]] = {
    "nonlinearity": [
        {},
        {"trained": "cosine_adam", "train_epochs": 2, "cosine": ("ffn", "attn", "activation"), "project": 17},
        {"ridge": 0.0, "cosine_weights": "none", "tokens": "all"},
    ],
    "similarity": [{}, {"sample": 31, "errors": True}],
    "jump": [{}, {"average": "zeta_then_mean", "positions": ("last_only",), "windows": False}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS.get(name, [{}])]
IDS = [f"{name}-{number}" for name in NAMES for number in range(len(OPTIONS.get(name, [{}])))]


def probe_of(name: str, options: dict | None = None) -> Probe:
    return registry.load("transect.probes", name, Probe)(**(options or {}))


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name: str):
    probe = probe_of(name)
    assert probe.name == name
    assert probe.title and probe.source and "arXiv" in probe.source
    assert type(probe) is getattr(tx.probes, type(probe).__name__)
    doc = type(probe).__doc__ or ""
    assert [part for part in PARTS if f"{part}:" not in doc] == []
    assert doc.splitlines()[0].endswith(".")
    assert name in METRICS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_rows_of_this_probe(name: str, family: str):
    view, data = view_of(family, torch.float32), text(47)
    first, second = (tx.measure(view, [name], data, batch_size=7) for _ in range(2))
    assert first.rows == second.rows
    assert len(first) > 0
    for row in first:
        assert row.metric in METRICS[name].split()
        assert row.probe == name and row.model == view.name and row.dtype == "float32" and row.tokens == data.num_tokens
        assert row.unit and row.layer is not None and 0 <= row.layer <= view.num_layers
        assert row.layer_to is None or row.layer <= row.layer_to <= view.num_layers
        if row.value is None:
            assert row.reason
        else:
            assert row.n is not None and row.n > 0 and row.documents > 0
        if row.stderr is not None:
            assert row.stderr >= 0 and row.low <= row.high
    keys = [(r.metric, r.layer, r.layer_to, r.site, r.element, r.variant, r.split) for r in first]
    assert len(set(keys)) == len(keys)  # no two rows stand for the same thing
    assert any(row.value is not None for row in first)


def stopped_everywhere(plan, stop: bool) -> list[Row]:
    """The rows of the first pass; with `stop` the state goes through a file between any two batches and phases."""
    item = plan.passes[0]
    (probe,), (setting,) = item.probes, item.settings
    state = probe.start(setting, None)

    def through_a_file(state):
        if not stop:
            return state
        file = io.BytesIO()
        torch.save(state.pack(), file)
        file.seek(0)
        return probe.start(setting, torch.load(file, weights_only=True))

    for stage in item.stages:
        for batch in batches(plan.data, stage.sequences, stage.batch_size, 0, item.full_width):
            state = through_a_file(state)
            _run_batch(plan.view, item, stage, [state], batch)
            state = through_a_file(state)
        probe.turn(state, setting, stage.phase)
        state = through_a_file(state)
    return list(probe.rows(state, setting))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_stop_between_any_two_batches_changes_no_bit(name: str, options: dict, family: str):
    plan = tx.plan(view_of(family, torch.float32), [probe_of(name, options)], text(47), batch_size=11)
    whole, parted = stopped_everywhere(plan, False), stopped_everywhere(plan, True)
    assert whole == parted
    assert any(row.value is not None for row in whole)


@pytest.mark.parametrize("after", [1, 5, 8])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_rows(after: int, tmp_path):
    view, data = view_of("gpt2"), text(47)
    whole = tx.measure(view, list(NAMES), data, batch_size=11)
    calls = []

    def stop(tokens: int, phase: str) -> None:
        calls.append(phase)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tx.measure(view, list(NAMES), data, batch_size=11, output=str(tmp_path / "run"), progress=stop)
    assert len(calls) == after and (tmp_path / "run" / "state.pt").is_file()
    resumed = tx.measure(view, list(NAMES), data, batch_size=11, output=str(tmp_path / "run"), resume=True)
    assert resumed.rows == whole.rows
    assert tx.Table.read(tmp_path / "run").rows == whole.rows
    assert not (tmp_path / "run" / "state.pt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_memory_asked_for_covers_the_state(name: str):
    plan = tx.plan(view_of("gpt2"), [name], text(47))
    item = plan.passes[0]
    state = item.probes[0].start(item.settings[0], None)
    for stage in item.stages:
        for batch in batches(plan.data, stage.sequences, stage.batch_size, 0, item.full_width):
            _run_batch(plan.view, item, stage, [state], batch)
        item.probes[0].turn(state, item.settings[0], stage.phase)
    file = io.BytesIO()
    torch.save(state.pack(), file)
    tensors: list[torch.Tensor] = []

    def collect(value) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)

    collect(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert 0 < sum(tensor.nbytes for tensor in tensors) <= item.bytes
