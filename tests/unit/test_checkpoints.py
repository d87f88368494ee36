"""Checkpoints of a training run: going on to the same bits, keeping and removing, writing while training goes on."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from saving import TinyRun, assert_same, kept
from transect.errors import InputError
from transect.models import shards
from transect.train.saved import optimizer_state, restore, room_for

MUON = {"kind": "muon", "lr": 0.01, "adamw_lr": 0.003}
ADAMW = {"kind": "adamw", "lr": 0.01}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("standard", ADAMW),
        ("standard/gated", ADAMW),
        ("standard/masked", ADAMW),
        ("sparse/rand_hash", ADAMW),
        ("sparse/bias_balanced", ADAMW),
        ("sparse/bias_balanced", MUON),
    ],
    ids=lambda value: value if isinstance(value, str) else value["kind"],
)
def test_resumed_run_has_the_bits_of_an_unbroken_one(
    name: str, optimizer: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = TinyRun(name, optimizer, dtype).train(7)
    TinyRun(name, optimizer, dtype).train(3).save(kept(tmp_path))
    resumed = TinyRun(name, optimizer, dtype, seed=1)  # other weights, which must all be replaced
    progress = resumed.load(kept(tmp_path), 3)
    assert progress == {"step": 3, "tokens": 195, "seconds": 0.1 + 0.2, "loss": None}
    assert_same(resumed.train(4).state(), whole.state())


def test_loading_replaces_the_state_that_an_optimizer_had(tmp_path: Path) -> None:
    first = TinyRun(optimizer=ADAMW).train(2).save(kept(tmp_path))
    before = first.state()
    first.train(3).load(kept(tmp_path), 2)
    assert_same(first.state(), before)


def test_biases_and_tables_of_selectors_are_kept_and_move(tmp_path: Path) -> None:
    run = TinyRun("sparse/bias_balanced", ADAMW).train(3).save(kept(tmp_path))
    biases = [name for name in run.state() if name.endswith("selector.bias")]
    found = shards.forms(kept(tmp_path).folder / "step-00000003" / "state" / "model")
    assert biases and set(biases) <= set(found)
    assert all(run.state()[name].any() for name in biases)
    TinyRun("sparse/rand_hash").train(1).save(kept(tmp_path / "hash"))
    found = shards.forms(tmp_path / "hash" / "checkpoints" / "step-00000001" / "state" / "model")
    assert any("selector" in name for name in found)


def test_tied_weights_stand_once_and_nothing_is_a_pickle(tmp_path: Path) -> None:
    TinyRun().train(1).save(kept(tmp_path))
    folder = tmp_path / "checkpoints" / "step-00000001"
    with safe_open(folder / "state/model/00000-of-00001.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embeddings.tokens.weight" in names
    assert not any("lm_head" in name or "head" in name.split(".")[0] for name in names)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".py"}
    record = json.loads((folder / "checkpoint.json").read_text())
    assert set(record["files"]) == files - {"checkpoint.json"}
    assert record["step"] == 1 and record["processes"] == 1 and record["optimizers"] == ["AdamW"]


def test_newest_stay_and_those_asked_for(tmp_path: Path) -> None:
    checkpoints, run = kept(tmp_path, keep_last=2, keep_at=[1, 9]), TinyRun()
    for _ in range(5):
        run.train(1).save(checkpoints)
    assert checkpoints.steps() == [1, 4, 5]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step-0000000{n}" for n in (1, 4, 5)]


def test_going_back_keeps_what_is_written_then(tmp_path: Path) -> None:
    checkpoints, run = kept(tmp_path, keep_last=1, keep_at=[2, 5]), TinyRun()
    run.train(2).save(checkpoints).train(3).save(checkpoints)
    run.load(checkpoints, 2)
    run.train(1).save(checkpoints)
    assert checkpoints.steps() == [2, 3, 5]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path)
    TinyRun(seed=1).train(2).save(checkpoints)
    again = TinyRun(seed=2).train(2).save(checkpoints)
    loaded = TinyRun()
    loaded.load(checkpoints, 2)
    assert_same(loaded.state(), again.state())
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002"]


def test_after_removing_the_newest_the_one_before_is_it(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path)
    first = TinyRun().train(1).save(checkpoints)
    state = first.state()
    first.train(1).save(checkpoints)
    newest = checkpoints.folder / "step-00000002"
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    assert kept(tmp_path).steps() == [1]
    loaded = TinyRun(seed=3)
    loaded.load(kept(tmp_path), 1)
    assert_same(loaded.state(), state)


@pytest.mark.parametrize("name", ["standard", "sparse/bias_balanced"])
def test_written_beside_training_equals_written_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = TinyRun(name, MUON).train(3).save(kept(tmp_path / "a"))
    state = at_once.state()
    trained, write = threading.Event(), shards.write

    def late(*arguments: Any) -> Any:
        assert trained.wait(60)  # nothing reaches the disk before training has changed every weight
        return write(*arguments)

    monkeypatch.setattr(shards, "write", late)
    checkpoints = kept(tmp_path / "b")
    beside = TinyRun(name, MUON).train(3).save(checkpoints, wait=False)
    assert checkpoints.steps() == []
    beside.train(2)
    trained.set()
    checkpoints.finish()
    assert checkpoints.steps() == [3]
    assert not all(torch.equal(tensor, beside.state()[key]) for key, tensor in state.items())
    one, other = (tmp_path / run / "checkpoints" / "step-00000003" / "checkpoint.json" for run in "ab")
    assert one.read_bytes() == other.read_bytes()  # which has the checksums of all files


def test_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, write = [], shards.write

    def counted(*arguments: Any) -> Any:
        running.append("in")
        made = write(*arguments)
        running.append("out")
        return made

    monkeypatch.setattr(shards, "write", counted)
    checkpoints, run = kept(tmp_path), TinyRun()
    run.train(1).save(checkpoints, wait=False).train(1).save(checkpoints, wait=False)
    checkpoints.finish()
    assert running == ["in", "out"] * 4
    assert checkpoints.steps() == [1, 2]


def test_what_the_thread_raised_comes_with_the_next_call_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoints, run = kept(tmp_path), TinyRun()
    run.train(1).save(checkpoints)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write", full)
        run.train(1).save(checkpoints, wait=False)
        with pytest.raises(
            InputError, match=r"cannot save the checkpoint of step 2 .*No space left.*; make room and go"
        ):
            checkpoints.finish()
    checkpoints.finish()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000001"]
    run.train(1).save(checkpoints)
    assert checkpoints.steps() == [1, 3]


def test_other_runs_are_refused_in_one_line(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path)
    TinyRun("standard", ADAMW).train(1).save(checkpoints)
    cases = [
        (1, TinyRun("standard/gated", ADAMW), r"is of another model: .* is (\[|not there).*use the same recipe"),
        (1, TinyRun("standard", ADAMW, torch.float64), "is of another model: .*float32, here .*float64"),
        (1, TinyRun("standard", MUON), "was written with optimizer AdamW, this run has Orthogonal, AdamW"),
        (7, TinyRun("standard", ADAMW), "no checkpoint of step 7 in .*; there are 1"),
    ]
    for step, run, message in cases:
        before = run.state()
        with pytest.raises(InputError, match=message) as refused:
            run.load(checkpoints, step)
        assert "\n" not in str(refused.value)
        assert_same(run.state(), before)
    with pytest.raises(InputError, match=r"no checkpoint of step 7 in .*; there are none"):
        TinyRun().load(kept(tmp_path / "new"), 7)


def test_state_that_would_not_come_back_is_refused() -> None:
    model = nn.Linear(3, 2, bias=False)
    part = torch.optim.SGD(model.parameters())
    for state, message in [
        (3.0, "is a float"),
        (torch.zeros(2, 3, dtype=torch.float64), "is torch.float64; it must be torch.float32"),
    ]:
        part.state[model.weight]["kept"] = state
        with pytest.raises(TypeError, match=f"weight.kept {message}"):
            optimizer_state(model, [part])


def test_state_of_another_shape_than_its_parameter_comes_back() -> None:
    model = nn.Linear(3, 2, bias=False)
    parts = [torch.optim.SGD(model.parameters()), torch.optim.SGD([nn.Parameter(torch.zeros(1))])]
    rows = torch.tensor([5.0, 7.0])
    parts[0].state[model.weight]["rows"] = rows
    saved = optimizer_state(model, parts[:1])
    room = room_for(model, parts[:1], {name: (tuple(value.shape), value.dtype) for name, value in saved.items()})
    room["weight.rows"].copy_(rows)
    restore(model, parts[:1], room)
    assert torch.equal(parts[0].state[model.weight]["rows"], rows)
    with pytest.raises(KeyError, match="other"):
        room_for(model, parts[:1], {"other.rows": ((2,), torch.float32)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16, torch.bool, torch.uint8, torch.int64], ids=str)
def test_files_keep_every_type_and_layout(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(3 * 5 * 7) % 2 if dtype == torch.bool else torch.arange(3 * 5 * 7)
    state = {
        "turned": numbers.to(dtype).view(3, 5, 7).transpose(0, 2),
        "part": numbers.to(dtype)[11:13],
        "none": torch.empty(0, 3, dtype=dtype),
        "one": torch.tensor(1).to(dtype),
        "wide": torch.arange(5.0, dtype=torch.float64),
    }
    written = shards.write(tmp_path / "folder" / "one.safetensors", shards.pieces(state, is_main=True))
    assert written["size"] == (tmp_path / "folder" / "one.safetensors").stat().st_size
    assert shards.forms(tmp_path / "folder") == {name: (tuple(kept.shape), kept.dtype) for name, kept in state.items()}
    room = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    shards.read(tmp_path / "folder", room)
    for name, tensor in state.items():
        assert torch.equal(room[name], tensor), name
