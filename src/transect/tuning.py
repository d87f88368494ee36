"""What the command `tune` does, for a terminal."""

import tempfile
from pathlib import Path

import torch
from rich.console import Console

from transect.errors import InputError
from transect.models.memory.choice import user_path
from transect.models.memory.tune import tune, typical_cases
from transect.view.load import DTYPES


def tune_machine(output: Path | None, device: str, dtype: str, threads: int | None) -> None:
    """Time every back end of the sparse FFN at typical shapes, say each result, and write the table whole."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"cannot tune device {device!r}; allowed are auto, cpu and, where there is one, cuda")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}; give 1 or more")
    target = user_path() if output is None else output
    _check_writable(target)
    console = Console()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)

    def said(done: int, count: int, line: str) -> None:
        console.print(f"{done} of {count}  {line}", highlight=False, soft_wrap=True)

    try:
        written = tune(target, list(typical_cases(device, dtype)), said)
    finally:
        torch.set_num_threads(before)
    console.print(f"the table is in {written}", highlight=False, soft_wrap=True)


def _check_writable(target: Path) -> None:
    """Make the folder and a nameless file in it: the table is written whole, after minutes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}; give another file") from error
