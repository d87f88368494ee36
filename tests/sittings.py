"""One sitting of a training run in a process of its own, which may be killed, or run out of disk, at any place."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from transect.errors import InputError
from transect.recipes.recipe import load
from transect.train import checkpoints
from transect.train.audience import Silent
from transect.train.progress import Progress
from transect.train.run import train
from transect.train.step import Stepper

PRELOADED = ["torch", "transect.train.run", "transect.train.optimizers.adamw", "sittings"]


def sitting(recipe: Path, folder: Path, accident: str | None, step: int, resume: bool) -> int:
    """The exit code of a process that trains the recipe; `accident` happens at `step`, negative codes are signals.

    kill: kill -9 when the step is done; writing: kill -9 when a checkpoint of that step or a later one has all files
    but the last; full: from that step on no file may be longer than 20 kB; stop: SIGTERM when the step is done; stop
    in: SIGTERM while it is taken.
    """
    context = multiprocessing.get_context("forkserver")
    assert isinstance(context, ForkServerContext)
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_train, args=(recipe, folder, accident, step, resume))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


class _Witness(Silent):
    def __init__(self, accident: str | None, step: int) -> None:
        self.accident, self.at = accident, step

    def step(self, progress: Progress, shown: dict[str, float | None]) -> None:
        if progress.step != self.at:
            return
        if self.accident == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.accident == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.accident == "full":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def _killed_at(step: int, write: Callable) -> Callable:
    def writing(folder: Path, record: dict, *rest: object) -> object:
        if record["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, record, *rest)

    return writing


def _train(recipe: Path, folder: Path, accident: str | None, step: int, resume: bool) -> None:
    torch.set_num_threads(1)
    write = checkpoints.write_manifest
    killing = _killed_at(step, write) if accident == "writing" else write
    take = Stepper.take

    def taken(stepper: Stepper, number: int, *given: Any) -> Any:
        if accident == "stop in" and number + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(stepper, number, *given)

    with mock.patch.object(checkpoints, "write_manifest", killing), mock.patch.object(Stepper, "take", taken):
        try:
            outcome = train(load(recipe), folder, resume=resume, audience=_Witness(accident, step))
        except InputError as error:
            (folder / "error.txt").write_text(str(error)[:900])
            os._exit(2)
    os._exit(130 if outcome.reason == "stopped" else 0)
