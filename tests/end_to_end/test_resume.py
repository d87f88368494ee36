"""A run that is killed, stopped or interrupted goes on with --resume and ends with the same bytes."""

import importlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from plants import text, view_of
from shell import ENVIRONMENT, command, contents, saved_model, saved_tokens
from transect.errors import InputError
from transect.measure import run
from transect.plan import SHARE, Plan, make
from transect.probes.ablation import Ablation
from transect.probes.base import Probe
from transect.probes.commutativity import Commutativity
from transect.probes.jump import Jump
from transect.probes.nonlinearity import Nonlinearity
from transect.probes.similarity import Similarity
from transect.results import Table

DRIVER = """
import importlib
importlib.import_module("transect.measure").SAVE_SECONDS = 0.0  # `transect.measure` itself is the function
from transect.cli import main
main()
"""
"""`python -m transect` that saves its state after every batch."""
ROWS = ("rows.jsonl", "rows.parquet")
FINISHED = {"config.json", "environment.json", *ROWS}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a measurement that takes a few seconds."""
    folder = tmp_path_factory.mktemp("inputs")
    tokens = saved_tokens(folder / "tokens.npy", documents=509)
    return [str(saved_model(folder / "model")), "--tokens", str(tokens), "--seq-len", "23", "--batch-size", "3"]


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same measurement, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("measure", *inputs, "--output", folder).code == 0
    return folder


def _start(inputs: list[str], output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "measure", *inputs, "--output", str(output), "--resume"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(file: Path, running: subprocess.Popen, newer_than: int = 0) -> None:
    """Until the file is there and newer than a time in nanoseconds."""
    for _ in range(6000):
        if file.is_file() and file.stat().st_mtime_ns > newer_than:
            return
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)
    pytest.fail(f"{file} does not come")


def _place(output: Path) -> tuple[int, int, int]:
    state = torch.load(output / "state.pt", weights_only=True)
    return state["pass"], state["stage"], state["batch"]


def _assert_no_half_files(output: Path) -> None:
    if (output / "rows.jsonl").is_file():
        assert all(json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines())
    if (output / "rows.parquet").is_file():
        assert len(Table.read(output / "rows.parquet"))


def _assert_same(output: Path, whole: Path) -> None:
    assert contents(output) == FINISHED
    for name in ROWS:
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(inputs: list[str], whole: Path, tmp_path: Path):
    output, chance, places = tmp_path / "run", random.Random(7), []
    for delay in (0.0, chance.uniform(0.05, 0.4), chance.uniform(0.05, 0.4)):
        running = _start(inputs, output)
        state = output / "state.pt"
        _wait_for(state, running, state.stat().st_mtime_ns if state.is_file() else 0)
        time.sleep(delay)
        running.kill()
        running.communicate()
        assert running.returncode == -signal.SIGKILL
        _assert_no_half_files(output)
        places.append(_place(output))
    assert places[0] < places[1] < places[2]  # every start went on from where the last one was killed
    assert command("measure", *inputs, "--output", output, "--resume").code == 0
    _assert_same(output, whole)


def test_ctrl_c_saves_the_state_says_so_in_one_line_and_the_run_goes_on(inputs: list[str], whole: Path, tmp_path: Path):
    output = tmp_path / "run"
    running = _start(inputs, output)
    _wait_for(output / "state.pt", running)
    time.sleep(0.2)
    before = _place(output)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.startswith("transect: ") and err.count("\n") == 1 and "--resume" in err
    assert contents(output) == {"config.json", "state.pt"}
    assert _place(output) >= before
    assert command("measure", *inputs, "--output", output, "--resume").code == 0
    _assert_same(output, whole)


def test_ctrl_c_saves_the_state_even_when_a_minute_has_not_passed(tmp_path: Path):
    plan = make(view_of("gpt2"), ["jump"], text(), 3)

    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:  # a second one would stop the run at once
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(plan, str(tmp_path / "run"), progress=interrupt)
    assert len(calls) == 1 and _place(tmp_path / "run") == (0, 0, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_a_finished_run_keeps_its_rows(inputs: list[str], whole: Path):
    before = {name: ((whole / name).read_bytes(), (whole / name).stat().st_mtime_ns) for name in contents(whole)}
    again = command("measure", *inputs, "--output", whole, "--resume")
    assert again.code == 0 and "jump" in again.out
    after = {name: ((whole / name).read_bytes(), (whole / name).stat().st_mtime_ns) for name in contents(whole)}
    assert after == before


@pytest.mark.parametrize(
    "other",
    [
        ["--seed", "1"],
        ["--batch-size", "4"],
        ["--probe", "jump"],
        ["--set", "jump.windows=false"],
        ["--probe", "similarity", "--probe", "nonlinearity", "--probe", "jump"],  # a state has them in another order
    ],
)
def test_other_settings_are_refused(other: list[str], inputs: list[str], whole: Path):
    before = {name: (whole / name).read_bytes() for name in contents(whole)}
    refused = command("measure", *inputs, *other, "--output", whole, "--resume")
    assert refused.code == 2 and "same settings" in refused.err and refused.err.count("\n") == 1
    assert {name: (whole / name).read_bytes() for name in contents(whole)} == before


@pytest.mark.parametrize("name", ["state.pt", "config.json"])
def test_a_damaged_file_is_refused_in_one_line(name: str, inputs: list[str], whole: Path, tmp_path: Path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.json").write_bytes((whole / "config.json").read_bytes())
    torch.save({"pass": 0, "stage": 0, "batch": 0, "states": [torch.zeros(1000)]}, output / "state.pt")
    (output / name).write_bytes((output / name).read_bytes()[:-50])
    before = {name: (output / name).read_bytes() for name in contents(output)}
    refused = command("measure", *inputs, "--output", output, "--resume")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"{name} is damaged" in refused.err
    assert {name: (output / name).read_bytes() for name in contents(output)} == before


def _interrupted(plan: Plan, output: Path, after: int) -> Path:
    """Start or go on with a run and interrupt it after some batches, unless it is done before."""
    left = after

    def progress(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    try:
        run(plan, str(output), resume=True, progress=progress)
    except KeyboardInterrupt:
        _assert_no_half_files(output)
    return output


def _in_pieces(plans: list[Plan], output: Path, seed: int, most: int = 9) -> int:
    """Interrupt a run after random numbers of batches until it is done; every start uses the next plan."""
    chance, starts = random.Random(seed), 0
    while not (output / "rows.parquet").is_file():
        _interrupted(plans[starts % len(plans)], output, chance.randrange(2, most))
        starts += 1
        assert starts < 100, "the run makes no headway"
    return starts


@pytest.fixture
def always_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("transect.measure"), "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("always_saving")
@pytest.mark.parametrize("objective", ["cosine_adam", "mse_adam", "relu_control"])
def test_a_trained_approximator_goes_on_bit_by_bit(objective: str, tmp_path: Path):
    probe = Nonlinearity(elements=("ffn", "attn"), trained=objective, init="truncated_normal")
    plan = make(view_of("bert"), [probe], text(documents=181), 7)
    run(plan, str(tmp_path / "whole"))
    assert _in_pieces([plan], tmp_path / "run", 3) > 3
    _assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("always_saving")
@pytest.mark.parametrize("probe", [
    Commutativity(kinds=("pairs", "shuffle"), shuffles=2, sample=997),
    Ablation(methods=("zero", "noise", "linear", "two_linear"), parts=("ffn", "layer"), sample=397, train_epochs=1),
], ids=lambda probe: probe.name)  # fmt: skip
def test_edited_models_go_on_bit_by_bit(probe: Probe, tmp_path: Path):
    """Stopped between two batches and between two edited models of a batch, whose outcomes are then made again."""
    plan = make(view_of("gpt2", layers=3), [probe], text(documents=97), 7)
    told: list[str] = []
    run(plan, str(tmp_path / "whole"), progress=lambda tokens, phase: told.append(phase))
    batches = -(-len(plan.passes[0].stages[-1].sequences) // 7)
    assert batches > 3 and told.count("edit") > 7 * batches  # there are stops within a batch
    most = 2 * told.count("edit") // batches
    assert _in_pieces([plan], tmp_path / "run", 3, most) > 3
    _assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("after", [1, 2, 11, 17])
def test_ctrl_c_within_a_batch_of_edited_models_saves_what_was_before_it(after: int, tmp_path: Path):
    plan = make(view_of("gpt2", layers=3), [Commutativity(kinds=("pairs", "repeat"))], text(), 31)
    told: list[int] = []

    def interrupt(tokens: int, phase: str) -> None:
        told.append(tokens)
        if len(told) == after:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(plan, str(tmp_path / "run"), progress=interrupt)
    assert len(told) == after and _place(tmp_path / "run") == (0, 0, (after - 1) // 7)  # 7 models a batch
    again: list[int] = []
    run(plan, str(tmp_path / "run"), resume=True, progress=lambda tokens, phase: again.append(tokens))
    run(plan, str(tmp_path / "whole"))
    _assert_same(tmp_path / "run", tmp_path / "whole")
    batches = -(-text().num_sequences // 31)
    assert len(again) == 7 * (batches - (after - 1) // 7)


def _small(share: float) -> Plan:
    """A plan that may take a share of the memory that all layers need at once."""
    view, data = view_of("gpt2", layers=3), text(documents=61)
    probes = [Similarity(sample=53), Nonlinearity(), Jump(windows=False)]
    whole = make(view, probes, data, 7)
    return make(view, probes, data, 7, free=int(whole.bytes * share / SHARE))


@pytest.mark.usefixtures("always_saving")
def test_layer_groups_go_on_bit_by_bit(tmp_path: Path):
    plan = _small(0.7)
    assert len(plan.passes) > 1
    run(plan, str(tmp_path / "whole"))
    assert _in_pieces([plan], tmp_path / "run", 5) > 3
    _assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("always_saving")
def test_layer_groups_stay_when_other_memory_is_free_on_resuming(tmp_path: Path):
    small, large = _small(0.7), _small(4.0)
    assert len(small.passes) > len(large.passes) == 1
    run(small, str(tmp_path / "whole"))
    assert _in_pieces([small, large], tmp_path / "run", 5) > 3
    _assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("always_saving")
def test_too_little_memory_to_go_on_is_refused(tmp_path: Path):
    large, tight = _small(4.0), _small(0.57)
    _interrupted(large, tmp_path / "run", 2)
    with pytest.raises(InputError, match="not enough memory to go on"):
        run(tight, str(tmp_path / "run"), resume=True)
    run(large, str(tmp_path / "run"), resume=True)


@pytest.mark.usefixtures("always_saving")
def test_a_run_killed_between_its_rows_and_its_end_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = make(view_of("gpt2"), ["jump"], text(), 3)
    run(plan, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        write = Table.write

        def write_and_die(table: Table, folder: Path) -> None:
            write(table, folder)
            raise KeyboardInterrupt

        patch.setattr(Table, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(plan, str(tmp_path / "run"))
    assert contents(tmp_path / "run") == {"config.json", "state.pt", *ROWS}
    run(plan, str(tmp_path / "run"), resume=True)
    _assert_same(tmp_path / "run", tmp_path / "whole")


def test_what_a_killed_run_was_writing_is_swept_up(tmp_path: Path):
    plan = make(view_of("gpt2"), ["jump"], text(), 3)
    output = tmp_path / "run"
    output.mkdir()
    (output / ".config.json.123.partial").write_bytes(b"{")
    run(plan, str(output))
    assert contents(output) == FINISHED


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(inputs: list[str], tmp_path: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + DRIVER, "measure", *inputs, "--output", str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("transect: cannot save the state") and "--resume" in line
    assert contents(tmp_path) == set()
