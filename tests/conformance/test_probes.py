"""Every registered probe keeps the contract of a probe: its words, its rows, and a state that survives a stop."""

import io
import os
import signal
from dataclasses import asdict, fields

import pytest
import torch

import transect as tx
from plants import text, view_of
from stops import packed_bytes, rows_of, states_of
from transect import registry
from transect.errors import InputError
from transect.probes.base import Probe

NAMES = registry.available("transect.probes")
FAMILIES = ("bert", "gpt2", "gptj", "olmo2", "mixtral")
PARTS = ("Range and unit", "Reads", "Source", "Raises", "Cost")
METRICS = {
    "jump": "displacement jump_rate angular_distance block_influence update_ratio stream_norm",
    "nonlinearity": "r2_heldout r2_insample r2_floor linearity cosine_closed_form linearity_normalized cone_size "
    "constant_baseline rank effective_rank participation_ratio ridge",
    "similarity": "cka effective_rank participation_ratio anisotropy",
    "contribution": "mutual_information token_prediction lens_loss share_mha share_ffn",
    "commutativity": "loss loss_change kl agreement state_change layer_evaluations",
    "ablation": "loss loss_change kl agreement state_change layer_evaluations",
    "routing": "load entropy dead_fraction drop_fraction co_selection type_preference influence r2_heldout "
    "removal_cost layer_evaluations",
}
MASK_ID = 3  # of the masked models here, which come without a tokenizer
SPARSE = ("routing",)  # probes of sparse models only
OPTIONS: dict[str, list[dict]] = {
    "nonlinearity": [
        {},
        {"trained": "cosine_adam", "train_epochs": 2, "cosine": ("ffn", "attn", "activation"), "project": 17},
        {"ridge": 0.0, "cosine_weights": "none", "tokens": "all"},
    ],
    "similarity": [{}, {"sample": 31, "errors": True}],
    "jump": [{}, {"average": "zeta_then_mean", "positions": ("last_only",), "windows": False}],
    "commutativity": [{}, {"kinds": ("mirrored", "adjacent"), "objective": "masked", "sample": 301}],
    "ablation": [
        {},
        {"methods": ("zero", "noise", "mean"), "parts": ("head", "ffn_up", "attn_heads"), "residual_weights": (0.5,)},
        {"methods": ("linear", "cosine_adam", "mse_adam", "relu_control", "two_linear"), "train_epochs": 2},
    ],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS.get(name, [{}])]
IDS = [f"{name}-{number}" for name in NAMES for number in range(len(OPTIONS.get(name, [{}])))]


def probe_of(name: str, options: dict | None = None) -> Probe:
    kind = registry.load("transect.probes", name, Probe)
    known = {field.name for field in fields(kind)}
    return kind(**({"mask_id": MASK_ID} if "mask_id" in known else {}) | (options or {}))


OF_THE_MODEL = ("share_mha", "share_ffn")  # no layer's number


def suited(name: str, family: str) -> str:
    """The family itself, or a sparse one for a probe that takes no others."""
    return "mixtral" if name in SPARSE else family


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
    view, data, probe = view_of(family, torch.float32), text(47), probe_of(name)
    if (reason := probe.refusal(view)) is not None:
        assert name in SPARSE and family != "mixtral"
        with pytest.raises(InputError, match=f"^{name}: {reason}$"):
            tx.measure(view, [probe], data)
        assert "\n" not in reason
        return
    first, second = (tx.measure(view, [probe], data, batch_size=7) for _ in range(2))
    assert first.rows == second.rows
    assert len(first) > 0
    for row in first:
        assert row.metric in METRICS[name].split()
        assert row.probe == name and row.model == view.name and row.dtype == "float32" and row.tokens == data.num_tokens
        assert row.unit
        if row.metric in OF_THE_MODEL:
            assert row.layer is None and row.layer_to is None
        else:
            assert row.layer is not None and 0 <= row.layer <= view.num_layers
            assert row.layer_to is None or row.layer <= row.layer_to <= view.num_layers
        if row.value is None:
            assert row.reason
        else:
            assert row.n is not None and row.n > 0 and row.documents > 0
        if row.stderr is not None:
            assert row.stderr >= 0 and row.low <= row.high
        assert all(type(value) in (int, float, str, type(None)) for value in asdict(row).values())  # a file takes them
    keys = [(r.metric, r.layer, r.layer_to, r.site, r.element, r.part, r.edit, r.variant, r.split) for r in first]
    assert len(set(keys)) == len(keys)  # no two rows stand for the same thing
    assert any(row.value is not None for row in first)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_stop_between_any_two_batches_changes_no_bit(name: str, options: dict, family: str):
    view = view_of(suited(name, family), torch.float32)
    plan = tx.plan(view, [probe_of(name, options)], text(47), batch_size=11)
    whole, parted = rows_of(plan, stop=False), rows_of(plan, stop=True)
    assert whole == parted
    assert any(row.value is not None for row in whole)


FEW_EDITS = {
    "ablation": {"methods": ("zero", "mean"), "schedules": ("single",), "sample": 157},
    "commutativity": {"kinds": ("pairs",), "sample": 157},
    "routing": {"removal_sample": 157},
}


class _Stop:
    """Interrupts at the nth call that tells of progress, and remembers what was being done."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.calls: list[str] = []

    def __call__(self, tokens: int, phase: str) -> None:
        self.calls.append(phase)
        if len(self.calls) == self.after:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("share", [0.2, 0.55, 0.97])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_rows(share: float, tmp_path):
    """Between any two batches, and between two edited models of one batch."""
    view, data = view_of("mixtral", torch.float32), text(37)
    probes = [probe_of(name, FEW_EDITS.get(name)) for name in NAMES]
    counted = _Stop(-1)
    whole = tx.measure(view, probes, data, batch_size=11, progress=counted)
    assert {"fit", "tune", "score", "edit"} <= set(counted.calls)
    stop = _Stop(1 + int(share * (len(counted.calls) - 1)))
    output = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tx.measure(view, probes, data, batch_size=11, output=str(output), progress=stop)
    assert len(stop.calls) == stop.after and (output / "state.pt").is_file()
    resumed = tx.measure(view, probes, data, batch_size=11, output=str(output), resume=True)
    assert resumed.rows == whole.rows
    assert tx.Table.read(output).rows == whole.rows
    assert not (output / "state.pt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_memory_asked_for_covers_the_state(name: str):
    plan = tx.plan(view_of(suited(name, "gpt2")), [probe_of(name)], text(47))
    item = plan.passes[0]
    *_, state = states_of(plan, item)
    file = io.BytesIO()
    torch.save(state.pack(), file)
    file.seek(0)
    assert 0 < packed_bytes(torch.load(file, weights_only=True)) <= item.bytes
