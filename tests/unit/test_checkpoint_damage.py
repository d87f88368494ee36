"""Checkpoints that were not finished, or changed afterwards: never read, never mistaken for an older one."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from saving import TinyRun, assert_same, kept
from transect.errors import InputError
from transect.models import damage, shards
from transect.train.checkpoints import Checkpoints

PRELOADED = ["torch.distributed.fsdp", "transect.train.checkpoints", "transect.train.optimizers.adamw"]
"""Imported once for all processes; only installed modules, as others are not found then."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = kept(folder)
    TinyRun().train(1).save(checkpoints).train(1).save(checkpoints)
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "run")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _edit(path: Path) -> None:
    record = json.loads(path.read_text())
    record["progress"]["tokens"] += 1
    path.write_text(json.dumps(record))


def _leave_out(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["files"]["config.json"]
    path.write_text(json.dumps(record))


MODEL, OPTIMIZER = (f"state/{kind}/00000-of-00001.safetensors" for kind in ("model", "optimizer"))


@pytest.mark.parametrize(
    ("file", "harm", "said"),
    [
        (MODEL, _flip, "its content is not what was written"),
        (OPTIMIZER, _flip, "its content is not what was written"),
        ("config.json", _flip, "its content is not what was written"),
        ("tokenizer.json", _flip, "its content is not what was written"),
        (MODEL, _cut, r"it has \d+ bytes, \d+ were written"),
        (OPTIMIZER, Path.unlink, "is missing"),
        ("tokenizer.json", Path.unlink, "is missing"),
        ("checkpoint.json", Path.unlink, "is missing"),
        ("checkpoint.json", _edit, "it is not what was written"),
        ("checkpoint.json", _leave_out, "it is not what was written"),
        ("checkpoint.json", _cut, "it cannot be read"),
        ("checkpoint.json", lambda path: path.write_text("[]"), "it cannot be read"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_damage_is_named_with_the_step_to_ask_for(run: Path, file: str, harm: Callable[[Path], Any], said: str) -> None:
    harm(run / "checkpoints" / "step-00000002" / file)
    checkpoints, tried = kept(run), TinyRun(seed=5)
    before = tried.state()
    assert checkpoints.steps() == [1, 2]  # the damaged one is still the newest
    with pytest.raises(InputError, match=rf"step-00000002/{file} .*{said}; go on with --resume-from 1$") as refused:
        checkpoints.load(2, tried.model, tried.opt)
    assert "\n" not in str(refused.value)
    assert_same(tried.state(), before)
    assert tried.load(checkpoints, 1)["step"] == 1


def test_without_a_whole_one_before_it_says_so(run: Path) -> None:
    for step in (1, 2):
        _flip(run / "checkpoints" / f"step-0000000{step}" / MODEL)
    tried = TinyRun()
    with pytest.raises(InputError, match=r"step-00000002/state/model.*; no step before it is whole$"):
        tried.load(kept(run), 2)


def test_a_file_of_tensors_put_in_later_is_not_read(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000002" / "state" / "model"
    shutil.copy(folder / "00000-of-00001.safetensors", folder / "00001-of-00002.safetensors")
    with pytest.raises(InputError, match=r"00001-of-00002.safetensors is not of this checkpoint: remove it; go on"):
        TinyRun().load(kept(run), 2)


def test_another_format_is_not_called_damaged(run: Path) -> None:
    folder = run / "checkpoints" / "step-00000002"
    record = damage.read_manifest(folder)
    damage.write_manifest(folder, {**record, "format": 9})
    with pytest.raises(InputError, match=r"checkpoint.json has format 9, this version reads 1; use the one that wrote"):
        TinyRun().load(kept(run), 2)


def _apart(job: Callable[..., None], *arguments: Any) -> int:
    """Do a job in a process of its own; its exit code."""
    context = multiprocessing.get_context("forkserver")
    assert isinstance(context, ForkServerContext)
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=job, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _further(run: Path) -> tuple[Checkpoints, TinyRun]:
    """The run three steps after the two that were saved."""
    torch.set_num_threads(1)
    checkpoints, further = kept(run), TinyRun()
    further.load(checkpoints, 2)
    return checkpoints, further.train(3)


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_at_second_file(run: Path, wait: bool) -> None:
    checkpoints, further = _further(run)
    write, seen = shards.write, []

    def stop(path: Path, own: Any) -> Any:
        seen.append(path)
        if len(seen) == 2:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
            _kill()
        return write(path, own)

    shards.write = stop
    further.save(checkpoints, wait)
    checkpoints.finish()


def _killed_before_the_name(run: Path, wait: bool, step: int = 5) -> None:
    checkpoints, further = _further(run)
    further.step = step
    rename = os.replace
    os.replace = lambda source, target: (_kill if target.name == f"step-0000000{step}" else rename)(source, target)
    further.save(checkpoints, wait)
    checkpoints.finish()


def _on_full_disk(run: Path, limit: int, wait: bool, said: Path) -> None:
    checkpoints, further = _further(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        further.save(checkpoints, wait)
        checkpoints.finish()
    except InputError as error:
        said.write_text(str(error))


@pytest.mark.parametrize(
    ("job", "wait"), [(_killed_at_second_file, True), (_killed_at_second_file, False), (_killed_before_the_name, True)]
)
def test_killed_while_writing_leaves_the_one_before_as_newest(run: Path, job: Callable[..., None], wait: bool) -> None:
    assert _apart(job, run, wait) == -signal.SIGKILL
    left = run / "checkpoints" / ".step-00000005.partial"
    assert left.is_dir()
    checkpoints = kept(run)
    assert not left.exists()
    assert checkpoints.steps() == [1, 2]
    assert TinyRun().load(checkpoints, 2)["step"] == 2


def test_killed_while_replacing_leaves_the_old_one(run: Path) -> None:
    assert _apart(_killed_before_the_name, run, True, 2) == -signal.SIGKILL
    assert not (run / "checkpoints" / "step-00000002").exists()
    checkpoints, loaded = kept(run), TinyRun(seed=1)
    assert checkpoints.steps() == [1, 2]
    loaded.load(checkpoints, 2)
    assert_same(loaded.state(), TinyRun().train(2).state())


@pytest.mark.parametrize(
    ("file", "wait"), [("config.json", True), ("tokenizer.json", True), (MODEL, True), (OPTIMIZER, False)]
)
def test_full_disk_is_one_line_and_leaves_the_last_good_one(run: Path, file: str, wait: bool) -> None:
    written = run / "checkpoints" / "step-00000002"
    sizes = [(written / name).stat().st_size for name in ("config.json", "tokenizer.json", MODEL, OPTIMIZER)]
    assert sizes == sorted(sizes)  # so that this file is the first that the disk does not take
    limit = (written / file).stat().st_size - 1
    said, folder = run / "said.txt", run / "checkpoints"
    assert _apart(_on_full_disk, run, limit, wait, said) == 0
    line = said.read_text()
    assert line.startswith(f"cannot save the checkpoint of step 5 in {folder}: ")
    assert "File too large" in line and line.endswith("; make room and go on with --resume") and "\n" not in line
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert TinyRun().load(kept(run), 2)["step"] == 2
